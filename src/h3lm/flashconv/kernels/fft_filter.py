"""Filters of the block FFT: from taps to spectra as the kernels read them, gradients back to taps.

A filter of half inputs goes through the transforms of `fft_triton` itself, one of float32 through
torch.fft, and is ordered by a kernel.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.filters import Filter, FilterGradients
from h3lm.flashconv.kernels.fft_size import Size
from h3lm.flashconv.kernels.fft_triton import (
    exponent_of,
    from_spectrum,
    load_factors,
    pack,
    power_of_two,
    to_spectrum,
    to_unit,
)
from h3lm.flashconv.kernels.lags import load_lags, parts
from h3lm.flashconv.kernels.launch import multiprocessors


@triton.jit(do_not_specialize=["headroom", "taps", "taps_reverse", "period", "halves"])
def spectrum_kernel(
    f, reverse, skip, f_channel, reverse_channel, taps, taps_reverse, period, halves,
    exponents, sums, packed, unscale, F_table, W_table, root, headroom,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, REAL: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Transform a filter, and keep its spectrum as `load_spectrum` reads it.

    A whole filter is scaled here: see `load_lags`; with two `halves`, what reaches ahead is its
    imaginary part. Else f is one of the N0 complex rows of a filter of these `exponents` and
    absolute `sums`, and the largest part of the spectrum is not known: its bound by the sum is at
    most sqrt(n) too large, which float16 has. `root` is sqrt(n), since transforms are unitary;
    `headroom` is h.

    The halves in a loop, and be it over one: see the end of `fft_triton.backward_kernel`.
    """
    K: tl.constexpr = N1 if REAL else 2 * N1
    channel = tl.program_id(0).to(tl.int64)
    factors = load_factors(F_table, W_table, N1, N2, K, PRECISION, APART)
    position = tl.arange(0, K)[:, None] * N2 + tl.arange(0, N2)[None, :]
    everywhere = position >= 0
    zero = tl.program_id(0) >> 31
    if REAL:
        n: tl.constexpr = N1 * N2
        largest = tl.zeros((K, N2), tl.float32)
        for half in tl.range(0, halves, num_stages=1):
            value = load_lags(
                f, reverse, skip, f_channel, reverse_channel, taps, taps_reverse, period,
                channel, position - half * n, everywhere,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.abs(value))
        exponent = exponent_of(largest)
        re = tl.zeros((N1, N2), tl.float32)
        im = tl.zeros((N1, N2), tl.float32)
        for half in tl.range(0, halves, num_stages=1):
            value = load_lags(
                f, reverse, skip, f_channel, reverse_channel, taps, taps_reverse, period,
                channel, position - half * n, everywhere,
            )  # fmt: skip
            value *= to_unit(exponent)
            new_re, new_im = to_spectrum(
                value, factors, 0, zero, N1, N2, REAL, FAST, False, PRECISION
            )
            # a lag of -s is t^-s = -i t^(n - s)
            straight, turned = 1.0 - half, half * 1.0
            re += straight * new_re + turned * new_im
            im += straight * new_im - turned * new_re
        largest_part = tl.max(tl.max(tl.maximum(tl.abs(re), tl.abs(im)), 1), 0)
    else:
        value = tl.load(f + channel * f_channel + position, position < taps, 0.0).to(tl.float32)
        exponent = tl.load(exponents + channel // N0)
        re, im = to_spectrum(value, factors, 0, zero, N1, N2, REAL, FAST, False, PRECISION)
        largest_part = tl.load(sums + channel // N0) * to_unit(exponent) / root
    peak = (largest_part.to(tl.int32, bitcast=True) >> 23) & 0xFF
    factor = to_unit(peak) * power_of_two(127 + headroom)
    points = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    if PRECISION == "half":
        tl.store(packed + channel * (N1 * N2) + points, pack(re * factor, im * factor))
    else:
        packed += channel * (2 * N1 * N2) + points
        tl.store(packed, re * factor)
        tl.store(packed + N1 * N2, im * factor)
    back = power_of_two(exponent) * power_of_two(peak) * power_of_two(127 - headroom)
    tl.store(unscale + channel, back * root)


@triton.jit(do_not_specialize=["channels", "groups", "halves", "taps", "taps_reverse"])
def filter_gradient_kernel(
    sums, df, dback, dskip, F_table, W_table, channels, groups, halves, taps, taps_reverse, root,
    N1: tl.constexpr, N2: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """The inverse of `spectrum_kernel` for whole filters, of partial sums in groups.

    A loop, and be it over one channel: see the end of `fft_triton.backward_kernel`.
    """
    factors = load_factors(F_table, W_table, N1, N2, N1, PRECISION, APART)
    points = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    every = halves * channels
    for i in tl.range(tl.program_id(0), every, tl.num_programs(0), num_stages=1):
        channel, half = (i // halves + 0 * channels).to(tl.int64), i % halves
        re = tl.zeros((N1, N2), tl.float32)
        im = tl.zeros((N1, N2), tl.float32)
        for group in range(groups):
            at = sums + (group * channels + channel) * (2 * N1 * N2) + points
            re += tl.load(at)
            im += tl.load(at + N1 * N2)
        exponent = exponent_of(tl.maximum(tl.abs(re), tl.abs(im)))
        scale, zero = to_unit(exponent), channels >> 31
        # the imaginary part of z is the real one of -i z
        straight, turned = scale * (1.0 - half), scale * half
        value = from_spectrum(
            straight * re + turned * im, straight * im - turned * re,
            factors, 0, zero, N1, N2, True, FAST, False, PRECISION,
        )  # fmt: skip
        value *= power_of_two(exponent) * root
        behind = (half == 0) & (points < taps)
        tl.store(df + channel * taps + points, value.to(df.dtype.element_ty), behind)
        first = (half == 0) & (points == 0)
        if dskip is not None:
            tl.store(dskip + channel + points, value.to(dskip.dtype.element_ty), first)
        if dback is not None:
            # a lag of -s is t^-s = -i t^(n - s)
            dback_ = dback + channel * taps_reverse
            s = N1 * N2 - points
            tl.store(dback_ + points, value.to(dback.dtype.element_ty), first)
            ahead = (half == 1) & (points > 0) & (s < taps_reverse)
            tl.store(dback_ + s, (-value).to(dback.dtype.element_ty), ahead)


@triton.jit
def both_orders(N1: tl.constexpr, N2: tl.constexpr):
    """Where [k2, k1] stands among the points of a spectrum, and in the natural order."""
    k1, k2 = tl.arange(0, N1)[None, :], tl.arange(0, N2)[:, None]
    return k1 * N2 + k2, k1 + N1 * k2


@triton.jit
def pack_kernel(spectrum, packed, N1: tl.constexpr, N2: tl.constexpr):
    """Order a filter's spectrum as `load_spectrum` reads it, in float32."""
    channel = tl.program_id(0).to(tl.int64)
    points, frequencies = both_orders(N1, N2)
    spectrum += channel * (2 * N1 * N2) + 2 * frequencies
    packed += channel * (2 * N1 * N2) + points
    tl.store(packed, tl.load(spectrum))
    tl.store(packed + N1 * N2, tl.load(spectrum + 1))


@triton.jit
def unpack_kernel(sums, spectrum, N1: tl.constexpr, N2: tl.constexpr):
    """The order that `pack_kernel` makes, back to the natural one."""
    channel = tl.program_id(0).to(tl.int64)
    points, frequencies = both_orders(N1, N2)
    sums += channel * (2 * N1 * N2) + points
    spectrum += channel * (2 * N1 * N2) + 2 * frequencies
    tl.store(spectrum, tl.load(sums))
    tl.store(spectrum + 1, tl.load(sums + N1 * N2))


class Prepared(NamedTuple):
    """Filters' spectra as the kernels read them.

    Attributes:
        packed: Words of two float16, int32 (D N0, N1, N2), for precision "half", else float32
            (D N0, 2, N1, N2).
        unscale: What outputs are multiplied with, (D N0,), float32.
    """

    packed: Tensor
    unscale: Tensor


def headroom(points: int) -> int:
    """The h with which no product of spectra overflows float16, see `fft_triton`."""
    return math.floor(math.log2(65504 / (8 * math.sqrt(points))))


def prepare_by_library(f: Tensor, f_reverse: Tensor | None, size: Size) -> Prepared:
    """Spectra of filters that may reach both ways, by torch.fft in float32."""
    D = f.shape[0]
    spectrum = torch.view_as_real(_spectrum(f.float(), f_reverse, size.points))
    packed = spectrum.new_empty((D, 2, size.N1, size.N2))
    pack_kernel[(D,)](spectrum, packed, N1=size.N1, N2=size.N2)
    return Prepared(packed, packed.new_ones(D))


def gradients_by_library(
    total: Tensor, taps: int, taps_reverse: int | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of both filters from sums (D, 2, N1, N2), in float32 by torch.fft."""
    D, _, N1, N2 = total.shape
    n = N1 * N2
    spectrum = total.new_empty(D, n, 2)
    unpack_kernel[(D,)](total, spectrum, N1=N1, N2=N2)
    moved = torch.fft.ifft(torch.view_as_complex(spectrum), norm="forward")
    moved *= torch.conj_physical(_quarter_turns(n, total.device))
    df = moved.real[:, :taps].contiguous()
    back = None if taps_reverse is None else reverse_gradient(df, moved.imag, taps_reverse)
    return df, back


def imaginary_row(f_reverse: Tensor, points: int) -> Tensor:
    """The reverse filter from lag 1 on as the imaginary part of a filter of so many points.

    Where t^points = i, a lag of -s is t^-s = -i t^(points - s).
    """
    row = f_reverse.new_zeros(f_reverse.shape[0], points)
    row[:, points - f_reverse.shape[1] + 1 :] = -f_reverse[:, 1:].flip(1)
    return row


def reverse_gradient(df: Tensor, imaginary: Tensor, taps: int) -> Tensor:
    """Gradient of the reverse filter; its tap 0 is the other one's, see `imaginary_row`."""
    ahead = -imaginary[:, imaginary.shape[1] - taps + 1 :].flip(1)
    return torch.cat([df[:, :1], ahead], 1)


def _spectrum(f: Tensor, f_reverse: Tensor | None, points: int) -> Tensor:
    """Values of the filters' polynomials where t^points = i, (D, points), complex64."""
    x = f.new_zeros(f.shape[0], points, 2)
    x[:, : f.shape[1], 0] = f
    if f_reverse is not None:
        x[:, 0, 0] += f_reverse[:, 0]
        x[..., 1] = imaginary_row(f_reverse, points)
    return torch.fft.fft(torch.view_as_complex(x) * _quarter_turns(points, f.device))


def _quarter_turns(points: int, device: torch.device) -> Tensor:
    """What brings frequencies k - 1/4 to k; made in float64."""
    angle = torch.arange(points, dtype=torch.float64, device=device) * (math.pi / 2 / points)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def transform(filter: Filter, size: Size, tables: tuple[Tensor, ...]) -> Prepared:
    """Spectra of filters by the kernels."""
    halves = 1 if filter.taps_reverse is None else 2
    prepared = _empty(filter.f, len(filter.f), size)
    _transform(parts(filter), halves, None, None, prepared, size, tables, 1)
    return prepared


def transform_planes(
    planes: Tensor, size: Size, tables: tuple[Tensor, ...], exponents: Tensor, sums: Tensor
) -> Prepared:
    """Spectra of the complex rows of filters (1, D, N0, 2, m), see `fft_long`."""
    outer, each = planes.shape[2], 2 * size.points
    prepared = _empty(sums, planes.shape[1] * outer, size)
    given = (planes, None, None, each, 0, each, 0, 0)
    _transform(given, 1, exponents, sums, prepared, size, tables, outer)
    return prepared


def _empty(like: Tensor, rows: int, size: Size) -> Prepared:
    points = (size.N1, size.N2)
    if size.precision == "half":
        packed = like.new_empty((rows, *points), dtype=torch.int32)
    else:
        packed = like.new_empty((rows, 2, *points), dtype=torch.float32)
    return Prepared(packed, like.new_empty(rows, dtype=torch.float32))


def _transform(
    given: tuple[Any, ...],
    halves: int,
    exponents: Tensor | None,
    sums: Tensor | None,
    prepared: Prepared,
    size: Size,
    tables: tuple[Tensor, ...],
    outer: int,
) -> None:
    points = outer * size.points
    spectrum_kernel[(len(prepared.packed),)](
        *given, halves, exponents, sums, *prepared, *tables, math.sqrt(points), headroom(points),
        N0=outer, N1=size.N1, N2=size.N2, REAL=exponents is None, FAST=size.fast(prepared.packed),
        PRECISION=size.precision, APART=size.apart, num_warps=size.warps,
    )  # fmt: skip


def gradients(
    sums: Tensor, filter: Filter, size: Size, tables: tuple[Tensor, ...]
) -> FilterGradients:
    """Gradients of whole filters from sums (groups, D, 2, N1, N2): the inverse of `transform`."""
    groups, D = sums.shape[:2]
    # lags that are another's wrapped around are joined behind the kernel
    plain = not filter.period
    made = filter.empty_gradients() if plain else _both_ways(sums, filter.period)
    taps_reverse = 0 if made.f_reverse is None else made.f_reverse.shape[1]
    halves = 1 if made.f_reverse is None else 2
    filter_gradient_kernel[(min(D * halves, 2 * multiprocessors(sums.device)),)](
        sums, *made, *tables, D, groups, halves, made.f.shape[1], taps_reverse,
        math.sqrt(size.points), N1=size.N1, N2=size.N2, FAST=size.fast(sums),
        PRECISION=size.precision, APART=size.apart, num_warps=size.warps,
    )  # fmt: skip
    return made if plain else filter.gradients(made.f, made.f_reverse)


def _both_ways(sums: Tensor, taps: int) -> FilterGradients:
    f = sums.new_empty(sums.shape[1], taps)
    return FilterGradients(f, torch.empty_like(f))
