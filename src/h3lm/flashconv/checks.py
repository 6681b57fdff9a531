"""What the ops check of their arguments.

Each raises a ValueError of one line, which names the argument, what it is and what it must be.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor

from h3lm.flashconv.fft_chunks import FFTOperators
from h3lm.flashconv.state import H3State, diagonal_shape
from h3lm.ssm.dplr import DPLRSystem
from h3lm.ssm.hints import SSMModule
from h3lm.ssm.operators import ChunkOperators, DiagonalSystem

AnySystem = DiagonalSystem | ChunkOperators | DPLRSystem | FFTOperators
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def system_of(system: DiagonalSystem | ChunkOperators) -> DiagonalSystem: ...
@overload
def system_of(system: AnySystem) -> DiagonalSystem | DPLRSystem: ...
def system_of(system: AnySystem) -> DiagonalSystem | DPLRSystem:
    """The system of what one of the methods made of it."""
    return system.system if isinstance(system, ChunkOperators | FFTOperators) else system


def check_slice(reverse: bool) -> None:
    """Refuse a direction in which no states pass between processes."""
    if reverse:
        raise ValueError("reverse with a process_group is not supported: states go left to right")


def _refuse_module(name: str, x: object) -> None:
    if isinstance(x, SSMModule):
        raise ValueError(
            f"{name} is the module {type(x).__name__}; give what its parameters make, its {name}()"
        )


def check_tensor(name: str, x: object) -> None:
    """Refuse what is no tensor, such as the module that would make one."""
    _refuse_module(name, x)
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(x).__name__}")


def check_taps(taps: Tensor, x: Tensor) -> None:
    """Check the taps of a short filter on x."""
    check_tensor("taps", taps)
    if taps.dim() != 2 or taps.shape[1] < 1:
        raise ValueError(f"taps is {tuple(taps.shape)}: need (D, n_taps)")
    if taps.dtype not in (torch.float32, torch.float64) or taps.device != x.device:
        raise ValueError(
            f"taps is {taps.dtype} on {taps.device}; the inputs, on {x.device}, need float32 there"
        )


def check_system(system: AnySystem, x: Tensor) -> None:
    """Check that a system is one, on the device of x."""
    _refuse_module("system", system)
    if not isinstance(system, AnySystem):
        raise ValueError(
            f"system must be a DiagonalSystem or the like, not {type(system).__name__}"
        )
    check_device("system", system_of(system).skip, x)


def check_device(name: str, y: Tensor, x: Tensor) -> None:
    """Check that a tensor is where the inputs are."""
    if y.device != x.device:
        raise ValueError(f"{name} is on {y.device}, the inputs are on {x.device}")


def check_complex(name: str, state: Tensor | None, x: Tensor) -> None:
    """Check that a diagonal state, if there is one, is complex, on the device of x."""
    if state is None:
        return
    check_tensor(name, state)
    if not state.is_complex() or state.device != x.device:
        raise ValueError(
            f"{name} is {state.dtype} on {state.device}; the inputs, on {x.device}, need complex "
            "numbers there"
        )


def check_like(name: str, x: Tensor, others: Mapping[str, Tensor], axes: str = "(B, D, L)") -> None:
    """Check an input of these axes, and others of its shape, dtype and device."""
    check_tensor(name, x)
    if x.dim() != len(axes.split(",")):
        raise ValueError(f"{name} must be {axes}, got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} is {x.dtype}; use float32, bfloat16, float16 or float64")
    for other, y in others.items():
        check_tensor(other, y)
        if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
            raise ValueError(
                f"{other} is {tuple(y.shape)} {y.dtype} on {y.device}, "
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}: they must agree"
            )


def check_heads(
    k: Tensor, taps: Tensor, system: DiagonalSystem | ChunkOperators, head_dim: int
) -> None:
    """Check that taps, system and heads are those of the channels of k."""
    check_taps(taps, k)
    check_system(system, k)
    if not isinstance(system, DiagonalSystem | ChunkOperators):
        raise ValueError(f"an H3 core has diagonal systems, not a {type(system).__name__}")
    D, H = k.shape[1], system_of(system).num_systems
    if taps.shape[0] != D:
        raise ValueError(f"taps is {tuple(taps.shape)}, k has {D} channels: need ({D}, n_taps)")
    if head_dim < 1 or head_dim * H != D:
        raise ValueError(
            f"head_dim={head_dim} times {H} systems must be the {D} channels of q, k, v"
        )


def check_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Number of sequences with a state of their own."""
    if cu_seqlens is None:
        return x.shape[0]
    check_tensor("cu_seqlens", cu_seqlens)
    check_device("cu_seqlens", cu_seqlens, x)
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences in one row, the batch has {x.shape[0]}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype.is_floating_point:
        raise ValueError(
            f"cu_seqlens must be at least two integers, got {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    if not (torch.compiler.is_compiling() or _is_capturing(cu_seqlens)):
        bounds = cu_seqlens.tolist()
        increasing = all(b > a for a, b in pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != x.shape[-1] or not increasing:
            raise ValueError(
                f"cu_seqlens must increase from 0 to the length {x.shape[-1]}, got {bounds}"
            )
    return len(cu_seqlens) - 1


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def check_h3_state(
    state: H3State | None,
    rows: int,
    k: Tensor,
    taps: Tensor,
    system: DiagonalSystem | ChunkOperators,
    head_dim: int,
) -> None:
    """Check that a state, if there is one, is of these rows, taps and systems."""
    if state is None:
        return
    if not isinstance(state, H3State):
        raise ValueError(f"initial_state must be an H3State, not {type(state).__name__}")
    check_tensor("initial_state.shift", state.shift)
    check_device("initial_state.shift", state.shift, k)
    check_complex("initial_state.diagonal", state.diagonal, k)
    shift = (rows, k.shape[1], taps.shape[1] - 1)
    diagonal = diagonal_shape(rows, k.shape[1] // head_dim, head_dim, system_of(system).num_modes)
    if state.shift.shape != shift or state.diagonal.shape != diagonal:
        raise ValueError(
            f"initial_state has shift {tuple(state.shift.shape)} and diagonal "
            f"{tuple(state.diagonal.shape)}; this call needs {shift} and {diagonal}"
        )
