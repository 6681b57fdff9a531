"""One position of a whole batch: attention against slots, and the block around any mixer.

By kernels, without gradients; `has_kernels` says whether they are here.
"""

import torch
from torch import Tensor, nn

from h3lm.flashconv.dispatch import TRITON_DTYPES, Problem, capability
from h3lm.layers.mlp import MLP
from h3lm.layers.projection import is_plain


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels of a step take tensors like this one."""
    found = capability(x.device)
    able = found is not None and found >= (8, 0) and Problem(1).has_triton
    return able and x.dtype in TRITON_DTYPES and not torch.is_autocast_enabled("cuda")


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
    from h3lm.layers import step_triton

    programs = step_triton.PROGRAMS_PER_SM * multiprocessors(qkv.device)
    return step_triton.attend_step(qkv, keys, values, lengths, rotation, programs)


def finish_step(r: Tensor, mixed: Tensor, norm: nn.LayerNorm, mlp: nn.Module) -> Tensor | None:
    """What follows the mixer of a block, for one position (B, 1, D), in three launches and one.

    The sum of the residual stream and the norm are one kernel, which also adds the last bias of
    the MLP, so that its product can be added in place; the first product has GELU in its epilogue.

    Returns:
        The residual stream, or None where this is not the thing to do: with gradients, with
        modules that are not plain (LoRA, hooks), or without kernels.
    """
    if torch.is_grad_enabled() or norm.training or not isinstance(mlp, MLP):
        return None
    up, down = mlp.up_proj, mlp.down_proj
    dtypes = {r.dtype, mixed.dtype, up.weight.dtype, down.weight.dtype, norm.weight.dtype}
    if not (has_kernels(r) and len(dtypes) == 1 and is_plain(up) and is_plain(down)):
        return None
    if up.bias is None or norm.weight is None or norm.bias is None or not tanh_gelu(mlp):
        return None
    from h3lm.layers.step_triton import add_norm

    rows = r.flatten(0, 1).contiguous(), mixed.flatten(0, 1).contiguous()
    summed, normed = add_norm(*rows, norm.weight, norm.bias, norm.eps, down.bias)
    hidden = torch._addmm_activation(up.bias, normed, up.weight.T, use_gelu=True)
    return summed.addmm_(hidden, down.weight.T).view_as(r)


def tanh_gelu(mlp: MLP) -> bool:
    """Whether the activation is the one that cuBLAS has."""
    activation = mlp.activation
    return isinstance(activation, nn.GELU) and activation.approximate == "tanh"
