"""Toeplitz blocks for rows of two chunks: both blocks of the matrix stay, and rows stream by.

A causal filter moves chunk 0 to chunks 0 and 1, and chunk 1 to itself: with N and M the blocks of
lags t - u and T + t - u,

    y_0 = x_0 N,   y_1 = x_1 N + x_0 M

so a program that has loaded both reads each row once. Backward, with the blocks N' and M' of the
filter turned round, which are those of lags t - u and t - u - T there,

    dx_0 = g_0 N' + g_1 M',   dx_1 = g_1 N',   dN = x_0^T g_0 + x_1^T g_1,   dM = x_0^T g_1

from one reading of x and g. Without gates: their products would need the room of another tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.kernels.launch import multiprocessors, strides
from h3lm.flashconv.kernels.toeplitz_size import ToeplitzSize


class Launch(NamedTuple):
    """Rows of a tile, tiles in flight, and warps of a program."""

    rows: int
    stages: int
    warps: int


# measured on an H200, see docs/log.md
FORWARD, BACKWARD = Launch(64, 1, 4), Launch(64, 2, 8)
MIN_ROWS = 64  # of a batch: fewer would leave most of a tile empty


@triton.jit
def toeplitz_block(table, place, width, T: tl.constexpr):
    """The block [u, t] of lags t - u + l of a channel, l at `place` in the table's first copy."""
    u, t = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    up = (u + 7) // 8 * 8
    at = place - up + t
    return tl.load(table + (up - u) * width + at, (at >= 0) & (at < width), 0.0)


@triton.jit
def store_diagonals(sums, sum_, T: tl.constexpr):
    """Sums along the diagonals of [u, t]: those of t - u = s, then of s - T, s < T."""
    i = tl.arange(0, T)
    turned = (i[:, None] + i[None, :]) % T
    diagonals = tl.gather(sum_, turned, 1)  # [u, s]: what stands at t = (u + s) mod T
    upper = i[:, None] + i[None, :] < T
    tl.store(sums + i, tl.sum(tl.where(upper, diagonals, 0.0), 0))
    tl.store(sums + T + i, tl.sum(tl.where(upper, 0.0, diagonals), 0))


@triton.jit(do_not_specialize=["B", "rows_per_program", "origin", "width"])
def forward_kernel(
    x, y, table, x_row, x_channel, y_row, y_channel, B, channels, L, rows_per_program,
    origin, width, T: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Convolve one channel of some rows."""
    channel = (tl.program_id(0) % channels).to(tl.int64)
    first = tl.program_id(0) // channels * rows_per_program
    last = tl.minimum(first + rows_per_program, B)
    table += channel * (8 * width)
    now = toeplitz_block(table, origin, width, T)
    behind = toeplitz_block(table, origin + T, width, T)
    t = tl.arange(0, T)[None, :]
    x += channel * x_channel
    y += channel * y_channel
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        valid, later = row < last, (row < last) & (t + T < L)
        at, to = row.to(tl.int64) * x_row + t, row.to(tl.int64) * y_row + t
        x_0 = tl.load(x + at, valid & (t < L), 0.0)
        x_1 = tl.load(x + at + T, later, 0.0)
        out = tl.dot(x_0, now)
        tl.store(y + to, out.to(y.dtype.element_ty), valid & (t < L))
        out = tl.dot(x_0, behind)
        out = tl.dot(x_1, now, out)
        tl.store(y + to + T, out.to(y.dtype.element_ty), later)


@triton.jit(do_not_specialize=["B", "rows_per_program", "origin", "width"])
def backward_kernel(
    dy, x, dx, sums, table, dy_row, dy_channel, x_row, x_channel, dx_row, dx_channel,
    B, channels, L, rows_per_program, origin, width,
    T: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows, and partial sums of that of the filter as `store_diagonals` writes."""
    channel = (tl.program_id(0) % channels).to(tl.int64)
    group = tl.program_id(0) // channels
    first = group * rows_per_program
    last = tl.minimum(first + rows_per_program, B)
    table += channel * (8 * width)
    now = toeplitz_block(table, origin, width, T)
    ahead = toeplitz_block(table, origin - T, width, T)
    t = tl.arange(0, T)[None, :]
    x += channel * x_channel
    dy += channel * dy_channel
    dx += channel * dx_channel
    sum_now = tl.zeros((T, T), tl.float32)
    sum_behind = tl.zeros((T, T), tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        valid, later = row < last, (row < last) & (t + T < L)
        wide = row.to(tl.int64)
        g_0 = tl.load(dy + wide * dy_row + t, valid & (t < L), 0.0)
        g_1 = tl.load(dy + wide * dy_row + t + T, later, 0.0)
        x_0 = tl.load(x + wide * x_row + t, valid & (t < L), 0.0)
        x_1 = tl.load(x + wide * x_row + t + T, later, 0.0)
        sum_now = tl.dot(tl.trans(x_0), g_0, sum_now)
        sum_now = tl.dot(tl.trans(x_1), g_1, sum_now)
        sum_behind = tl.dot(tl.trans(x_0), g_1, sum_behind)
        to = dx + wide * dx_row + t
        out = tl.dot(g_0, now)
        out = tl.dot(g_1, ahead, out)
        tl.store(to, out.to(dx.dtype.element_ty), valid & (t < L))
        out = tl.dot(g_1, now)
        tl.store(to + T, out.to(dx.dtype.element_ty), later)
    sums += (group * channels + channel) * (4 * T)
    store_diagonals(sums, sum_now, T)
    store_diagonals(sums + 2 * T, sum_behind, T)


def takes(x: Tensor, size: ToeplitzSize, pre: Tensor | None, post: Tensor | None) -> bool:
    """Whether rows like x are for these kernels."""
    B, _, L = x.shape
    plain = size.ahead == 0 and pre is None and post is None
    return plain and size.tile.resident and B >= MIN_ROWS and size.tile.T < L <= 2 * size.tile.T


def forward(x: Tensor, table: Tensor, size: ToeplitzSize) -> Tensor:
    """Convolve rows, as `toeplitz_triton.forward`."""
    B, D, L = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    each, groups = _rows_per_program(x, FORWARD.rows)
    forward_kernel[(D * groups,)](
        x, y, table, *strides(x), *strides(y), B, D, L, each, size.origin, table.shape[-1],
        T=size.tile.T, ROWS=FORWARD.rows, STAGES=FORWARD.stages, num_warps=FORWARD.warps,
    )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, turned: Tensor, size: ToeplitzSize) -> tuple[Tensor, Tensor]:
    """Gradient of rows, and partial sums (groups, D, 2, 2, T) as `toeplitz_triton` makes them."""
    B, D, L = x.shape
    T = size.tile.T
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    each, groups = _rows_per_program(x, BACKWARD.rows)
    sums = x.new_empty((groups, D, 2, 2, T), dtype=torch.float32)
    backward_kernel[(D * groups,)](
        dy, x, dx, sums, turned, *strides(dy), *strides(x), *strides(dx), B, D, L, each,
        size.reversed.origin, turned.shape[-1], T=T,
        ROWS=BACKWARD.rows, STAGES=BACKWARD.stages, num_warps=BACKWARD.warps,
    )  # fmt: skip
    return dx, sums


def _rows_per_program(x: Tensor, tile: int) -> tuple[int, int]:
    """Rows that a program takes, whole tiles, and programs of a channel: as few as fill the GPU."""
    tiles = -(-x.shape[0] // tile)
    groups = min(tiles, -(-multiprocessors(x.device) // x.shape[1]))
    each = -(-tiles // groups)
    return each * tile, -(-tiles // each)
