"""The checks that stand before the first use of the Hopper kernels, and of rows cut into segments.

Gluon is experimental: a Triton release may change or break it. So the kernels run once on a small
problem beside the plain Triton ones, and where they fail, these take over and say so. Segments run
beside the same kernels on whole rows, which take over from them.
"""

import logging
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from h3lm.flashconv.kernels.launch import Operators
from h3lm.ssm.first_use import first_use
from h3lm.ssm.operators import lower_toeplitz

logger = logging.getLogger("h3lm.flashconv")
TOLERANCE = 1e-2  # both round operands to bfloat16, 2^-9 each


def hopper_kernels(device: torch.device, heads: bool = False) -> ModuleType | None:
    """The Hopper kernels, of heads or of single channels, if they work on this machine."""
    if torch.cuda.is_current_stream_capturing():  # no test inside of a CUDA graph
        wrong = _found.get((device, heads))
    else:
        wrong = hopper_fault(device, heads)
    return None if wrong else _import(heads)


_found: dict[tuple[torch.device, bool], str] = {}


@first_use(logger, "Hopper kernels are off, Triton takes over", _found)
def hopper_fault(device: torch.device, heads: bool) -> str:
    """What is wrong with the Hopper kernels on this machine; empty if they work.

    Args:
        device: A Hopper GPU.
        heads: Whether those for heads of several channels are meant.
    """
    return _compare(device, heads)


def segments_work(device: torch.device) -> bool:
    """Whether rows may be cut into segments.

    In a CUDA graph and under a compiler no test runs: only an earlier one can say no.
    """
    if device.type != "cuda":
        return True
    traced = detect_fake_mode() is not None or torch.compiler.is_compiling()
    if traced or torch.cuda.is_current_stream_capturing():
        return not _found_segments.get(device)
    return not segments_fault(device)


_found_segments: dict[torch.device, str] = {}


@first_use(logger, "few channels are not run in segments, but as a whole", _found_segments)
def segments_fault(device: torch.device) -> str:
    """What is wrong with segments on this machine; empty if they work."""
    return _compare_segments(device)


def _import(heads: bool) -> ModuleType:
    from h3lm.flashconv.kernels import chunk_hopper, heads_hopper

    return heads_hopper if heads else chunk_hopper


def _compare(device: torch.device, heads: bool) -> str:
    from h3lm.flashconv.kernels import chunk_triton, heads_triton

    tensors, operators = _problem(device, 320, 8, 3) if heads else _problem(device, 4096)
    kernels: tuple[Any, Any] = (_import(heads), heads_triton if heads else chunk_triton)
    return _first_difference(*(_everything(x, tensors, operators) for x in kernels))


def _compare_segments(device: torch.device) -> str:
    from h3lm.flashconv.kernels import chunk_triton, segments

    tensors, operators = _problem(device, 2 * 4096 + 100)
    cut = SimpleNamespace(
        forward=partial(segments.forward, chunk_triton, segments=2),
        backward=partial(segments.backward, chunk_triton, segments=2),
    )
    return _first_difference(*(_everything(x, tensors, operators) for x in (cut, chunk_triton)))


def _problem(
    device: torch.device, L: int, head_dim: int = 1, rows: int = 1
) -> tuple[tuple[Tensor, ...], Operators]:
    """q, k, v, do of one head, and operators."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=random, device=device) * scale

    T, N = 64, 64
    # products of bfloat16 are wrong in the interpreter, which is what runs without a GPU
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    tensors = tuple(normal(rows, head_dim, L).to(dtype) for _ in range(4))
    decay = torch.stack([torch.full((32,), 0.6), torch.linspace(-0.6, 0.6, 32)], -1)
    operators = Operators(
        F=lower_toeplitz(normal(head_dim, T, scale=0.1), 2, T),
        M=lower_toeplitz(normal(1, T, scale=0.1), 1, T)[:, 0],
        K=normal(1, N, T, scale=0.1), P=normal(1, T, N, scale=0.1),
        decay=decay[None].to(device),
    )  # fmt: skip
    return tensors, operators


def _everything(
    kernels: Any, tensors: tuple[Tensor, ...], operators: Operators
) -> dict[str, Tensor]:
    """Output, end state and every gradient, by name."""
    q, k, v, do = tensors
    o, end, states = kernels.forward(
        q, k, v, operators, None, None, with_output=True, with_end=True, save_states=True
    )
    grads = kernels.backward(do, end, q, k, v, operators, None, None, states)
    named = {"o": o, "end": end, **vars(grads)}
    return {name: x.float() for name, x in named.items() if x is not None}


def _first_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    for name, right in expected.items():
        error = float((found[name] - right).norm() / right.norm())
        if not error < TOLERANCE:
            return f"{name} differs by {error:.1e} from the Triton kernel on whole rows"
    return ""
