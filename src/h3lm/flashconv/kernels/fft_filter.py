"""Filters of the block FFT: from taps to spectra as the kernels read them, gradients back to taps.

A filter of half inputs goes through the transforms of `fft_triton` itself. What they cannot take,
a filter that reaches both ways or float32, goes through torch.fft and is ordered by a kernel.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv import fft
from h3lm.flashconv.kernels.fft_size import Size
from h3lm.flashconv.kernels.fft_triton import (
    exponent_of,
    from_spectrum,
    join_columns,
    power_of_two,
    to_spectrum,
    to_unit,
)


@triton.jit(do_not_specialize=["headroom"])  # it may be 1
def spectrum_kernel(
    x, exponents, sums, packed, unscale, F_table, W_table, x_channel, second_row, L, root, headroom,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, K: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform a filter, and keep its spectrum as `load_spectrum` reads it, in float16.

    A whole filter, float32 and alone in its pair (N0 = 1), is scaled here. Else x is one of the N0
    complex rows of a filter of these `exponents` and absolute `sums`, and the largest part of the
    spectrum is not known: its bound by the sum is at most sqrt(n) too large, which float16 has.
    `root` is sqrt(n), since transforms are unitary; `headroom` is h.
    """
    channel = tl.program_id(0).to(tl.int64)
    part_k1, row, l2 = tl.arange(0, 2 * N1), tl.arange(0, K), tl.arange(0, N2)
    k1, column = tl.arange(0, N1), tl.arange(0, 2 * N2)
    F = tl.load(F_table + part_k1[:, None] * K + row[None, :])
    W = tl.load(W_table + column[:, None] * (2 * N2) + column[None, :])

    member = row // (K // 2)
    position = (row % (K // 2))[:, None] * N2 + l2[None, :]
    inside = (position < L) & (((member == 0) | (second_row > 0))[:, None])
    at = channel * x_channel + (member * second_row)[:, None] + position
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if N0 == 1:
        exponent = exponent_of(value, inside)
        value *= to_unit(exponent)
    else:
        exponent = tl.load(exponents + channel // N0)
    zero = tl.program_id(0) >> 31
    re, im = to_spectrum(value.to(F.dtype), F, W, zero, N1, N2, FAST, PRECISION)
    if N0 == 1:
        largest = tl.max(tl.max(tl.maximum(tl.abs(re), tl.abs(im)), 1), 0)
    else:
        largest = tl.load(sums + channel // N0) * to_unit(exponent) / root
    peak = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    factor = to_unit(peak) * power_of_two(127 + headroom)
    out = packed + channel * (2 * N1 * N2) + k1[:, None] * (2 * N2) + column[None, :]
    tl.store(out, join_columns(re * factor, im * factor, N1, N2).to(tl.float16))
    back = power_of_two(exponent) * power_of_two(peak) * power_of_two(127 - headroom)
    tl.store(unscale + channel, back * root)


@triton.jit
def filter_gradient_kernel(
    sums, exponents, out, F_table, W_table, out_channel, second_row, L, root,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, K: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of `spectrum_kernel`: the real part of what has the spectrum `sums`.

    A whole filter (N0 = 1) comes out as it is, the complex rows of one scaled by `exponents`.
    """
    channel = tl.program_id(0).to(tl.int64)
    part_k1, row, l2 = tl.arange(0, 2 * N1), tl.arange(0, K), tl.arange(0, N2)
    k1, column = tl.arange(0, N1), tl.arange(0, 2 * N2)
    F = tl.load(F_table + part_k1[:, None] * K + row[None, :])
    W = tl.load(W_table + column[:, None] * (2 * N2) + column[None, :])

    points = k1[:, None] * N2 + l2[None, :]
    sums += channel * (2 * N1 * N2)
    re, im = tl.load(sums + points), tl.load(sums + N1 * N2 + points)
    if N0 == 1:
        exponent = exponent_of(tl.maximum(tl.abs(re), tl.abs(im)), points >= 0)
    else:
        exponent = tl.load(exponents + channel // N0)
    scale, zero = to_unit(exponent), tl.program_id(0) >> 31
    value = from_spectrum(re * scale, im * scale, F, W, zero, N1, N2, FAST, PRECISION)
    if N0 == 1:
        value *= power_of_two(exponent) * root
    member = row // (K // 2)
    position = (row % (K // 2))[:, None] * N2 + l2[None, :]
    inside = (position < L) & (((member == 0) | (second_row > 0))[:, None])
    at = channel * out_channel + (member * second_row)[:, None] + position
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["headroom"])
def pack_kernel(
    spectrum, peak, packed, unscale, n, headroom,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Order half of a real filter's spectrum as `load_spectrum` reads it, and scale it.

    Frequency k0 + N0 (k1 + N1 k2) goes to transform k0, row k1, point k2. The upper half of the
    frequencies is the conjugate of the lower one. `headroom` is h; float32 is left as it is.
    """
    filter_index = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # k0 + N0 k1
    point = tl.arange(0, N2)[:, None]
    frequency = row + N0 * N1 * point
    mirrored = frequency > n // 2
    at = spectrum + filter_index * (n + 2) + 2 * tl.where(mirrored, n - frequency, frequency)
    re, im = tl.load(at), tl.load(at + 1)
    im = tl.where(mirrored, -im, im)
    out = packed + filter_index * (2 * n) + ((row % N0) * N1 + row // N0) * (2 * N2)
    if HALF:
        exponent = (tl.load(peak + filter_index).to(tl.int32, bitcast=True) >> 23) & 0xFF
        factor = to_unit(exponent) * power_of_two(127 + headroom)
        column = 16 * (point // 8) + point % 8
        tl.store(out + column, (re * factor).to(tl.float16))
        tl.store(out + column + 8, (im * factor).to(tl.float16))
        back = power_of_two(exponent) * power_of_two(127 - headroom)
    else:
        k0 = row % N0
        out = packed + filter_index * (2 * n) + k0 * (2 * N1 * N2) + row // N0 * N2
        tl.store(out + point, re)
        tl.store(out + N1 * N2 + point, im)
        back = 1.0
    if tl.program_id(1) == 0:
        # one for each transform: the kernels index both by channel
        for k0 in range(N0):
            tl.store(unscale + filter_index * N0 + k0, back)


@triton.jit
def place(frequency, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Where the real part of frequency k0 + N0 (k1 + N1 k2) stands in (N0, 2, N1, N2)."""
    row = frequency % (N0 * N1)
    return ((row % N0) * (2 * N1) + row // N0) * N2 + frequency // (N0 * N1)


@triton.jit
def unpack_kernel(
    sums, spectrum, n,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Half of the spectrum of the real part of what has the spectrum `sums`.

    That is (S[k] + conj S[n - k]) / 2, in the natural order: what `pack_kernel` orders, back.
    """
    filter_index = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    frequency = row + N0 * N1 * tl.arange(0, N2)[:, None]
    half = frequency <= n // 2
    sums += filter_index * (2 * n)
    here, mirrored = place(frequency, N0, N1, N2), place((n - frequency) % n, N0, N1, N2)
    re = tl.load(sums + here, half, 0.0) + tl.load(sums + mirrored, half, 0.0)
    here, mirrored = here + N1 * N2, mirrored + N1 * N2
    im = tl.load(sums + here, half, 0.0) - tl.load(sums + mirrored, half, 0.0)
    out = spectrum + filter_index * (n + 2) + 2 * frequency
    tl.store(out, re / 2, half)
    tl.store(out + 1, im / 2, half)


class Prepared(NamedTuple):
    """Filters' spectra as the kernels read them.

    Attributes:
        packed: float16 (D N0, N1, 2 N2) for half inputs, float32 (D N0, 2, N1, N2) else.
        unscale: What outputs are multiplied with, (D N0,), float32.
    """

    packed: Tensor
    unscale: Tensor


def headroom(length: int) -> int:
    """The h with which no product of spectra overflows float16, see `fft_triton`."""
    return math.floor(math.log2(65504 / (8 * math.sqrt(length))))


def pack_spectrum(spectrum: Tensor, size: Size, half: bool, outer: int = 1) -> Prepared:
    """Order and scale spectra for transforms of `outer` times the size's points."""
    D, points = spectrum.shape[0], outer * size.points
    pairs = torch.view_as_real(spectrum).contiguous()
    shape = (D * outer, size.N1, 2 * size.N2) if half else (D * outer, 2, size.N1, size.N2)
    packed = spectrum.real.new_empty(shape, dtype=torch.float16 if half else torch.float32)
    unscale = spectrum.real.new_empty(D * outer)
    peak = unscale
    if half:
        lowest, highest = pairs.flatten(1).aminmax(dim=1)
        peak = torch.maximum(-lowest, highest)
    block = min(32, outer * size.N1)
    pack_kernel[(D, outer * size.N1 // block)](
        pairs, peak, packed, unscale, points, headroom(points // 2),
        N0=outer, N1=size.N1, N2=size.N2, BLOCK=block, HALF=half,
    )  # fmt: skip
    return Prepared(packed, unscale)


def empty_spectrum(f: Tensor, size: Size, outer: int = 1) -> Prepared:
    """Uninitialised spectra of filters for half inputs."""
    rows = f.shape[0] * outer
    packed = f.new_empty((rows, size.N1, 2 * size.N2), dtype=torch.float16)
    return Prepared(packed, f.new_empty(rows, dtype=torch.float32))


def transform(
    x: Tensor,
    prepared: Prepared,
    size: Size,
    tables: tuple[Tensor, ...],
    outer: int = 1,
    exponents: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Fill in the spectra of filters (D, taps), or of the planes of their complex rows."""
    whole = outer == 1
    points = outer * size.points
    spectrum_kernel[(len(prepared.unscale),)](
        x, exponents, sums, *prepared, *tables,
        x.stride(0) if whole else 2 * size.points, 0 if whole else size.points,
        x.shape[1] if whole else size.points, math.sqrt(points), headroom(points // 2),
        N0=outer, N1=size.N1, N2=size.N2, K=tables[0].shape[1], FAST=x.is_cuda, PRECISION="tf32",
        num_warps=size.warps,
    )  # fmt: skip


def transform_back(
    total: Tensor,
    out: Tensor,
    size: Size,
    tables: tuple[Tensor, ...],
    outer: int = 1,
    exponents: Tensor | None = None,
) -> None:
    """The inverse of `transform`: filters (D, taps), or planes, from sums (D, N0, 2, N1, N2)."""
    whole = outer == 1
    filter_gradient_kernel[(len(total) * outer,)](
        total, exponents, out, *tables,
        out.stride(0) if whole else 2 * size.points, 0 if whole else size.points,
        out.shape[1] if whole else size.points, math.sqrt(outer * size.points),
        N0=outer, N1=size.N1, N2=size.N2, K=tables[0].shape[1], FAST=total.is_cuda,
        PRECISION="tf32", num_warps=size.warps,
    )  # fmt: skip


def unpacked_gradients(
    total: Tensor, taps: int, taps_reverse: int | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of both filters from sums (D, N0, 2, N1, N2), in float32 by torch.fft."""
    D, outer, _, N1, N2 = total.shape
    n = outer * N1 * N2
    spectrum = total.new_empty(D, n // 2 + 1, 2)
    block = min(32, outer * N1)
    unpack_kernel[(D, outer * N1 // block)](total, spectrum, n, N0=outer, N1=N1, N2=N2, BLOCK=block)
    moved = torch.fft.irfft(torch.view_as_complex(spectrum), n=n, norm="forward")
    return fft.filter_gradients(total, moved, n, taps, taps_reverse)
