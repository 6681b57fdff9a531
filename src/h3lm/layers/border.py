"""What passes the border between (B, L, D) and (B, D, L) by kernels, as operators of PyTorch.

Where they cannot run, modules do the same in plain PyTorch. The kernels are imported at their first
use, and run once on a small problem beside plain PyTorch, which stays in use where they fail.
"""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from h3lm.layers.projection import is_plain
from h3lm.ssm.first_use import first_use

logger = logging.getLogger("h3lm.layers")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = 1e-5  # of float32

_HAS_TRITON = find_spec("triton") is not None
_found: dict[torch.device, str] = {}  # by `fault`, for when nothing can be tried


def can_normalise(x: Tensor, weight: Tensor) -> bool:
    """Whether `batch_norm` can normalise x, (B, L, D)."""
    return x.dtype == weight.dtype == torch.float32 and x.numel() > 0 and _usable(x)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lengths: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    positions_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in training over the positions that count.

    Args:
        x: (B, L, D), float32.
        weight, bias: (D,).
        lengths: Positions of each row that count, (B,), from its beginning; all if None.
        eps: Of the variance.
        dtype: Of the result.
        positions_last: Whether positions are to be contiguous in the result's memory.

    Returns:
        (B, L, D), zero at padding; mean, variance, unbiased variance and number of positions,
        (4, D), without gradients; and x, for a residual sum: the gradient of that is added where
        the one of the norm is made.
    """
    number = DTYPES.index(dtype)
    y, statistics, x = _Norm.apply(
        x.contiguous(), weight, bias, lengths, eps, number, positions_last
    )
    return (y.transpose(1, 2) if positions_last else y), statistics, x


def can_gate(projection: nn.Module, y: Tensor) -> bool:
    """Whether `project_gated` can run this module on y, (B, D, L)."""
    return is_plain(projection) and y.dtype in DTYPES and y.numel() > 0 and _usable(y)


def project_gated(projection: nn.Module, y: Tensor, residual: Tensor | None = None) -> Tensor:
    """`glu` of a linear map of (B, D, L), as (B, L, D), dtype of y; or added to a residual.

    Under autocast as in plain PyTorch, with float32 in place of rounding behind the bias, and up to
    the sum with a residual.
    """
    assert isinstance(projection, nn.Linear)
    with torch.autocast(y.device.type, enabled=False):
        weight = projection.weight.to(y.dtype).expand(len(y), -1, -1)
        residual = None if residual is None else residual.contiguous()
        return torch.ops.h3lm.gate_fwd(torch.bmm(weight, y), projection.bias, residual)


def _usable(x: Tensor) -> bool:
    if x.device.type != "cuda" or torch.version.hip is not None or not _HAS_TRITON:
        return False
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    # where nothing can be tried, only an earlier test can say no
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return not _found.get(x.device)
    return not fault(x.device)


@torch.library.custom_op("h3lm::batch_norm_fwd", mutates_args=())
def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lengths: Tensor | None,
    eps: float,
    dtype: int,
    positions_last: bool,
) -> tuple[Tensor, Tensor]:
    from h3lm.layers import border_triton

    B, L, D = x.shape
    y = x.new_empty((B, D, L) if positions_last else (B, L, D), dtype=DTYPES[dtype])
    rows = y.transpose(1, 2) if positions_last else y
    return y, border_triton.batch_norm(x, weight, bias, lengths, rows, eps)


@_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lengths: Tensor | None,
    eps: float,
    dtype: int,
    positions_last: bool,
) -> tuple[Tensor, Tensor]:
    B, L, D = x.shape
    shape = (B, D, L) if positions_last else (B, L, D)
    return x.new_empty(shape, dtype=DTYPES[dtype]), x.new_empty(4, D)


@torch.library.custom_op("h3lm::batch_norm_bwd", mutates_args=())
def _norm_backward(
    dy: Tensor,
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    lengths: Tensor | None,
    statistics: Tensor,
    eps: float,
    positions_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from h3lm.layers import border_triton

    rows = dy.transpose(1, 2) if positions_last else dy
    return border_triton.batch_norm_backward(rows, residual, x, weight, lengths, statistics, eps)


@_norm_backward.register_fake
def _(
    dy: Tensor,
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    lengths: Tensor | None,
    statistics: Tensor,
    eps: float,
    positions_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


class _Norm(torch.autograd.Function):
    """`batch_norm_fwd`, and x itself: an operator could not return its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        lengths: Tensor | None,
        eps: float,
        dtype: int,
        positions_last: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = torch.ops.h3lm.batch_norm_fwd
        y, statistics = run(x, weight, bias, lengths, eps, dtype, positions_last)
        ctx.save_for_backward(x, weight, lengths, statistics)
        ctx.form = eps, positions_last
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, statistics, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, _, residual = grads
        if dy is None:
            return residual, None, None, None, None, None, None
        residual = None if residual is None else residual.contiguous()
        run = torch.ops.h3lm.batch_norm_bwd
        return *run(dy, residual, *ctx.saved_tensors, *ctx.form), None, None, None, None


@torch.library.custom_op("h3lm::gate_fwd", mutates_args=())
def _gate(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    from h3lm.layers import border_triton

    return border_triton.gate(y.contiguous(), bias, residual)


@_gate.register_fake
def _(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    like = y if residual is None else residual
    return like.new_empty(y.shape[0], y.shape[2], y.shape[1] // 2)


@torch.library.custom_op("h3lm::gate_bwd", mutates_args=())
def _gate_backward(dout: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    from h3lm.layers import border_triton

    return border_triton.gate_backward(dout, y.contiguous(), bias)


@_gate_backward.register_fake
def _(dout: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, bias, residual = inputs
    ctx.with_residual = residual is not None
    ctx.save_for_backward(y, bias)


def _differentiate_gate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    y, bias = ctx.saved_tensors
    dy, dbias = torch.ops.h3lm.gate_bwd(dout, y, bias)
    return dy, None if bias is None else dbias, dout if ctx.with_residual else None


_gate.register_autograd(_differentiate_gate, setup_context=_setup_gate)


@first_use(logger, "kernels of norm and gate are off, modules take over", _found)
def fault(device: torch.device) -> str:
    """What is wrong with the kernels on this machine; empty if they work."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        return _compare(device)


def _compare(device: torch.device) -> str:
    from h3lm.layers.batch_norm import BatchNorm  # it imports this module

    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    x, grad, weight, bias = normal(3, 100, 40), normal(3, 100, 40), normal(40), normal(40)
    lengths = torch.tensor([100, 30, 77], device=device)
    grad = grad * (torch.arange(100, device=device) < lengths[:, None])[..., None]
    norm = BatchNorm(40, device=device)
    for parameter, value in ((norm.weight, weight), (norm.bias, bias)):
        parameter.data.copy_(value)
    y, bias_of_y = normal(3, 80, 100), normal(80)
    with torch.enable_grad():
        for leaf in (x, weight, bias, y, bias_of_y):
            leaf.requires_grad_()
        found, _, r = batch_norm(x, weight, bias, lengths, norm.eps, torch.float32, True)
        found, expected = found + r * r, norm.plain(x, lengths) + x * x
        gated = torch.ops.h3lm.gate_fwd(y, bias_of_y, None)
        plain = F.glu((y + bias_of_y[:, None]).transpose(1, 2), -1)
        pairs = [
            (grad * found, grad * expected),
            (gated, plain),
            *zip(
                torch.autograd.grad(found, (x, weight, bias), grad),
                torch.autograd.grad(expected, (x, norm.weight, norm.bias), grad),
                strict=True,
            ),
            *zip(
                torch.autograd.grad(gated, (y, bias_of_y), grad),
                torch.autograd.grad(plain, (y, bias_of_y), grad),
                strict=True,
            ),
        ]
    for name, (a, b) in zip(("norm", "gate", "dx", "dw", "db", "dy", "dbias"), pairs, strict=True):
        error = float((a - b).detach().norm() / b.detach().norm())
        if not error < TOLERANCE:
            return f"{name} differs by {error:.1e}"
    return ""
