"""Rows longer than a program holds: one more factor of the transform, through device memory.

A real row of n = N0 m points, l = m l0 + i, becomes N0 complex rows of m points

    Z_k0[i] = exp(-2 pi i (k0 - 1/4) i / n) sum_l0 W_N0[k0, l0] x[m l0 + i]

with W_N0 at frequencies k0 - 1/4, as in `fft_triton` (kept in float16, or float32, as two planes).
Each of them `fft_triton` convolves in place with frequencies k0 + N0 k of the filter; the same step
backwards gives the row. So a forward pass moves 22 bytes for each element of a half dtype: 2 to
find the scale of a row, 2 + 4 out, 4 + 4 in place, 4 + 2 back, at any length.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from h3lm.flashconv.dispatch import MAX_LONG_LENGTH, MAX_LONG_LENGTH_SMALL
from h3lm.flashconv.kernels import fft_triton
from h3lm.flashconv.kernels.fft_filter import (
    Prepared,
    empty_spectrum,
    gradients_by_library,
    prepare_by_library,
    transform,
    transform_back,
)
from h3lm.flashconv.kernels.fft_launch import rows_per_program
from h3lm.flashconv.kernels.fft_size import SHIFT, Size, factors, unitary_dft
from h3lm.flashconv.kernels.fft_triton import exponent_of, power_of_two, to_unit
from h3lm.flashconv.kernels.launch import strides

MIN_OUTER = 16  # the matrix units' smallest edge


@dataclass(frozen=True)
class LongSize:
    """Factors of a transform of n = outer x inner points.

    Attributes:
        outer: N0, of the factor through device memory.
        inner: Size of the transforms of what is left.
        columns: Points of an inner transform that a program of the outer factor takes.
        warps: Warps of such a program.
        rows_out: Most rows of the outer factor that it makes on the way to the spectrum.
        rows_in: The same on the way back, where each program makes all turns anew.
    """

    outer: int
    inner: Size
    columns: int = 64
    warps: int = 4
    rows_out: int = 64
    rows_in: int = 64

    @property
    def points(self) -> int:
        """n, the longest row."""
        return self.outer * self.inner.points


# the inner transform by the largest n that it is used for, with much shared memory and with 99 KB;
# measured on an H200, see docs/log.md
INNER = {1 << 16: Size(64, 32, 4), MAX_LONG_LENGTH: Size(64, 64, 4)}
SMALL_INNER = {MAX_LONG_LENGTH_SMALL: Size(64, 16, 4)}


def size_for(length: int, large: bool) -> LongSize:
    """Factors for rows of a length, on a GPU with as much shared memory as Hopper or with less.

    Raises:
        ValueError: if the row is too long.
    """
    points = 1 << (length - 1).bit_length()
    for most, inner in (INNER if large else SMALL_INNER).items():
        if points <= most:
            outer = max(points // inner.points, 2)
            return LongSize(outer, inner, columns=128 if large and outer <= 16 else 64)
    raise ValueError(f"rows of {length} are over what the block FFT was made for")


@triton.jit
def largest_kernel(
    x, gate, exponents, x_row, x_channel, gate_row, gate_channel, D, L, BLOCK: tl.constexpr
):  # fmt: skip
    """Biased exponent of the largest magnitude of each row, under its gate."""
    row, channel = (tl.program_id(0) // D).to(tl.int64), (tl.program_id(0) % D).to(tl.int64)
    x += row * x_row + channel * x_channel
    if gate is not None:
        gate += row * gate_row + channel * gate_channel
    largest = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, L, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        value = tl.load(x + at, at < L, 0.0).to(tl.float32)
        if gate is not None:
            value *= tl.load(gate + at, at < L, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    tl.store(exponents + tl.program_id(0), exponent_of(largest, largest >= 0))


@triton.jit
def outer_turns(k0, column, points, FAST: tl.constexpr):
    """Cosine and sine of 2 pi (k0 - 1/4) column / n."""
    step = column.to(tl.float32) * (6.283185307179586 / points)
    angle = (k0.to(tl.float32) - 0.25)[:, None] * step[None, :]
    if FAST:
        return libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        return tl.cos(angle), tl.sin(angle)


@triton.jit
def program_tile(tiles, inner, D, COLUMNS: tl.constexpr):
    """Tile, column block, channel and row of a program; tiles that read the same come together."""
    i = tl.program_id(0)
    blocks = inner // COLUMNS
    channel = i // tiles // blocks % D
    row = i // tiles // blocks // D
    return i % tiles, i // tiles % blocks, channel.to(tl.int64), row.to(tl.int64)


@triton.jit
def outward_kernel(
    x, gate, exponents, planes, table,
    x_row, x_channel, gate_row, gate_channel, D, L, inner, points,
    N0: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr, SCALED: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From rows to the planes of N0 complex rows; TILE of them and some columns here."""
    tile, block, channel, row = program_tile(K // TILE, inner, D, COLUMNS)
    k0, column = tile * TILE + tl.arange(0, TILE), block * COLUMNS + tl.arange(0, COLUMNS)
    x += row * x_row + channel * x_channel
    if gate is not None:
        gate += row * gate_row + channel * gate_channel
    if SCALED:
        scale = to_unit(tl.load(exponents + row * D + channel))
    re = tl.zeros((TILE, COLUMNS), tl.float32)
    im = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        l0 = start + tl.arange(0, DEPTH)
        position = l0[:, None] * inner + column[None, :]
        value = tl.load(x + position, position < L, 0.0)
        if gate is not None:
            value = value.to(tl.float32) * tl.load(gate + position, position < L, 0.0).to(
                tl.float32
            )
        if SCALED:
            value = value.to(tl.float32) * scale
        factor = table + k0[:, None] * K + l0[None, :]
        value = value.to(table.dtype.element_ty)
        re = tl.dot(tl.load(factor), value, re, input_precision=PRECISION)
        im = tl.dot(tl.load(factor + K * K), value, im, input_precision=PRECISION)
    cos, sin = outer_turns(k0, column, points, FAST)
    out = planes + ((row * D + channel) * N0 + k0)[:, None] * (2 * inner) + column[None, :]
    inside = (k0 < N0)[:, None] & (column >= 0)[None, :]
    tl.store(out, (re * cos + im * sin).to(planes.dtype.element_ty), inside)
    tl.store(out + inner, (im * cos - re * sin).to(planes.dtype.element_ty), inside)


@triton.jit
def inward_kernel(
    planes, y, gate, other, factor_of_other, exponents, unscale, table,
    y_row, y_channel, gate_row, gate_channel, other_row, other_channel,
    D, L, inner, points,
    N0: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr, SCALED: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of `outward_kernel`, then y = gate out, and other = factor_of_other out.

    `other` has the strides of y, its factor has its own.
    """
    tile, block, channel, row = program_tile(K // TILE, inner, D, COLUMNS)
    l0, column = tile * TILE + tl.arange(0, TILE), block * COLUMNS + tl.arange(0, COLUMNS)
    out = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        k0 = start + tl.arange(0, DEPTH)
        at = planes + ((row * D + channel) * N0 + k0)[:, None] * (2 * inner) + column[None, :]
        inside = (k0 < N0)[:, None] & (column >= 0)[None, :]
        re = tl.load(at, inside, 0.0).to(tl.float32)
        im = tl.load(at + inner, inside, 0.0).to(tl.float32)
        cos, sin = outer_turns(k0, column, points, FAST)
        factor = table + k0[None, :] * K + l0[:, None]
        back = (re * cos - im * sin).to(table.dtype.element_ty)
        out = tl.dot(tl.load(factor), back, out, input_precision=PRECISION)
        back = (re * sin + im * cos).to(table.dtype.element_ty)
        out = tl.dot(tl.load(factor + K * K), back, out, input_precision=PRECISION)
    position = l0[:, None] * inner + column[None, :]
    inside = position < L
    scale = tl.load(unscale + channel * N0)
    if SCALED:
        scale *= power_of_two(tl.load(exponents + row * D + channel))
    out *= scale
    offsets = row * y_row + channel * y_channel + position
    if other is not None:
        value = tl.load(
            factor_of_other + row * other_row + channel * other_channel + position, inside, 0.0
        )
        tl.store(other + offsets, (out * value.to(tl.float32)).to(y.dtype.element_ty), inside)
    if gate is not None:
        gate += row * gate_row + channel * gate_channel
        out *= tl.load(gate + position, inside, 0.0).to(tl.float32)
    tl.store(y + offsets, out.to(y.dtype.element_ty), inside)


@cache
def outer_factors(outer: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """W_N0 at frequencies k0 - 1/4 as (part, k0, l0); made in float64.

    Rows and columns behind N0 are zero: they only fill up an edge of 16.
    """
    K = max(outer, MIN_OUTER)
    W = torch.zeros(K, K, dtype=torch.complex128)
    W[:outer, :outer] = unitary_dft(outer, SHIFT)
    return torch.stack([W.real, W.imag]).to(device, dtype).contiguous()


def forward(
    u: Tensor, spectrum: Prepared, size: LongSize, pre: Tensor | None, post: Tensor | None
) -> Tensor:
    """Convolve rows of up to the size's points; positions are contiguous."""
    run = LongRun(u, size)
    exponents = run.exponents(u, pre)
    planes = run.outward(u, pre, exponents)
    run.convolve(planes, spectrum)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    run.inward(planes, y, post, None, None, exponents, spectrum.unscale)
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `fft_launch.backward`, for long rows."""
    run = LongRun(u, size)
    g_exponents, x_exponents = run.exponents(dy, post), None
    g_planes, x_planes = run.outward(dy, post, g_exponents), None
    if filters:
        x_exponents = run.exponents(u, pre)
        x_planes = run.outward(u, pre, x_exponents)
    sums = run.differentiate(g_planes, x_planes, g_exponents, x_exponents, spectrum, data)
    if not data:
        return None, None, sums
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    dpre = None if pre is None else torch.empty_like(du)
    run.inward(g_planes, du, pre, dpre, u, g_exponents, spectrum.unscale)
    return du, dpre, sums


def prepare(u: Tensor, f: Tensor, f_reverse: Tensor | None, size: LongSize) -> Prepared:
    """The filter's spectrum for rows like u."""
    half = u.dtype != torch.float32
    if f_reverse is not None or not half:
        return prepare_by_library(f, f_reverse, size.inner, half, size.outer)
    f = f if f.stride(1) == 1 else f.contiguous()
    run = LongRun(f[None], size, half=True)
    exponents = run.exponents(f[None], None)
    planes = run.outward(f[None], None, exponents)
    prepared = empty_spectrum(f, size.inner, size.outer)
    sums = torch.linalg.vector_norm(f, 1, dim=1)
    transform(planes, prepared, size.inner, run.tables, size.outer, exponents, sums)
    return prepared


def filter_gradients(
    u: Tensor, sums: Tensor, size: LongSize, taps: int, taps_reverse: int | None
) -> tuple[Tensor, Tensor | None]:
    """As `fft_launch.filter_gradients`, for long rows."""
    total = sums[0] if len(sums) == 1 else sums.sum(0)
    if taps_reverse is not None or u.dtype == torch.float32:
        return gradients_by_library(total, taps, taps_reverse)
    df = total.new_empty(1, len(total), taps)
    run = LongRun(df, size, half=True)
    rows = total.flatten(1)[None]
    exponents = run.exponents(rows, None)
    planes = df.new_empty((1, *total.shape[:3], size.inner.points), dtype=torch.float16)
    transform_back(total, planes, size.inner, run.tables, size.outer, exponents)
    root = df.new_full((len(total) * size.outer,), math.sqrt(size.points))
    run.inward(planes, df, None, None, None, exponents, root)
    return df[0], None


class LongRun:
    """What the launches for one tensor have in common."""

    def __init__(self, u: Tensor, size: LongSize, half: bool | None = None) -> None:
        self.B, self.D, self.L = u.shape
        self.size, self.device = size, u.device
        self.half = u.dtype != torch.float32 if half is None else half
        self.dtype = torch.float16 if self.half else torch.float32
        self.table = outer_factors(size.outer, self.dtype, u.device)
        K = self.table.shape[-1]
        self.rows_out, self.rows_in = min(size.rows_out, K), min(size.rows_in, K)
        common: dict[str, Any] = {
            "FAST": self.half and u.is_cuda, "PRECISION": "tf32" if self.half else "tf32x3",
        }  # fmt: skip
        self.outer = common | {
            "N0": size.outer, "K": K, "DEPTH": min(64, K), "COLUMNS": size.columns,
            "SCALED": self.half, "num_warps": size.warps,
        }  # fmt: skip
        self.inner = common | {
            "N1": size.inner.N1, "N2": size.inner.N2, "REAL": False, "HALF": self.half,
            "SCALED": False, "EVEN": True, "STAGES": size.inner.stages,
            "num_warps": size.inner.warps, "maxnreg": size.inner.registers,
        }  # fmt: skip
        self.columns = self.B * self.D * (size.inner.points // size.columns)
        self.channels = self.D * size.outer
        self.rows_per_program, self.groups = rows_per_program(
            u.device, size.inner, self.B, self.channels
        )
        self.tables = factors(size.inner, self.dtype, u.device, False)

    def exponents(self, x: Tensor, gate: Tensor | None) -> Tensor | None:
        """Exponents of the scales of rows, (B, D); None in float32, which has none."""
        if not self.half:
            return None
        exponents = torch.empty((self.B, self.D), dtype=torch.int32, device=self.device)
        largest_kernel[(self.B * self.D,)](
            x, gate, exponents, *strides(x), *strides(gate), self.D, x.shape[2],
            BLOCK=4096, num_warps=8,
        )  # fmt: skip
        return exponents

    def outward(self, x: Tensor, gate: Tensor | None, exponents: Tensor | None) -> Tensor:
        """The planes of N0 complex rows for each row, (B, D, N0, 2, m)."""
        shape = (self.B, self.D, self.size.outer, 2, self.size.inner.points)
        planes = torch.empty(shape, dtype=self.dtype, device=self.device)
        outward_kernel[(self.columns * (self.table.shape[-1] // self.rows_out),)](
            x, gate, exponents, planes, self.table, *strides(x), *strides(gate),
            self.D, self.L, self.size.inner.points, float(self.size.points),
            TILE=self.rows_out, **self.outer,
        )  # fmt: skip
        return planes

    def inward(
        self,
        planes: Tensor,
        y: Tensor,
        gate: Tensor | None,
        other: Tensor | None,
        factor_of_other: Tensor | None,
        exponents: Tensor | None,
        unscale: Tensor,
    ) -> None:
        """Rows y = gate out, and other = factor_of_other out, from planes."""
        inward_kernel[(self.columns * (self.table.shape[-1] // self.rows_in),)](
            planes, y, gate, other, factor_of_other, exponents, unscale, self.table,
            *strides(y), *strides(gate), *strides(factor_of_other),
            self.D, self.L, self.size.inner.points, float(self.size.points),
            TILE=self.rows_in, **self.outer,
        )  # fmt: skip

    def convolve(self, planes: Tensor, spectrum: Prepared) -> None:
        """Convolve all complex rows, in place."""
        row, each = planes.stride(0), 2 * self.size.inner.points
        fft_triton.forward_kernel[(self.channels * self.groups,)](
            planes, None, None, planes, spectrum.packed, self._ones(), *self.tables,
            row, each, 0, 0, 0, 0, row, each, self.B, self.channels, each,
            self.rows_per_program, **self.inner,
        )  # fmt: skip

    def differentiate(
        self,
        g_planes: Tensor,
        x_planes: Tensor | None,
        g_exponents: Tensor | None,
        x_exponents: Tensor | None,
        spectrum: Prepared,
        data: bool,
    ) -> Tensor | None:
        """Write dx over the planes of g (`data`); sums of conj(Z) G if there are those of x."""
        inner = self.size.inner
        row, each = g_planes.stride(0), 2 * inner.points
        sums = None
        if x_planes is not None:
            shape = (self.groups, self.D, self.size.outer, 2, inner.N1, inner.N2)
            sums = g_planes.new_empty(shape, dtype=torch.float32)
        # sums first: the other pass writes over the planes that they read
        for with_data, with_filter in ((False, sums is not None), (data, False)):
            if with_data or with_filter:
                fft_triton.backward_kernel[(self.channels * self.groups,)](
                    g_planes, x_planes if with_filter else g_planes, None, None, g_planes, None,
                    sums, spectrum.packed, self._ones(), g_exponents, x_exponents, *self.tables,
                    row, each, row, each, 0, 0, 0, 0, row, each, self.B, self.channels, each,
                    self.rows_per_program, DATA=with_data, FILTER=with_filter,
                    OUTER=self.size.outer, **self.inner,
                )  # fmt: skip
        return sums

    def _ones(self) -> Tensor:
        return torch.ones(self.channels, device=self.device)
