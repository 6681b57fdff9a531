"""Filters of the block FFT: from taps to spectra as the kernels read them, gradients back to taps.

A filter of half inputs goes through the transforms of `fft_triton` itself. One that reaches both
ways, or float32, goes through torch.fft and is ordered by a kernel.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from h3lm.flashconv.kernels.launch import multiprocessors


@triton.jit(do_not_specialize=["headroom"])  # it may be 1
def spectrum_kernel(
    x, exponents, sums, packed, unscale, F_table, W_table, x_channel, L, root, headroom,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, REAL: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform a filter, and keep its spectrum as `load_spectrum` reads it, in float16.

    A whole filter, real and float32, is scaled here. Else x is one of the N0 complex rows of a
    filter of these `exponents` and absolute `sums`, and the largest part of the spectrum is not
    known: its bound by the sum is at most sqrt(n) too large, which float16 has. `root` is sqrt(n),
    since transforms are unitary; `headroom` is h.
    """
    K: tl.constexpr = N1 if REAL else 2 * N1
    channel = tl.program_id(0).to(tl.int64)
    F, W = load_factors(F_table, W_table, N1, N2, K)
    position = tl.arange(0, K)[:, None] * N2 + tl.arange(0, N2)[None, :]
    inside = position < L
    value = tl.load(x + channel * x_channel + position, inside, 0.0).to(tl.float32)
    if REAL:
        exponent = exponent_of(value)
        value *= to_unit(exponent)
    else:
        exponent = tl.load(exponents + channel // N0)
    zero = tl.program_id(0) >> 31
    re, im = to_spectrum(value.to(F.dtype), F, W, 0, zero, N1, N2, REAL, FAST, False, PRECISION)
    if REAL:
        largest = tl.max(tl.max(tl.maximum(tl.abs(re), tl.abs(im)), 1), 0)
    else:
        largest = tl.load(sums + channel // N0) * to_unit(exponent) / root
    peak = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    factor = to_unit(peak) * power_of_two(127 + headroom)
    points = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tl.store(packed + channel * (N1 * N2) + points, pack(re * factor, im * factor))
    back = power_of_two(exponent) * power_of_two(peak) * power_of_two(127 - headroom)
    tl.store(unscale + channel, back * root)


@triton.jit(do_not_specialize=["channels"])
def filter_gradient_kernel(
    sums, out, F_table, W_table, out_channel, channels, L, root,
    N1: tl.constexpr, N2: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of `spectrum_kernel` for whole filters.

    A loop, and be it over one channel: see the end of `fft_triton.backward_kernel`.
    """
    F, W = load_factors(F_table, W_table, N1, N2, N1)
    points = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    for i in tl.range(tl.program_id(0), channels, tl.num_programs(0), num_stages=1):
        channel = (i + 0 * channels).to(tl.int64)
        at = sums + channel * (2 * N1 * N2) + points
        re, im = tl.load(at), tl.load(at + N1 * N2)
        exponent = exponent_of(tl.maximum(tl.abs(re), tl.abs(im)))
        scale, zero = to_unit(exponent), channels >> 31
        value = from_spectrum(
            re * scale, im * scale, F, W, 0, zero, N1, N2, True, FAST, False, PRECISION
        )
        value *= power_of_two(exponent) * root
        tl.store(out + channel * out_channel + points, value, points < L)


@triton.jit
def both_orders(N1: tl.constexpr, N2: tl.constexpr):
    """Where [k2, k1] stands among the points of a spectrum, and in the natural order."""
    k1, k2 = tl.arange(0, N1)[None, :], tl.arange(0, N2)[:, None]
    return k1 * N2 + k2, k1 + N1 * k2


@triton.jit(do_not_specialize=["headroom"])
def pack_kernel(
    spectrum, peak, packed, unscale, headroom,
    N1: tl.constexpr, N2: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Order a filter's spectrum as `load_spectrum` reads it, and scale it.

    `headroom` is h; float32 is left as it is.
    """
    channel = tl.program_id(0).to(tl.int64)
    points, frequencies = both_orders(N1, N2)
    spectrum += channel * (2 * N1 * N2) + 2 * frequencies
    re, im = tl.load(spectrum), tl.load(spectrum + 1)
    back = 1.0
    if HALF:
        exponent = (tl.load(peak + channel).to(tl.int32, bitcast=True) >> 23) & 0xFF
        factor = to_unit(exponent) * power_of_two(127 + headroom)
        back = power_of_two(exponent) * power_of_two(127 - headroom)
        tl.store(packed + channel * (N1 * N2) + points, pack(re * factor, im * factor))
    else:
        packed += channel * (2 * N1 * N2) + points
        tl.store(packed, re)
        tl.store(packed + N1 * N2, im)
    tl.store(unscale + channel, back)


@triton.jit
def unpack_kernel(sums, spectrum, N1: tl.constexpr, N2: tl.constexpr):
    """The order of float32 that `pack_kernel` makes, back to the natural one."""
    channel = tl.program_id(0).to(tl.int64)
    points, frequencies = both_orders(N1, N2)
    sums += channel * (2 * N1 * N2) + points
    spectrum += channel * (2 * N1 * N2) + 2 * frequencies
    tl.store(spectrum, tl.load(sums))
    tl.store(spectrum + 1, tl.load(sums + N1 * N2))


class Prepared(NamedTuple):
    """Filters' spectra as the kernels read them.

    Attributes:
        packed: Words of two float16, int32 (D N0, N1, N2), for half inputs, else float32
            (D N0, 2, N1, N2).
        unscale: What outputs are multiplied with, (D N0,), float32.
    """

    packed: Tensor
    unscale: Tensor


def headroom(points: int) -> int:
    """The h with which no product of spectra overflows float16, see `fft_triton`."""
    return math.floor(math.log2(65504 / (8 * math.sqrt(points))))


def prepare_by_library(f: Tensor, f_reverse: Tensor | None, size: Size, half: bool) -> Prepared:
    """Spectra of filters that may reach both ways, by torch.fft in float32."""
    D = f.shape[0]
    spectrum = torch.view_as_real(_spectrum(f, f_reverse, size.points))
    shape = (D, size.N1, size.N2) if half else (D, 2, size.N1, size.N2)
    packed = f.new_empty(shape, dtype=torch.int32 if half else torch.float32)
    unscale = f.new_empty(D)
    peak = unscale
    if half:
        lowest, highest = spectrum.flatten(1).aminmax(dim=1)
        peak = torch.maximum(-lowest, highest)
    pack_kernel[(D,)](
        spectrum, peak, packed, unscale, headroom(size.points), N1=size.N1, N2=size.N2, HALF=half
    )
    return Prepared(packed, unscale)


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


def transform(
    x: Tensor,
    size: Size,
    tables: tuple[Tensor, ...],
    outer: int = 1,
    exponents: Tensor | None = None,
    sums: Tensor | None = None,
) -> Prepared:
    """Spectra of filters (D, taps), or of the planes of their complex rows, in float16."""
    real = exponents is None
    rows, points = x.shape[0] if real else x.shape[1] * outer, outer * size.points
    packed = x.new_empty((rows, size.N1, size.N2), dtype=torch.int32)
    prepared = Prepared(packed, x.new_empty(rows, dtype=torch.float32))
    spectrum_kernel[(rows,)](
        x, exponents, sums, *prepared, *tables,
        *((x.stride(0), x.shape[1]) if real else (2 * size.points, 2 * size.points)),
        math.sqrt(points), headroom(points),
        N0=outer, N1=size.N1, N2=size.N2, REAL=real, FAST=x.is_cuda, PRECISION="tf32",
        num_warps=size.warps,
    )  # fmt: skip
    return prepared


def gradients(total: Tensor, taps: int, size: Size, tables: tuple[Tensor, ...]) -> Tensor:
    """Gradients of whole filters from sums (D, 2, N1, N2): the inverse of `transform`."""
    df = total.new_empty(len(total), taps)
    programs = min(len(total), 2 * multiprocessors(total.device))
    filter_gradient_kernel[(programs,)](
        total, df, *tables, df.stride(0), len(total), taps, math.sqrt(size.points),
        N1=size.N1, N2=size.N2, FAST=total.is_cuda, PRECISION="tf32", num_warps=size.warps,
    )  # fmt: skip
    return df
