"""One position of each row of a batch through whole layers, by kernels and without gradients.

A block is seven launches: norm, q k v, core, output, norm, up with GELU, down; a core whose states
lag behind is two. Where several programs share an output of a product, their sums are added by the
norm that follows, together with bias and residual stream.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from h3lm.flashconv.dispatch import TRITON_DTYPES, Problem, capability
from h3lm.layers.mlp import MLP
from h3lm.layers.projection import is_plain


class Stream(NamedTuple):
    """A residual stream whose last summand has not been added yet.

    Attributes:
        r: (rows, D).
        parts: (n, rows, D), the summand but for its bias; None if there is none.
        bias: (D,), or None.
    """

    r: Tensor
    parts: Tensor | None = None
    bias: Tensor | None = None


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels of a step take tensors like this one."""
    found = capability(x.device)
    able = found is not None and found >= (8, 0) and Problem(1).has_triton
    if not able or x.dtype not in TRITON_DTYPES or torch.is_autocast_enabled("cuda"):
        return False
    from h3lm.layers.self_test import known_fault, step_fault

    if torch.cuda.is_current_stream_capturing():  # no test inside of a CUDA graph
        return known_fault(x.device, len(x)) == ""
    return not step_fault(x.device, len(x))


def can_advance(block: Any, r: Tensor) -> bool:
    """Whether `Block.advance` may take the place of the modules of a block.

    Not with gradients, nor with modules that are not plain (LoRA, quantised, with hooks).
    """
    if torch.is_grad_enabled() or block.training or not has_kernels(r):
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in block.modules()):
        return False
    mixer, norms, linears = block.mixer, [block.norm1], []
    if not all(hasattr(mixer, name) for name in ("qkv_proj", "output_proj")):
        return False
    linears += [mixer.qkv_proj, mixer.output_proj]
    if block.mlp is not None:
        if not isinstance(block.mlp, MLP) or not _has_tanh_gelu(block.mlp):
            return False
        norms.append(block.norm2)
        linears += [block.mlp.up_proj, block.mlp.down_proj]
    plain = all(is_plain(linear) and linear.weight.is_contiguous() for linear in linears)
    return plain and all(map(_is_affine, norms)) and _have_dtype(r.dtype, (*norms, *linears))


def can_multiply(linear: nn.Module, x: Tensor) -> bool:
    """Whether `product` may take the place of a linear map."""
    if torch.is_grad_enabled() or not isinstance(linear, nn.Linear) or not has_kernels(x):
        return False
    plain = is_plain(linear) and linear.weight.is_contiguous()
    return plain and _have_dtype(x.dtype, [linear])


def can_norm(norm: Any, r: Tensor) -> bool:
    """Whether `add_norm` may take the place of a norm."""
    return _is_affine(norm) and _have_dtype(r.dtype, [norm])


def _have_dtype(dtype: torch.dtype, modules: Iterable[nn.Module]) -> bool:
    return all(p.dtype == dtype for module in modules for p in module.parameters())


def _is_affine(norm: Any) -> bool:
    hooked = norm._forward_hooks or norm._forward_pre_hooks
    affine = type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None
    return affine and not hooked


def _has_tanh_gelu(mlp: MLP) -> bool:
    activation = mlp.activation
    return isinstance(activation, nn.GELU) and activation.approximate == "tanh"


def add_norm(stream: Stream, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The residual stream with its last summand, and its norm, (rows, D) each."""
    from h3lm.flashconv.kernels.overlap import can_overlap
    from h3lm.layers import step_triton

    r, parts, bias = stream
    return step_triton.add_norm(
        r, parts, bias, norm.weight, norm.bias, norm.eps, can_overlap(r.device)
    )


def product(linear: nn.Linear, x: Tensor, *, gelu: bool = False) -> Tensor:
    """A linear map of (rows, d_in), perhaps with GELU behind it."""
    y = _small_product(linear, x, gelu=gelu, in_parts=False)
    if y is not None:
        return y
    if gelu and linear.bias is not None and x.is_cuda:  # elsewhere it is the exact GELU
        return torch._addmm_activation(linear.bias, x, linear.weight.T, use_gelu=True)
    y = linear(x)
    return F.gelu(y, approximate="tanh") if gelu else y


def product_in_parts(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A linear map of (rows, d_in) in parts that are still to be added, and its bias."""
    y = _small_product(linear, x, gelu=False, in_parts=True)
    return F.linear(x, linear.weight)[None] if y is None else y, linear.bias


def _small_product(linear: nn.Linear, x: Tensor, *, gelu: bool, in_parts: bool) -> Tensor | None:
    """A product that costs as much as reading its weights; None for others."""
    from h3lm.flashconv.kernels.overlap import can_overlap
    from h3lm.layers import step_triton

    if len(x) > step_triton.MAX_ROWS or x.dtype == torch.float32:
        return None
    size = step_triton.SIZES[step_triton.product_kind(len(x), linear.weight, gelu, in_parts)]
    if size is None:
        return None
    bias = None if in_parts else linear.bias
    return step_triton.product(x, linear.weight, bias, gelu, in_parts, can_overlap(x.device), size)


def attend_step(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Causal attention of one new position of each row, by kernel; it joins the slots.

    Args:
        qkv: Projections of the position, (B, 3 heads head_dim), not rotated.
        keys, values: Slots, (B, heads, capacity, head_dim); changed in place at `lengths`.
        lengths: Positions that each row has seen, (B,), int64.
        rotation: Cosine and sine of the position, (B, 1, 1, half).

    Returns:
        (B, heads head_dim).
    """
    from h3lm.flashconv.kernels.launch import multiprocessors
    from h3lm.flashconv.kernels.overlap import can_overlap
    from h3lm.layers import step_triton

    device = qkv.device
    return step_triton.attend_step(
        qkv, keys, values, lengths, rotation, multiprocessors(device), can_overlap(device)
    )
