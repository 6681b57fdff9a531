"""Rows longer than a program holds: one more factor of the transform, through device memory.

A real row of n = N0 m points, l = m l0 + i, becomes N0 complex rows of m points

    Z_k0[i] = exp(-2 pi i (k0 - 1/4) i / n) sum_l0 W_N0[k0, l0] x[m l0 + i]

with W_N0 at frequencies k0 - 1/4, as in `fft_triton`, kept as two planes of float16. Each of them
`fft_triton` convolves in place with frequencies k0 + N0 k of the filter; the same step backwards
gives the row. So a forward pass moves 22 bytes for each element: 2 to find the scale of a row,
2 + 4 out, 4 + 4 in place, 4 + 2 back, at any length. Half dtypes only: rows of float16, whose
products are of pairs (`fft_triton`), have planes of float32, and move 38 bytes.

A filter takes the same way, float32 into it and out of it. One that reaches ahead, too, has that as
its imaginary part, see `fft_filter.imaginary_row`.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.dispatch import MAX_LONG_LENGTH, MAX_LONG_LENGTH_SMALL
from h3lm.flashconv.filters import Filter, FilterGradients
from h3lm.flashconv.kernels import fft_triton
from h3lm.flashconv.kernels.fft_filter import (
    Prepared,
    imaginary_row,
    reverse_gradient,
    transform_planes,
)
from h3lm.flashconv.kernels.fft_launch import rows_per_program
from h3lm.flashconv.kernels.fft_size import (
    SHIFT,
    Precision,
    Size,
    as_operands,
    factors,
    unitary_dft,
)
from h3lm.flashconv.kernels.fft_triton import (
    as_loaded,
    cosine_and_sine,
    exponent_of,
    operand,
    power_of_two,
    product,
    to_unit,
)
from h3lm.flashconv.kernels.launch import strides

MIN_OUTER = 16  # the matrix units' smallest edge


@dataclass(frozen=True)
class LongSize:
    """Factors of a transform of n = outer x inner points.

    Attributes:
        outer: N0, of the factor through device memory.
        inner: Size of the transforms of what is left.
        columns: Points of an inner transform that a program of the outer factor takes; blocks of
            so many, where that has fewer rows than the matrix units need.
        warps: Warps of such a program.
        rows_out: Most rows of the outer factor that it makes on the way to the spectrum.
        rows_in: The same on the way back, where each program makes all turns anew.
        stages: Tiles of the outer factor in flight, where it is longer than a tile.
    """

    outer: int
    inner: Size
    columns: int = 64
    warps: int = 4
    rows_out: int = 64
    rows_in: int = 64
    stages: int = 3

    @property
    def points(self) -> int:
        """n, the longest row."""
        return self.outer * self.inner.points


# the inner transform by the largest n that it is used for, with much shared memory and with 99 KB;
# measured on an H200, see docs/log.md
INNER = {1 << 16: Size(64, 32, 4), MAX_LONG_LENGTH: Size(64, 64, 4)}
SMALL_INNER = {MAX_LONG_LENGTH_SMALL: Size(64, 16, 4)}
INNER_OF_PAIRS = {
    1 << 18: Size(64, 32, 4, precision="pairs"),
    MAX_LONG_LENGTH: Size(64, 64, 4, precision="pairs", apart=True),
}
SMALL_INNER_OF_PAIRS = {MAX_LONG_LENGTH_SMALL: Size(32, 16, 2, precision="pairs")}


def size_for(length: int, large: bool, precision: Precision) -> LongSize:
    """Factors for rows of a length, on a GPU with as much shared memory as Hopper or with less.

    Raises:
        ValueError: if the row is too long, or for "tf32x3".
    """
    if precision == "tf32x3":
        raise ValueError("rows of float32 do not go through memory")
    inners = INNER if large else SMALL_INNER
    if precision == "pairs":
        inners = INNER_OF_PAIRS if large else SMALL_INNER_OF_PAIRS
    points = 1 << (length - 1).bit_length()
    for most, inner in inners.items():
        if points <= most:
            outer = max(points // inner.points, 2)
            columns = 128 if large and outer <= 16 else 64
            # tiles of pairs are twice as large
            return LongSize(outer, inner, columns, stages=2 if precision == "pairs" else 3)
    raise ValueError(f"rows of {length} are over what the block FFT was made for")


@triton.jit
def largest_kernel(
    x, gate, exponents, sums, x_row, x_channel, gate_row, gate_channel, D, L, BLOCK: tl.constexpr
):  # fmt: skip
    """Biased exponent of the largest magnitude of each row, under its gate; their sum if wanted."""
    row, channel = (tl.program_id(0) // D).to(tl.int64), (tl.program_id(0) % D).to(tl.int64)
    x += row * x_row + channel * x_channel
    if gate is not None:
        gate += row * gate_row + channel * gate_channel
    largest = tl.zeros((1, BLOCK), tl.float32)
    total = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, L, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        value = tl.load(x + at, at < L, 0.0).to(tl.float32)
        if gate is not None:
            value *= tl.load(gate + at, at < L, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        total += tl.abs(value)
    tl.store(exponents + tl.program_id(0), exponent_of(largest))
    if sums is not None:
        tl.store(sums + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def outer_turns(k0, column, points, FAST: tl.constexpr):
    """Cosine and sine of 2 pi (k0 - 1/4) column / n."""
    k = (k0.to(tl.float32) - 0.25)[:, None]
    return cosine_and_sine(k, column.to(tl.float32), points, FAST)


@triton.jit
def add_product(
    sum_, a, a_low, b, b_low, PRECISION: tl.constexpr, WHOLE: tl.constexpr = False
):  # fmt: skip
    """sum_ + a b. Of pairs the sum is rounded, not truncated as in the matrix units."""
    if PRECISION == "pairs":
        return sum_ + product(a, a_low, b, b_low, PRECISION, WHOLE)
    else:
        return tl.dot(a, b, sum_)


@triton.jit
def load_outer(table, at, K: tl.constexpr, PRECISION: tl.constexpr):
    """Tiles of both parts of W_N0, each followed by the second half of pairs; else by itself."""
    re, im = tl.load(table + at), tl.load(table + K * K + at)
    if PRECISION == "pairs":
        return re, tl.load(table + 2 * K * K + at), im, tl.load(table + 3 * K * K + at)
    else:
        return re, re, im, im


@triton.jit
def program_tile(tiles, inner, D, COLUMNS: tl.constexpr):
    """Tile, column block, channel and row of a program; tiles that read the same come together."""
    i = tl.program_id(0)
    blocks = inner // COLUMNS
    channel = i // tiles // blocks % D
    row = i // tiles // blocks // D
    return i % tiles, i // tiles % blocks, channel.to(tl.int64), row.to(tl.int64)


@triton.jit
def in_table(index, block, N0: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """What an index of the outer factor's table stands for: one of N0, and columns, [.., COLUMNS].

    A table has at least K = 16 rows; if N0 is less, they are those of several blocks of columns.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    if K == N0:
        return index, block * COLUMNS + column
    else:
        of_index = (block * (K // N0) + index // N0) * COLUMNS
        return index % N0, of_index[:, None] + column


@triton.jit
def outward_kernel(
    x, gate, imaginary, exponents, planes, table,
    x_row, x_channel, gate_row, gate_channel, imaginary_row, imaginary_channel,
    D, L, inner, points,
    N0: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From rows to the planes of N0 complex rows; TILE of them and some columns here.

    `imaginary` makes rows complex: it reaches over all points, and has no gate.
    """
    tile, block, channel, row = program_tile(K // TILE, inner, D, COLUMNS * (K // N0))
    out_index = tile * TILE + tl.arange(0, TILE)
    x += row * x_row + channel * x_channel
    if gate is not None:
        gate += row * gate_row + channel * gate_channel
    if imaginary is not None:
        imaginary += row * imaginary_row + channel * imaginary_channel
    scale = to_unit(tl.load(exponents + row * D + channel))
    re = tl.zeros((TILE, COLUMNS), tl.float32)
    im = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        index = start + tl.arange(0, DEPTH)
        l0, column = in_table(index, block, N0, K, COLUMNS)
        position = l0[:, None] * inner + column
        value = tl.load(x + position, position < L, 0.0).to(tl.float32)
        if gate is not None:
            value *= tl.load(gate + position, position < L, 0.0).to(tl.float32)
        W_re, W_re_low, W_im, W_im_low = load_outer(
            table, out_index[:, None] * K + index[None, :], K, PRECISION
        )
        value = as_loaded(value * scale, x, gate, W_re)
        WHOLE: tl.constexpr = value.dtype == W_re.dtype
        value, value_low = operand(value, W_re, PRECISION)
        re = add_product(re, W_re, W_re_low, value, value_low, PRECISION, WHOLE)
        im = add_product(im, W_im, W_im_low, value, value_low, PRECISION, WHOLE)
        if imaginary is not None:
            value = tl.load(imaginary + position) * scale
            ahead, ahead_low = operand(value, W_re, PRECISION)
            im = add_product(im, W_re, W_re_low, ahead, ahead_low, PRECISION)
            re = add_product(re, W_im, W_im_low, -ahead, -ahead_low, PRECISION)
    k0, column = in_table(out_index, block, N0, K, COLUMNS)
    cos, sin = outer_turns(k0, column, points, FAST)
    out = planes + ((row * D + channel) * N0 + k0)[:, None] * (2 * inner) + column
    tl.store(out, (re * cos + im * sin).to(planes.dtype.element_ty))
    tl.store(out + inner, (im * cos - re * sin).to(planes.dtype.element_ty))


@triton.jit
def inward_kernel(
    planes, plane_exponents, y, gate, other, factor_of_other, exponents, unscale, table,
    y_row, y_channel, gate_row, gate_channel, other_row, other_channel,
    D, L, inner, points,
    N0: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr, IMAGINARY: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of `outward_kernel`, then y = gate out, and other = factor_of_other out.

    Either all planes of a row have one scale (`exponents`), or each its own (`plane_exponents`).
    IMAGINARY: the imaginary part of the rows, not the real one. `other` has the strides of y, its
    factor has its own.
    """
    tile, block, channel, row = program_tile(K // TILE, inner, D, COLUMNS * (K // N0))
    out_index = tile * TILE + tl.arange(0, TILE)
    first = (row * D + channel) * N0
    if plane_exponents is None:
        exponent = tl.load(exponents + row * D + channel)
    else:
        exponent = tl.max(tl.load(plane_exponents + first + tl.arange(0, N0)), 0)
    out = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        index = start + tl.arange(0, DEPTH)
        k0, column = in_table(index, block, N0, K, COLUMNS)
        at = planes + (first + k0)[:, None] * (2 * inner) + column
        re = tl.load(at).to(tl.float32)
        im = tl.load(at + inner).to(tl.float32)
        if plane_exponents is not None:
            own = tl.load(plane_exponents + first + k0)
            weight = power_of_two(tl.maximum(127 + own - exponent, 0))[:, None]
            re, im = re * weight, im * weight
        if IMAGINARY:
            re, im = im, -re
        cos, sin = outer_turns(k0, column, points, FAST)
        W_re, W_re_low, W_im, W_im_low = load_outer(
            table, index[None, :] * K + out_index[:, None], K, PRECISION
        )
        back, back_low = operand(re * cos - im * sin, W_re, PRECISION)
        out = add_product(out, W_re, W_re_low, back, back_low, PRECISION)
        back, back_low = operand(re * sin + im * cos, W_re, PRECISION)
        out = add_product(out, W_im, W_im_low, back, back_low, PRECISION)
    l0, column = in_table(out_index, block, N0, K, COLUMNS)
    position = l0[:, None] * inner + column
    inside = position < L
    out *= tl.load(unscale + channel * N0) * power_of_two(exponent)
    offsets = row * y_row + channel * y_channel + position
    if other is not None:
        factor_of_other += row * other_row + channel * other_channel
        value = tl.load(factor_of_other + position, inside, 0.0).to(tl.float32)
        tl.store(other + offsets, (out * value).to(y.dtype.element_ty), inside)
    if gate is not None:
        gate += row * gate_row + channel * gate_channel
        out *= tl.load(gate + position, inside, 0.0).to(tl.float32)
    tl.store(y + offsets, out.to(y.dtype.element_ty), inside)


@cache
def outer_factors(outer: int, device: torch.device, precision: Precision) -> Tensor:
    """W_N0 at frequencies k0 - 1/4 as (part, k0, l0), by `as_operands`; made in float64.

    Up to an edge of 16 it is repeated along the diagonal, for as many blocks of columns.
    """
    blocks = max(1, MIN_OUTER // outer)
    W = torch.block_diag(*[unitary_dft(outer, SHIFT)] * blocks)
    return as_operands(torch.stack([W.real, W.imag]), precision).to(device)


class FilterPlanes(NamedTuple):
    """Partial sums of the filter's gradient, before the outer factor.

    Attributes:
        planes: Of complex rows, (groups, D, N0, 2, m).
        exponents: Of their scales, (groups, D, N0).
    """

    planes: Tensor
    exponents: Tensor


def forward(
    u: Tensor, spectrum: Prepared, size: LongSize, pre: Tensor | None, post: Tensor | None
) -> Tensor:
    """Convolve rows of up to the size's points; positions are contiguous."""
    run = LongRun(u, size)
    exponents = run.exponents(u, pre)
    planes = run.outward(u, pre, exponents)
    run.convolve(planes, spectrum)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    run.inward(planes, y, spectrum.unscale, exponents=exponents, gate=post)
    return y


def backward(
    dy: Tensor,
    u: Tensor,
    spectrum: Prepared,
    size: LongSize,
    pre: Tensor | None,
    post: Tensor | None,
    *,
    data: bool,
    filters: bool,
) -> tuple[Tensor | None, Tensor | None, FilterPlanes | None]:
    """As `fft_launch.backward`, for long rows."""
    run = LongRun(u, size)
    g_exponents = run.exponents(dy, post)
    g_planes, made = run.outward(dy, post, g_exponents), None
    if filters:
        x_exponents = run.exponents(u, pre)
        x_planes = run.outward(u, pre, x_exponents)
        made = run.filter_planes(g_planes, x_planes, g_exponents, x_exponents, spectrum)
        del x_planes
    if not data:
        return None, None, made
    run.convolve(g_planes, spectrum, conjugate=True)
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    dpre = None if pre is None else torch.empty_like(du)
    run.inward(g_planes, du, spectrum.unscale, exponents=g_exponents, gate=pre, other=dpre, by=u)
    return du, dpre, made


def prepare(u: Tensor, filter: Filter, size: LongSize, backward: bool = False) -> Prepared:
    """The filter's spectrum, for rows like u and their gradients."""
    f, f_reverse = filter.folded()
    rows, ahead = f[None], None
    if f_reverse is not None:
        rows = torch.cat([f[:, :1] + f_reverse[:, :1], f[:, 1:]], 1)[None]
        ahead = imaginary_row(f_reverse, size.points)[None]
    run = LongRun(rows, size)
    sums = torch.empty(rows.shape[:2], device=f.device)
    exponents = run.exponents(rows, None, sums)
    if ahead is not None:
        more = torch.empty_like(sums)
        exponents = torch.maximum(exponents, run.exponents(ahead, None, more))
        sums += more
    planes = run.outward(rows, None, exponents, ahead)
    return transform_planes(planes, size.inner, run.tables, exponents, sums)


def filter_gradients(
    u: Tensor, made: FilterPlanes, filter: Filter, size: LongSize
) -> FilterGradients:
    """Gradients of the parts of a filter from partial sums."""
    groups, D = made.exponents.shape[:2]

    def part(length: int, imaginary: bool) -> Tensor:
        df = torch.empty((groups, D, length), device=u.device)
        root = df.new_full((D * size.outer,), math.sqrt(size.points))
        run = LongRun(df, size)
        run.inward(made.planes, df, root, plane_exponents=made.exponents, imaginary=imaginary)
        return df[0] if groups == 1 else df.sum(0)

    df, dback = part(filter.taps, False), None
    if filter.taps_reverse is not None:
        dback = reverse_gradient(df, part(size.points, True), filter.taps_reverse)
    return filter.gradients(df, dback)


class LongRun:
    """What the launches for one tensor have in common."""

    def __init__(self, u: Tensor, size: LongSize) -> None:
        self.B, self.D, self.L = u.shape
        self.size, self.device = size, u.device
        precision = size.inner.precision
        self.table = outer_factors(size.outer, u.device, precision)
        self.planes = torch.float16 if precision == "half" else torch.float32
        K = self.table.shape[-1]
        self.rows_out, self.rows_in = min(size.rows_out, K), min(size.rows_in, K)
        self.outer: dict[str, Any] = {
            "N0": size.outer, "K": K, "DEPTH": min(64, K), "COLUMNS": size.columns,
            "FAST": size.inner.fast(u), "PRECISION": precision, "num_warps": size.warps,
            "num_stages": size.stages,
        }  # fmt: skip
        self.inner: dict[str, Any] = {
            "N1": size.inner.N1, "N2": size.inner.N2, "REAL": False,
            "SCALED": False, "EVEN": True, "FAST": size.inner.fast(u), "PRECISION": precision,
            "APART": size.inner.apart,
            "KEEP": size.inner.keep and precision == "half", "AHEAD": size.inner.ahead,
            "num_warps": size.inner.warps, "maxnreg": size.inner.registers,
        }  # fmt: skip
        self.columns = self.B * self.D * (size.inner.points * size.outer // (size.columns * K))
        self.channels = self.D * size.outer
        self.rows_per_program, self.groups = rows_per_program(
            u.device, size.inner, self.B, self.channels
        )
        self.tables = factors(size.inner, u.device, False)

    def exponents(self, x: Tensor, gate: Tensor | None, sums: Tensor | None = None) -> Tensor:
        """Exponents of the scales of rows, (B, D); sums of magnitudes if wanted."""
        exponents = torch.empty((self.B, self.D), dtype=torch.int32, device=self.device)
        largest_kernel[(self.B * self.D,)](
            x, gate, exponents, sums, *strides(x), *strides(gate), self.D, x.shape[2],
            BLOCK=4096, num_warps=8,
        )  # fmt: skip
        return exponents

    def outward(
        self, x: Tensor, gate: Tensor | None, exponents: Tensor, imaginary: Tensor | None = None
    ) -> Tensor:
        """The planes of N0 complex rows for each row, (B, D, N0, 2, m)."""
        shape = (self.B, self.D, self.size.outer, 2, self.size.inner.points)
        planes = torch.empty(shape, dtype=self.planes, device=self.device)
        outward_kernel[(self.columns * (self.table.shape[-1] // self.rows_out),)](
            x, gate, imaginary, exponents, planes, self.table,
            *strides(x), *strides(gate), *strides(imaginary),
            self.D, self.L, self.size.inner.points, float(self.size.points),
            TILE=self.rows_out, **self.outer,
        )  # fmt: skip
        return planes

    def inward(
        self,
        planes: Tensor,
        y: Tensor,
        unscale: Tensor,
        *,
        exponents: Tensor | None = None,
        plane_exponents: Tensor | None = None,
        gate: Tensor | None = None,
        other: Tensor | None = None,
        by: Tensor | None = None,
        imaginary: bool = False,
    ) -> None:
        """Rows y = gate out, and other = by out if wanted, from planes."""
        inward_kernel[(self.columns * (self.table.shape[-1] // self.rows_in),)](
            planes, plane_exponents, y, gate, other, by, exponents, unscale, self.table,
            *strides(y), *strides(gate), *strides(by),
            self.D, self.L, self.size.inner.points, float(self.size.points),
            TILE=self.rows_in, IMAGINARY=imaginary, **self.outer,
        )  # fmt: skip

    def convolve(self, planes: Tensor, spectrum: Prepared, conjugate: bool = False) -> None:
        """Convolve all complex rows, or with the reversed filter, in place."""
        row, each = planes.stride(0), 2 * self.size.inner.points
        fft_triton.forward_kernel[(self.channels * self.groups,)](
            planes, None, None, planes, None, None, spectrum.packed, self._ones(), *self.tables,
            row, each, 0, 0, 0, 0, row, each, 0, 0, self.B, self.channels, each,
            self.rows_per_program, CONJUGATE=conjugate, **self.inner,
        )  # fmt: skip

    def filter_planes(
        self,
        g_planes: Tensor,
        x_planes: Tensor,
        g_exponents: Tensor,
        x_exponents: Tensor,
        spectrum: Prepared,
    ) -> FilterPlanes:
        """Sum conj(Z) G over rows, and transform it back."""
        shape = (self.groups, self.D, self.size.outer)
        exponents = g_exponents.new_empty(shape)
        planes = g_planes.new_empty((*shape, 2, self.size.inner.points))
        row, each = g_planes.stride(0), 2 * self.size.inner.points
        fft_triton.backward_kernel[(self.channels * self.groups,)](
            g_planes, x_planes, None, None, None, None, None, planes, exponents,
            spectrum.packed, self._ones(), g_exponents, x_exponents, *self.tables,
            row, each, row, each, 0, 0, 0, 0, 0, 0, self.B, self.channels, each,
            self.rows_per_program, DATA=False, OUTER=self.size.outer, **self.inner,
        )  # fmt: skip
        return FilterPlanes(planes, exponents)

    def _ones(self) -> Tensor:
        return torch.ones(self.channels, device=self.device)
