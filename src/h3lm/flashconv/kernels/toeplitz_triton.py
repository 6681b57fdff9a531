"""Long convolution as products with blocks of a Toeplitz matrix, in plain Triton: short filters.

Rows are cut into chunks of T positions, outputs of one channel into pieces (chunk c, row). With h
the filter of all lags, those behind and those ahead, blocks of K inputs contribute

    y_c[t] = sum_m sum_{u<K} h[m K + t - u] x[c T - m K + u]

so that a tile of pieces is one ordinary matrix product, [pieces, K] by [K, T], for each m. It takes
2 (lags + T) operations for an element where the FFT takes 8 N1 + 16 N2, but with real numbers, one
rounding, and nothing between loading and storing. The lags count, not the positions: a row of any
length with a filter of some hundred taps belongs here.

Blocks of the matrix come from a table of the filter in 8 copies, copy r shifted by r: whatever the
lag, 16 bytes of one copy are aligned, and a block loads as fast as any other matrix.

Operands are rounded to the dtype of the rows, sums are float32.

Source: Fu et al. 2023 (arXiv 2212.14052v3), section 4.1, whose block FFT this replaces there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.filters import Filter, FilterGradients
from h3lm.flashconv.kernels import toeplitz_rows
from h3lm.flashconv.kernels.lags import load_lags, parts
from h3lm.flashconv.kernels.launch import multiprocessors, strides
from h3lm.flashconv.kernels.ready import ready
from h3lm.flashconv.kernels.toeplitz_rows import store_diagonals
from h3lm.flashconv.kernels.toeplitz_size import ToeplitzSize

COPIES = 8  # values of 2 bytes in 16 bytes


@triton.jit
def load_inside(base, offsets, inside, gate, gate_offsets):
    """A tile of rows under its gate, 0 outside."""
    x = tl.load(base + offsets, inside, 0.0)
    if gate is not None:
        factor = tl.load(gate + gate_offsets, inside, 0.0)
        x = (x.to(tl.float32) * factor.to(tl.float32)).to(x.dtype)
    return x


@ready
@triton.jit(do_not_specialize=["B", "pieces", "lowest", "highest"])
def convolve_kernel(
    x, pre, y, post, other, factor, table,
    x_row, x_channel, pre_row, pre_channel, post_row, post_channel, factor_row, factor_channel,
    y_row, y_channel, B, L, tiles, pieces, lowest, highest, origin, width,
    T: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write y = post out and other = factor out, out the convolution of pre x, for a tile.

    `table` is made by `prepare`. `other` has the strides of y.
    """
    channel = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * PIECES
    piece = start + tl.arange(0, PIECES)
    chunk, row = piece // B, (piece % B).to(tl.int64)
    valid = (piece < pieces)[:, None]
    # pieces of one chunk stand together: most tiles can leave out blocks outside of the row
    first, last = start // B, tl.minimum(start + PIECES - 1, pieces - 1) // B
    lowest = tl.maximum(lowest, -((L - 1 - first * T) // K))
    highest = tl.minimum(highest, (last * T + K - 1) // K)

    u, t = tl.arange(0, K), tl.arange(0, T)
    up = (u + 7) // 8 * 8
    lags = ((up - u) * width - up)[:, None] + t[None, :]
    table += channel * (8 * width) + origin
    x += channel * x_channel
    rows = (row * x_row)[:, None]
    if pre is not None:
        pre += channel * pre_channel
    gate_rows = (row * pre_row)[:, None]
    out = tl.zeros((PIECES, T), tl.float32)
    for m in tl.range(lowest, highest + 1, num_stages=STAGES):
        position = (chunk * T - m * K)[:, None] + u[None, :]
        inside = valid & (position >= 0) & (position < L)
        value = load_inside(x, rows + position, inside, pre, gate_rows + position)
        out = tl.dot(value, tl.load(table + m * K + lags), out)

    position = (chunk * T)[:, None] + t[None, :]
    inside = valid & (position < L)
    to = (row * y_row)[:, None] + channel * y_channel + position
    if other is not None:
        at = (row * factor_row)[:, None] + channel * factor_channel + position
        value = tl.load(factor + at, inside, 0.0).to(tl.float32)
        tl.store(other + to, (out * value).to(y.dtype.element_ty), inside)
    if post is not None:
        at = (row * post_row)[:, None] + channel * post_channel + position
        out *= tl.load(post + at, inside, 0.0).to(tl.float32)
    tl.store(y + to, out.to(y.dtype.element_ty), inside)


@ready
@triton.jit(do_not_specialize=["B", "pieces", "pieces_per_program", "lowest"])
def differentiate_kernel(
    x, pre, dy, post, sums,
    x_row, x_channel, pre_row, pre_channel, dy_row, dy_channel, post_row, post_channel,
    B, D, L, pieces, pieces_per_program, lowest, blocks,
    T: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradient of h over some pieces, for the lags of one m (with K = T).

    [K, T] = sum over pieces of x (post dy)^T, then sums along its diagonals: to `sums` go lags
    m T + s and m T + s - T, s < T.
    """
    block = tl.program_id(0) % blocks
    channel = (tl.program_id(0) // blocks % D).to(tl.int64)
    group = (tl.program_id(0) // blocks // D).to(tl.int64)
    m = lowest + block
    # chunks whose inputs, m chunks before, are inside the row
    first = tl.maximum(m, 0) * B + group * pieces_per_program
    end = tl.minimum(first + pieces_per_program, tl.minimum(pieces, pieces + m * B))

    i, in_tile = tl.arange(0, T), tl.arange(0, PIECES)
    x += channel * x_channel
    dy += channel * dy_channel
    if pre is not None:
        pre += channel * pre_channel
    if post is not None:
        post += channel * post_channel
    sum_ = tl.zeros((T, T), tl.float32)
    for start in tl.range(first, end, PIECES, num_stages=STAGES):
        piece = start + in_tile
        chunk, row = piece // B, (piece % B).to(tl.int64)[:, None]
        to = (chunk * T)[:, None] + i[None, :]
        at = to - m * T
        valid = (piece < end)[:, None]
        value = load_inside(x, row * x_row + at, valid & (at < L), pre, row * pre_row + at)
        g = load_inside(dy, row * dy_row + to, valid & (to < L), post, row * post_row + to)
        sum_ = tl.dot(tl.trans(value), g, sum_)

    store_diagonals(sums + ((group * D + channel) * blocks + block) * (2 * T), sum_, T)


@ready
@triton.jit(do_not_specialize=["taps", "taps_reverse", "period"])
def table_kernel(
    f, reverse, skip, f_channel, reverse_channel, taps, taps_reverse, period,
    copies, turned, channels, width, origin, turned_origin, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write some places of all copies of a channel; of the filter turned round for second programs.

    See `Prepared`.
    """
    channel = tl.program_id(0) % channels
    copy, place = tl.arange(0, 8)[:, None], tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if turned is None:
        lag, out = place + copy - origin, copies  # the compiler knows that there is no other
    elif tl.program_id(0) < channels:
        lag, out = place + copy - origin, copies
    else:
        lag, out = turned_origin - place - copy, turned
    channel = channel.to(tl.int64)
    value = load_lags(
        f, reverse, skip, f_channel, reverse_channel, taps, taps_reverse, period,
        channel, lag, place < width,
    )  # fmt: skip
    out += channel * (8 * width) + copy * width + place
    tl.store(out, value.to(copies.dtype.element_ty), (copy >= 0) & (place < width))


@triton.jit
def sum_of_lags(sums, of_group, groups, lag, inside, lowest, blocks, T: tl.constexpr):
    """The gradient of h at some lags, from partial sums of a channel."""
    index = lag + (1 - lowest) * T  # lags from (lowest - 1) T on
    block, s = index // T, index % T
    total = tl.zeros(lag.shape, tl.float32)
    for group in range(groups):
        at = sums + group * of_group + s
        # the second half of block m lies over the first of block m - 1
        total += tl.load(at + (2 * block + 1) * T, inside & (block < blocks), 0.0)
        total += tl.load(at + (2 * block - 2) * T, inside & (block >= 1), 0.0)
    return total


@ready
@triton.jit(do_not_specialize=["taps", "taps_reverse", "period", "groups", "lowest", "blocks"])
def collect_kernel(
    sums, df, dback, dskip, taps, taps_reverse, period, channels, groups, lowest, blocks,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the parts of a filter from partial sums, some taps of a channel."""
    channel = tl.program_id(0).to(tl.int64)
    tap = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_group = (channel * 0 + channels) * blocks * (2 * T)
    sums += channel * blocks * (2 * T)
    inside = tap < taps
    total = sum_of_lags(sums, of_group, groups, tap, inside, lowest, blocks, T)
    if dskip is not None:
        tl.store(dskip + channel + tap, total.to(dskip.dtype.element_ty), inside & (tap == 0))
    around = inside & (tap > 0) & (period > 0)
    total += sum_of_lags(sums, of_group, groups, tap - period, around, lowest, blocks, T)
    tl.store(df + channel * taps + tap, total.to(df.dtype.element_ty), inside)
    if dback is not None:
        inside = tap < taps_reverse
        total = sum_of_lags(sums, of_group, groups, -tap, inside, lowest, blocks, T)
        around = inside & (tap > 0) & (period > 0)
        total += sum_of_lags(sums, of_group, groups, period - tap, around, lowest, blocks, T)
        tl.store(dback + channel * taps_reverse + tap, total.to(dback.dtype.element_ty), inside)


class Prepared(NamedTuple):
    """A filter of all lags in 8 shifted copies between zeros.

    Attributes:
        copies: (D, 8, width), dtype of the rows; copy r holds lag l at `size.origin` + l - r.
        turned: The same of the filter turned round, for `size.reversed()`; None if not wanted.
    """

    copies: Tensor
    turned: Tensor | None = None


def prepare(u: Tensor, filter: Filter, size: ToeplitzSize, backward: bool = False) -> Prepared:
    """The table of a filter, for rows like u; for their gradients also the one turned round."""
    K, D = size.tile.K, len(filter.f)
    lowest, highest = size.blocks(K)
    width = K * (highest - lowest + 1) + size.tile.T  # both ways: T is a multiple of K
    copies = u.new_empty((D, COPIES, width))
    turned = torch.empty_like(copies) if backward else None
    table_kernel[(D * (1 + backward), -(-width // 128))](
        *parts(filter), copies, turned, D, width, size.origin, size.reversed().origin, BLOCK=128
    )
    return Prepared(copies, turned)


def forward(
    u: Tensor, table: Prepared, size: ToeplitzSize, pre: Tensor | None, post: Tensor | None
) -> Tensor:
    """Convolve rows; positions are contiguous."""
    if toeplitz_rows.takes(u, size, pre, post):
        return toeplitz_rows.forward(u, table.copies, size)
    return _convolve(u, table.copies, size, pre, post, None)[0]


def backward(
    dy: Tensor,
    u: Tensor,
    table: Prepared,
    size: ToeplitzSize,
    pre: Tensor | None,
    post: Tensor | None,
    *,
    data: bool,
    filters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of rows and first gate (`data`), partial sums for the filter's (`filters`)."""
    du, dpre = None, None
    if data and filters and toeplitz_rows.takes(u, size, pre, post):
        assert table.turned is not None
        du, sums = toeplitz_rows.backward(dy, u, table.turned, size)
        return du, None, sums
    if data:
        assert table.turned is not None
        other = None if pre is None else u
        du, dpre = _convolve(dy, table.turned, size.reversed(), post, pre, other)
    return du, dpre, _differentiate(u, pre, dy, post, size) if filters else None


def filter_gradients(
    u: Tensor, sums: Tensor, filter: Filter, size: ToeplitzSize
) -> FilterGradients:
    """Gradients of the parts of a filter from partial sums."""
    made = filter.empty_gradients()
    groups, D, blocks = sums.shape[:3]
    taps_reverse = 0 if made.f_reverse is None else made.f_reverse.shape[1]
    most = max(made.f.shape[1], taps_reverse)
    collect_kernel[(D, -(-most // 256))](
        sums, *made, made.f.shape[1], taps_reverse, filter.period, D, groups,
        _lowest_and_highest(u, size)[0], blocks, T=size.tile.T, BLOCK=256, num_warps=2,
    )  # fmt: skip
    return made


def _convolve(
    x: Tensor,
    table: Tensor,
    size: ToeplitzSize,
    pre: Tensor | None,
    post: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The convolution of pre x, times post; and times `factor` if there is one."""
    B, D, L = x.shape
    tile = size.tile
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    other = None if factor is None else torch.empty_like(y)
    pieces = B * -(-L // tile.T)
    of_a_tile = min(tile.pieces, max(16, 1 << (pieces - 1).bit_length()))
    tiles = -(-pieces // of_a_tile)
    lowest, highest = size.blocks(tile.K)
    convolve_kernel[(D * tiles,)](
        x, pre, y, post, other, factor, table,
        *strides(x), *strides(pre), *strides(post), *strides(factor), *strides(y),
        B, L, tiles, pieces, lowest, highest, size.origin, table.shape[-1],
        T=tile.T, K=tile.K, PIECES=of_a_tile, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return y, other


def _differentiate(
    x: Tensor, pre: Tensor | None, dy: Tensor, post: Tensor | None, size: ToeplitzSize
) -> Tensor:
    """Partial sums of the gradient of h, (groups, D, blocks, 2, T), float32."""
    B, D, L = x.shape
    T, in_tile = size.tile.T, size.tile.filter_pieces
    chunks = -(-L // T)
    lowest, highest = _lowest_and_highest(x, size)
    blocks = highest - lowest + 1
    tiles = -(-B * chunks // in_tile)
    groups = min(tiles, -(-2 * multiprocessors(x.device) // (D * blocks)))
    tiles_per_program = -(-tiles // groups)
    groups = -(-tiles // tiles_per_program)
    sums = x.new_empty((groups, D, blocks, 2, T), dtype=torch.float32)
    differentiate_kernel[(groups * D * blocks,)](
        x, pre, dy, post, sums, *strides(x), *strides(pre), *strides(dy), *strides(post),
        B, D, L, B * chunks, tiles_per_program * in_tile, lowest, blocks,
        T=T, PIECES=in_tile, STAGES=size.tile.stages, num_warps=size.tile.warps,
    )  # fmt: skip
    return sums


def _lowest_and_highest(x: Tensor, size: ToeplitzSize) -> tuple[int, int]:
    """The first and the last m of the filter's gradient: chunks apart that rows like x have."""
    apart = -(-x.shape[-1] // size.tile.T) - 1
    lowest, highest = size.blocks(size.tile.T)
    return max(-apart, min(apart, lowest)), max(-apart, min(apart, highest))
