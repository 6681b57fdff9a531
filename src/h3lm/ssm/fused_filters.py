"""The making of S4's filters as one operator of PyTorch, by kernels.

They are those of `powers_triton` or `filters_triton`, see `algorithm`. Complex tensors cross the
border as real pairs. The kernels are imported at their first use, and run once on a small problem
beside plain PyTorch, which takes over where they fail on a machine.
"""

import logging
from typing import Any, Literal

import torch
from torch import Tensor

from h3lm.ssm.first_use import first_use
from h3lm.ssm.fused_operators import MAX_MODES, has_kernels

logger = logging.getLogger("h3lm.ssm")
MAX_READOUTS = 2
Algorithm = Literal["powers", "generating function"]
FEW_POWERS = 16  # modes for which powers are made at any length
FEW_TAPS = {32: 1024, MAX_MODES: 256}  # by modes, which the generating function makes exactly
TOLERANCE = 1e-5  # of float32, behind sums in float64

_found: dict[
    tuple[torch.device, Algorithm, int], str
] = {}  # by `fault`, for when nothing can be tried


def algorithm(modes: int, length: int) -> Algorithm:
    """Which kernels make filters, a pure function.

    The generating function costs N for each tap, powers N^3 for each doubling of the length. Its
    rounding grows with both: of 64 states from 4096 taps on, of 128 from 1024 on, it is more than
    twice that of plain PyTorch.
    """
    few = next(taps for most, taps in FEW_TAPS.items() if modes <= most)
    return "powers" if modes <= FEW_POWERS or length > few else "generating function"


def can_fuse(eigenvalues: Tensor, B: Tensor, readouts: Tensor, length: int) -> bool:
    """Whether the kernels can make the filters of a system with these tensors.

    Args:
        eigenvalues: (H, N/2).
        B: (H, N/2); with axes in front of it, the plain path makes the filters.
        readouts: (K, H, N/2).
        length: Taps of a filter.
    """
    single = eigenvalues.dtype == B.dtype == readouts.dtype == torch.complex64
    fits = eigenvalues.shape[-1] <= MAX_MODES and 1 <= len(readouts) <= MAX_READOUTS
    possible = has_kernels(eigenvalues) and single and fits and B.dim() == 2
    return possible and works(eigenvalues.device, eigenvalues.shape[-1], length)


def fused_filters(
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    readouts: Tensor,
    dt: Tensor,
    length: int,
    *,
    skip: Tensor | None = None,
    delayed: bool = False,
) -> Tensor:
    """Filters (K, H, L) of a complex64 system, differentiable in every tensor.

    Args:
        eigenvalues, P, B, dt: As in `DPLRSystem`.
        readouts: (K, H, N/2), one or two.
        length: L.
        skip: (H,), added at lag 0 of the first read-out's filter.
        delayed: Whether the second read-out's filter starts one lag later.
    """
    pairs = (
        torch.view_as_real(x.resolve_conj()).contiguous() for x in (eigenvalues, P, B, readouts)
    )
    skip = None if skip is None else skip.contiguous()
    return torch.ops.h3lm.dplr_filters_fwd(*pairs, dt.contiguous(), skip, length, delayed)[0]


@torch.library.custom_op("h3lm::dplr_filters_fwd", mutates_args=())
def _forward(
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    skip: Tensor | None,
    length: int,
    delayed: bool,
) -> tuple[Tensor, Tensor]:
    given = (eigenvalues, P, B, C, dt, length, skip, delayed)
    if algorithm(C.shape[2], length) == "powers":
        from h3lm.ssm import powers_triton

        return powers_triton.make(*given), _no_table(C)
    from h3lm.ssm import filters_triton

    return filters_triton.make(*given)


@_forward.register_fake
def _(
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    skip: Tensor | None,
    length: int,
    delayed: bool,
) -> tuple[Tensor, Tensor]:
    readouts, H, modes, _ = C.shape
    table = C.new_empty(H, 6 + 4 * readouts, modes, dtype=torch.float64)
    by_powers = algorithm(modes, length) == "powers"
    return C.new_empty(readouts, H, length), _no_table(C) if by_powers else table


def _no_table(C: Tensor) -> Tensor:
    """What the kernels of powers keep for their backward pass."""
    return C.new_empty(C.shape[1], 0, dtype=torch.float64)


@torch.library.custom_op("h3lm::dplr_filters_bwd", mutates_args=())
def _backward(
    grad: Tensor,
    table: Tensor,
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    delayed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (eigenvalues, P, B, C, dt, delayed)
    if algorithm(C.shape[2], grad.shape[-1]) == "powers":
        from h3lm.ssm import powers_triton

        return powers_triton.make_backward(grad, *given)
    from h3lm.ssm import filters_triton

    return filters_triton.make_backward(grad, table, *given)


@_backward.register_fake
def _(
    grad: Tensor,
    table: Tensor,
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    delayed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dl, dP, dB, dC, ddt = (torch.empty_like(x) for x in (eigenvalues, P, B, C, dt))
    return dl, dP, dB, dC, ddt


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, skip, _, ctx.delayed = inputs
    ctx.with_skip = skip is not None
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    grads = torch.ops.h3lm.dplr_filters_bwd(grad, *ctx.saved_tensors, ctx.delayed)
    return *grads, grad[0, :, 0] if ctx.with_skip else None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _side_by_side(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """`vmap`: copies of a model are more systems."""
    *tensors, length, delayed = arguments
    count = info.batch_size

    def folded(x: Tensor | None, dim: int | None, behind: int) -> Tensor | None:
        if x is None:
            return None
        whole = x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        return whole.movedim(0, behind).flatten(behind, behind + 1).contiguous()

    given = [
        folded(x, dim, 1 if i == 3 else 0)  # read-outs stand in front of systems
        for i, (x, dim) in enumerate(zip(tensors, in_dims, strict=False))
    ]
    filters, table = torch.ops.h3lm.dplr_filters_fwd(*given, length, delayed)
    each = table.shape[0] // count
    return (filters.unflatten(1, (count, each)), table.unflatten(0, (count, each))), (1, 0)


_forward.register_vmap(_side_by_side)


def works(device: torch.device, modes: int, length: int) -> bool:
    """Whether the kernels may be used; where they cannot be tried, an earlier test can say no."""
    kind = algorithm(modes, length)
    # one kernel for all below
    modes = max(8, 1 << (modes - 1).bit_length()) if kind == "powers" else MAX_MODES
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # by vmap
    if transformed or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return not _found.get((device, kind, modes))
    return not fault(device, kind, modes)


def checks() -> list[tuple[Algorithm, int]]:
    """What `fault` can be asked for on a device."""
    powers: list[tuple[Algorithm, int]] = [("powers", modes) for modes in (8, 16, 32, MAX_MODES)]
    return [*powers, ("generating function", MAX_MODES)]


@first_use(logger, "S4's filters by {1} of {2} modes are off, plain PyTorch takes over", _found)
def fault(device: torch.device, kind: Algorithm, modes: int) -> str:
    """What is wrong with kernels for so many modes on this machine; empty if they work."""
    with torch.inference_mode(False):
        return _compare(device, kind, modes)


def _compare(device: torch.device, kind: Algorithm, modes: int) -> str:
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    half = 3 * modes // 4 - 1
    eigenvalues = normal(3, half, 2)
    eigenvalues[..., 0] = -0.5 - eigenvalues[..., 0].abs()
    rest = normal(3, half, 2), normal(3, half, 2), normal(2, 3, half, 2), normal(3).exp() * 0.02
    leaves = [x.requires_grad_() for x in (eigenvalues, *rest)]
    with torch.enable_grad():
        plain = _plain(300, *leaves)
    grad = normal(*plain.shape)
    expected = (plain, *torch.autograd.grad(plain, leaves, grad))
    eigenvalues, P, B, C, dt = (x.detach() for x in leaves)
    found: tuple[Tensor, ...]
    if kind == "powers":
        from h3lm.ssm import powers_triton

        made = powers_triton.make(eigenvalues, P, B, C, dt, 300)
        found = (made, *powers_triton.make_backward(grad, eigenvalues, P, B, C, dt))
    else:
        from h3lm.ssm import filters_triton

        made, table = filters_triton.make(eigenvalues, P, B, C, dt, 300)
        found = (made, *filters_triton.make_backward(grad, table, eigenvalues, P, B, C, dt))
    names = "filters", "eigenvalues", "P", "B", "C", "dt"
    for name, a, b in zip(names, found, expected, strict=True):
        error = float((a - b).detach().norm() / b.detach().norm())
        if not error < TOLERANCE:
            return f"{name} differs by {error:.1e}"
    return ""


def _plain(length: int, eigenvalues: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> Tensor:
    from h3lm.ssm.dplr import DPLRSystem  # it imports this module

    eigenvalues, P, B, C = (torch.view_as_complex(x) for x in (eigenvalues, P, B, C))
    system = DPLRSystem(eigenvalues, P, B, C[0], dt, skip=torch.zeros_like(dt))
    return system.plain_filters(C, length)
