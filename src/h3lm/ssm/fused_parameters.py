"""Discretisation and short filter as operators of PyTorch, by the kernels of `parameters_triton`.

What PyTorch takes thirty small kernels for in a layer, forward and backward, most of them of
complex numbers, which its compiler does not fuse. Complex tensors cross the border as real pairs.
The kernels are compared with plain PyTorch before their first use, which takes over if they fail.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from h3lm.ssm.first_use import first_use
from h3lm.ssm.fused_operators import MAX_MODES, TOLERANCE, has_kernels

MAX_SLOTS = 128
logger = logging.getLogger("h3lm.ssm")


def can_discretize(A_imag: Tensor) -> bool:
    """Whether the kernel can discretise a system with these imaginary parts."""
    single = A_imag.dtype == torch.float32 and A_imag.shape[1] <= MAX_MODES
    return has_kernels(A_imag) and single and _works(A_imag.device)


def can_filter(B: Tensor) -> bool:
    """Whether the kernel can make the taps of a shift SSM with this B."""
    single = B.dtype == torch.float32 and B.shape[1] <= MAX_SLOTS
    return has_kernels(B) and single and _works(B.device)


def bilinear(
    log_dt: Tensor, log_neg_A_real: Tensor, A_imag: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """A and b of `DiagonalSSM` by the bilinear rule, complex64, differentiable."""
    given = (x.contiguous() for x in (log_dt, log_neg_A_real, A_imag, B))
    a, b = torch.ops.h3lm.bilinear_fwd(*given)
    return torch.view_as_complex(a), torch.view_as_complex(b)


def shift_taps(B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`ShiftSSM.taps` of its parameters, differentiable."""
    return torch.ops.h3lm.shift_taps_fwd(B.contiguous(), C.contiguous(), D.contiguous())


@torch.library.custom_op("h3lm::bilinear_fwd", mutates_args=())
def _bilinear(
    log_dt: Tensor, log_neg_A_real: Tensor, A_imag: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    from h3lm.ssm import parameters_triton

    return parameters_triton.bilinear(log_dt, log_neg_A_real, A_imag, B)


@_bilinear.register_fake
def _(log_dt: Tensor, log_neg_A_real: Tensor, A_imag: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(B), torch.empty_like(B)


@torch.library.custom_op("h3lm::bilinear_bwd", mutates_args=())
def _bilinear_backward(
    da: Tensor, db: Tensor, log_dt: Tensor, log_neg_A_real: Tensor, A_imag: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from h3lm.ssm import parameters_triton

    da, db = da.contiguous(), db.contiguous()
    return parameters_triton.bilinear_backward(da, db, log_dt, log_neg_A_real, A_imag, B)


@_bilinear_backward.register_fake
def _(
    da: Tensor, db: Tensor, log_dt: Tensor, log_neg_A_real: Tensor, A_imag: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(log_dt), torch.empty_like(log_neg_A_real), torch.empty_like(A_imag),
        torch.empty_like(B),
    )  # fmt: skip


@torch.library.custom_op("h3lm::shift_taps_fwd", mutates_args=())
def _shift_taps(B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from h3lm.ssm import parameters_triton

    return parameters_triton.taps(B, C, D)


@_shift_taps.register_fake
def _(B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return torch.empty_like(B)


@torch.library.custom_op("h3lm::shift_taps_bwd", mutates_args=())
def _shift_taps_backward(dtaps: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    from h3lm.ssm import parameters_triton

    return parameters_triton.taps_backward(dtaps.contiguous(), B, C)


@_shift_taps_backward.register_fake
def _(dtaps: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(B), torch.empty_like(C)


def _keep_all(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_bilinear(ctx: Any, da: Tensor, db: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.h3lm.bilinear_bwd(da, db, *ctx.saved_tensors)


def _differentiate_taps(ctx: Any, dtaps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, C, _ = ctx.saved_tensors
    dB, dC = torch.ops.h3lm.shift_taps_bwd(dtaps, B, C)
    return dB, dC, dtaps[:, 0]


_bilinear.register_autograd(_differentiate_bilinear, setup_context=_keep_all)
_shift_taps.register_autograd(_differentiate_taps, setup_context=_keep_all)


def _folded(info: Any, in_dims: tuple[int | None, ...], given: tuple[Tensor, ...]) -> list[Tensor]:
    """Copies of a model, side by side by `vmap`, as more systems."""
    count = info.batch_size
    whole = (
        x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(given, in_dims, strict=True)
    )
    return [x.flatten(0, 1).contiguous() for x in whole]


@_bilinear.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], *given: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    made = torch.ops.h3lm.bilinear_fwd(*_folded(info, in_dims, given))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in made), (0, 0)


@_shift_taps.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *given: Tensor) -> tuple[Tensor, int]:
    made = torch.ops.h3lm.shift_taps_fwd(*_folded(info, in_dims, given))
    return made.unflatten(0, (info.batch_size, -1)), 0


@torch.compiler.assume_constant_result
def _works(device: torch.device) -> bool:
    """Whether the kernels may be used; inside of a CUDA graph only an earlier test can say no."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return not _found.get(device)
    return not parameters_fault(device)


_found: dict[torch.device, str] = {}


@first_use(logger, "kernels of the parameters are off, PyTorch takes over", _found)
def parameters_fault(device: torch.device) -> str:
    """What is wrong with the kernels on this machine; empty if they work."""
    with torch.inference_mode(False), torch.enable_grad():
        return _compare(device)


def _compare(device: torch.device) -> str:
    from h3lm.ssm import parameters_triton as kernels
    from h3lm.ssm.diagonal import plain_bilinear  # they import this module
    from h3lm.ssm.shift import plain_taps

    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    H, modes, slots = 3, 20, 40  # neither fills a program
    dt, real, imag, B = normal(H) - 4, normal(H, modes), 9 * normal(H, modes), normal(H, modes, 2)
    shift_B, C, D = normal(H, slots), normal(H, slots), normal(H)
    made = *kernels.bilinear(dt, real, imag, B), kernels.taps(shift_B, C, D)
    leaves = [x.requires_grad_() for x in (dt, real, imag, B, shift_B, C)]
    a, b = (torch.view_as_real(x) for x in plain_bilinear(dt, real, imag, B))
    plain = a, b, plain_taps(shift_B, C, D)
    da, db, dtaps = (normal(*x.shape) for x in plain)
    plain_back = torch.autograd.grad(plain, leaves, (da, db, dtaps))
    dt, real, imag, B, shift_B, C = (x.detach() for x in leaves)
    back = kernels.bilinear_backward(da, db, dt, real, imag, B)
    back_taps = kernels.taps_backward(dtaps, shift_B, C)
    names = ("a", "b", "taps", "dlog_dt", "dlog_neg_A_real", "dA_imag", "dB", "dB of taps", "dC")
    for name, x, y in zip(names, (*made, *back, *back_taps), (*plain, *plain_back), strict=True):
        error = float((x - y).norm().detach() / y.norm().detach())
        if not error < TOLERANCE:
            return f"{name} differs by {error:.1e}"
    return ""
