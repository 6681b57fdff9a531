"""Gradient of a skip, summed as plain PyTorch sums it: dskip = sum of (pre u)(post dy).

It is also the gradient of a filter's tap 0, as the kernels of long convolution make it. But as one
number of a transform it has the error of all, and a sum by itself is three times as right: what
float16 and float32 are held to. Sums are compensated (Kahan), so that neither rows nor their length
count.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.kernels.launch import strides

TILE = 4096


@triton.jit
def load_product(x, factor, at, factor_at, inside):
    """A tile under its gate, float32."""
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if factor is not None:
        value *= tl.load(factor + factor_at, inside, 0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["B"])
def skip_gradient_kernel(
    u, pre, dy, post, dskip,
    u_row, u_channel, pre_row, pre_channel, dy_row, dy_channel, post_row, post_channel,
    B, L, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum one channel: tiles of some rows and COLUMNS positions."""
    channel = tl.program_id(0).to(tl.int64)
    in_tile = tl.arange(0, TILE)
    blocks = tl.cdiv(L, COLUMNS)
    total = tl.zeros((TILE,), tl.float32)
    lost = tl.zeros((TILE,), tl.float32)
    for i in range(tl.cdiv(B, TILE // COLUMNS) * blocks):
        row = (i // blocks * (TILE // COLUMNS) + in_tile // COLUMNS).to(tl.int64)
        at = i % blocks * COLUMNS + in_tile % COLUMNS
        inside = (row < B) & (at < L)
        x = load_product(
            u, pre, row * u_row + channel * u_channel + at,
            row * pre_row + channel * pre_channel + at, inside,
        )  # fmt: skip
        g = load_product(
            dy, post, row * dy_row + channel * dy_channel + at,
            row * post_row + channel * post_channel + at, inside,
        )  # fmt: skip
        value = x * g - lost
        more = total + value
        lost = (more - total) - value
        total = more
    every = tl.sum(total.to(tl.float64) - lost.to(tl.float64), 0)
    tl.store(dskip + channel, every.to(dskip.dtype.element_ty))


def skip_gradient(
    dy: Tensor, u: Tensor, skip: Tensor, pre: Tensor | None, post: Tensor | None
) -> Tensor:
    """The gradient of a skip, in its dtype; positions are contiguous."""
    B, D, L = u.shape
    dskip = torch.empty_like(skip, memory_format=torch.contiguous_format)
    skip_gradient_kernel[(D,)](
        u, pre, dy, post, dskip, *strides(u), *strides(pre), *strides(dy), *strides(post), B, L,
        TILE=TILE, COLUMNS=min(TILE, triton.next_power_of_2(L)), num_warps=8,
    )  # fmt: skip
    return dskip
