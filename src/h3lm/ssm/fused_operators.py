"""The making of chunk operators as one operator of PyTorch, by the kernels of `operators_triton`.

Complex tensors cross the border as real pairs. The kernels are imported at their first use, and
compared with plain PyTorch on a small system before it: where they fail, that takes over.
"""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from h3lm.ssm.first_use import first_use

MAX_MODES = 64
CHUNK_LENGTHS = (16, 32, 64)

_HAS_TRITON = find_spec("triton") is not None
logger = logging.getLogger("h3lm.ssm")
TOLERANCE = 1e-4  # both round to float32 what they make in float64 or as products of such
NAMES = ("M", "K", "P", "F", "decay")


def has_kernels(x: Tensor) -> bool:
    """Whether kernels of this room run where a tensor is."""
    usable = x.device.type == "cuda" and torch.version.hip is None and _HAS_TRITON
    return usable and torch.cuda.get_device_capability(x.device) >= (8, 0)


def can_fuse(a: Tensor, taps: Tensor | None, chunk_length: int) -> bool:
    """Whether the kernels can make the operators of a system with this decay and these taps."""
    if not has_kernels(a):
        return False
    single = a.dtype == torch.complex64 and (taps is None or taps.dtype == torch.float32)
    fits = single and a.shape[1] <= MAX_MODES and chunk_length in CHUNK_LENGTHS
    return fits and _works(a.device)


def fused_operators(
    a: Tensor, b: Tensor, c: Tensor, skip: Tensor, taps: Tensor | None, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """M, K, P, F and decay of a complex64 system, differentiable in every tensor."""
    pairs = (torch.view_as_real(x.resolve_conj()).contiguous() for x in (a, b, c))
    taps = None if taps is None else taps.contiguous()
    M, K, P, F, decay = torch.ops.h3lm.chunk_operators_fwd(*pairs, skip.contiguous(), taps, T)
    return M, K, P, None if taps is None else F, torch.view_as_complex(decay)


@torch.library.custom_op("h3lm::chunk_operators_fwd", mutates_args=())
def _forward(
    a: Tensor, b: Tensor, c: Tensor, skip: Tensor, taps: Tensor | None, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from h3lm.ssm import operators_triton

    return operators_triton.make(a, b, c, skip, taps, T)


@_forward.register_fake
def _(
    a: Tensor, b: Tensor, c: Tensor, skip: Tensor, taps: Tensor | None, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    H, modes, _ = a.shape
    F = (0,) if taps is None else (taps.shape[0], 1 + -(-(taps.shape[1] - 1) // T), T, T)
    return (
        a.new_empty(H, T, T), a.new_empty(H, 2 * modes, T), a.new_empty(H, T, 2 * modes),
        a.new_empty(F), torch.empty_like(a),
    )  # fmt: skip


@torch.library.custom_op("h3lm::chunk_operators_bwd", mutates_args=())
def _backward(
    dM: Tensor,
    dK: Tensor,
    dP: Tensor,
    dF: Tensor,
    ddecay: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    n_taps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from h3lm.ssm import operators_triton

    dM, dK, dP, dF, ddecay = (x.contiguous() for x in (dM, dK, dP, dF, ddecay))
    return operators_triton.make_backward(dM, dK, dP, dF, ddecay, a, b, c, n_taps)


@_backward.register_fake
def _(
    dM: Tensor,
    dK: Tensor,
    dP: Tensor,
    dF: Tensor,
    ddecay: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    n_taps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtaps = a.new_empty((dF.shape[0], n_taps) if n_taps else (0,))
    da, db, dc = (torch.empty_like(x) for x in (a, b, c))
    return da, db, dc, a.new_empty(a.shape[0]), dtaps


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, c, _, taps, _ = inputs
    ctx.n_taps = 0 if taps is None else taps.shape[1]
    ctx.save_for_backward(a, b, c)


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    run = torch.ops.h3lm.chunk_operators_bwd
    da, db, dc, dskip, dtaps = run(*grads, *ctx.saved_tensors, ctx.n_taps)
    return da, db, dc, dskip, dtaps if ctx.n_taps else None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _side_by_side(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """`vmap`: copies of a model are more systems."""
    *tensors, T = arguments
    count = info.batch_size

    def folded(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        whole = x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        return whole.flatten(0, 1).contiguous()

    given = (folded(x, dim) for x, dim in zip(tensors, in_dims, strict=False))
    made = torch.ops.h3lm.chunk_operators_fwd(*given, T)
    apart = (x.unflatten(0, (count, -1)) if x.numel() else x.expand(count, 0) for x in made)
    return tuple(apart), (0,) * len(made)


_forward.register_vmap(_side_by_side)


@torch.compiler.assume_constant_result
def _works(device: torch.device) -> bool:
    """Whether the kernels may be used; inside of a CUDA graph only an earlier test can say no."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return not _found.get(device)
    return not operators_fault(device)


_found: dict[torch.device, str] = {}


@first_use(logger, "kernels that make operators are off, PyTorch takes over", _found)
def operators_fault(device: torch.device) -> str:
    """What is wrong with the kernels on this machine; empty if they work."""
    with torch.inference_mode(False), torch.enable_grad():
        return _compare(device)


def _compare(device: torch.device) -> str:
    from h3lm.ssm import operators_triton

    H, modes, n_taps, T = 3, 20, 64, 64  # two programs for each system, one of them not full
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    angle = normal(H, modes)
    a = torch.view_as_real(torch.polar(0.99 - 0.1 * angle.abs() / (1 + angle.abs()), angle))
    a, b, c = a.contiguous(), normal(H, modes, 2), normal(H, modes, 2)
    skip, taps = normal(H), normal(H, n_taps)
    made = operators_triton.make(a, b, c, skip, taps, T)
    given = [x.requires_grad_() for x in (a, b, c, skip, taps)]
    plain = _plain(a, b, c, skip, taps, T)
    dM, dK, dP, dF, ddecay = (normal(*x.shape) for x in plain)
    plain_back = torch.autograd.grad(plain, given, (dM, dK, dP, dF, ddecay))
    a, b, c = (x.detach() for x in (a, b, c))
    back = operators_triton.make_backward(dM, dK, dP, dF, ddecay, a, b, c, n_taps)
    names = (*NAMES, "da", "db", "dc", "dskip", "dtaps")
    for name, x, y in zip(names, (*made, *back), (*plain, *plain_back), strict=True):
        error = float((x - y).norm().detach() / y.norm().detach())
        if not error < TOLERANCE:
            return f"{name} differs by {error:.1e}"
    return ""


def _plain(
    a: Tensor, b: Tensor, c: Tensor, skip: Tensor, taps: Tensor, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`operators_triton.make` in plain PyTorch, differentiable."""
    from h3lm.ssm.operators import DiagonalSystem  # it imports this module

    a, b, c = (torch.view_as_complex(x) for x in (a, b, c))
    made = DiagonalSystem(a, b, c, skip).plain_chunk_operators(taps, T)
    assert made.F is not None
    return made.M, made.K, made.P, made.F, torch.view_as_real(made.decay)
