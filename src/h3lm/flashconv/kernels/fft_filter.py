"""Filters of the block FFT: from taps to spectra as the kernels read them, gradients back to taps.

A filter of half inputs goes through the transforms of `fft_triton` itself; one of float32 goes
through torch.fft and is ordered by a kernel.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.kernels.fft_size import Size, factors
from h3lm.flashconv.kernels.fft_triton import (
    exponent_of,
    join_stacked,
    load_factors,
    pack,
    power_of_two,
    second_factor,
    split_stacked,
    to_spectrum,
    to_unit,
    undo_second_factor,
)
from h3lm.flashconv.kernels.launch import multiprocessors


@triton.jit(do_not_specialize=["headroom", "L", "L_ahead"])  # each may be 1
def spectrum_kernel(
    x, ahead, exponents, sums, packed, unscale, F_table, W_table,
    x_channel, L, ahead_channel, L_ahead, root, headroom,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, REAL: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform a filter, and keep its spectrum as `load_spectrum` reads it, in float16.

    A whole filter, real and float32, is scaled here; `ahead` is the reverse one, if there is one,
    which is the imaginary part of the row, see `imaginary_row`. Else x is one of the N0 complex
    rows of a filter of these `exponents` and absolute `sums`, and the largest part of the spectrum
    is not known: its bound by the sum is at most sqrt(n) too large, which float16 has. `root` is
    sqrt(n), since transforms are unitary; `headroom` is h.
    """
    K: tl.constexpr = N1 if REAL else 2 * N1
    channel = tl.program_id(0).to(tl.int64)
    F, W = load_factors(F_table, W_table, N1, N2, K)
    position = tl.arange(0, K)[:, None] * N2 + tl.arange(0, N2)[None, :]
    value = tl.load(x + channel * x_channel + position, position < L, 0.0).to(tl.float32)
    zero = tl.program_id(0) >> 31
    if ahead is not None:
        lag = N1 * N2 - position
        ahead += channel * ahead_channel
        value += tl.load(ahead + position, position == 0, 0.0)
        imaginary = tl.load(ahead + lag, lag < L_ahead, 0.0)
        exponent = exponent_of(tl.maximum(tl.abs(value), tl.abs(imaginary)))
        value, imaginary = value * to_unit(exponent), imaginary * -to_unit(exponent)
        re, im = split_stacked(tl.dot(F, value.to(F.dtype), input_precision=PRECISION), N1, N2)
        i_re, i_im = split_stacked(
            tl.dot(F, imaginary.to(F.dtype), input_precision=PRECISION), N1, N2
        )
        re, im = second_factor(
            re - i_im, im + i_re, W, 0, zero, N1, N2, REAL, FAST, False, PRECISION
        )
    else:
        if REAL:
            exponent = exponent_of(value)
            value *= to_unit(exponent)
        else:
            exponent = tl.load(exponents + channel // N0)
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


@triton.jit(do_not_specialize=["channels", "groups", "L", "L_ahead"])
def filter_gradient_kernel(
    sums, out, ahead, F_table, W_table, out_channel, L, ahead_channel, L_ahead, channels, groups,
    root, N1: tl.constexpr, N2: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of `spectrum_kernel` for whole filters, of a sum over groups of rows.

    A loop, and be it over one channel: see the end of `fft_triton.backward_kernel`.
    """
    F, W = load_factors(F_table, W_table, N1, N2, N1)
    points = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    for i in tl.range(tl.program_id(0), channels, tl.num_programs(0), num_stages=1):
        channel = (i + 0 * channels).to(tl.int64)
        at = sums + channel * (2 * N1 * N2) + points
        re, im = tl.load(at), tl.load(at + N1 * N2)
        for group in tl.range(1, groups, num_stages=1):
            more = sums + (channel + group * channels) * (2 * N1 * N2) + points
            re += tl.load(more)
            im += tl.load(more + N1 * N2)
        exponent = exponent_of(tl.maximum(tl.abs(re), tl.abs(im)))
        scale, zero = to_unit(exponent), channels >> 31
        back = power_of_two(exponent) * root
        re, im = undo_second_factor(
            re * scale, im * scale, W, 0, zero, N1, N2, True, FAST, False, PRECISION
        )
        turned = join_stacked(re, im, N1, N2).to(F.dtype)
        value = tl.dot(tl.trans(F), turned, input_precision=PRECISION) * back
        tl.store(out + channel * out_channel + points, value, points < L)
        if ahead is not None:
            to = ahead + channel * ahead_channel
            tl.store(to + points, value, points == 0)  # lag 0 is both filters'
            turned = join_stacked(im, -re, N1, N2).to(F.dtype)
            value = tl.dot(tl.trans(F), turned, input_precision=PRECISION) * -back
            lag = N1 * N2 - points
            tl.store(to + lag, value, lag < L_ahead)


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


def prepare_by_library(f: Tensor, f_reverse: Tensor | None, size: Size) -> Prepared:
    """Spectra of filters that may reach both ways, by torch.fft in float32."""
    D = f.shape[0]
    spectrum = torch.view_as_real(_spectrum(f, f_reverse, size.points))
    packed = f.new_empty(D, 2, size.N1, size.N2)
    pack_kernel[(D,)](spectrum, packed, N1=size.N1, N2=size.N2)
    return Prepared(packed, f.new_ones(D))


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


@cache
def _quarter_turns(points: int, device: torch.device) -> Tensor:
    """What brings frequencies k - 1/4 to k; made in float64."""
    angle = torch.arange(points, dtype=torch.float64, device=device) * (math.pi / 2 / points)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def transform(f: Tensor, f_reverse: Tensor | None, size: Size) -> Prepared:
    """Spectra of filters (D, taps), in float16."""
    prepared = _empty(f, len(f), size)
    spectrum_kernel[(len(f),)](
        f, f_reverse, None, None, *prepared, *factors(size, torch.float16, f.device, True),
        *_form(f), *_form(f_reverse), math.sqrt(size.points), headroom(size.points),
        N0=1, REAL=True, **_constants(f, size),
    )  # fmt: skip
    return prepared


def transform_planes(
    planes: Tensor, exponents: Tensor, sums: Tensor, size: Size, outer: int
) -> Prepared:
    """Spectra of the complex rows of filters, (1, D, outer, 2, points), in float16."""
    rows, points = planes.shape[1] * outer, outer * size.points
    prepared = _empty(planes, rows, size)
    spectrum_kernel[(rows,)](
        planes, None, exponents, sums, *prepared,
        *factors(size, torch.float16, planes.device, False),
        2 * size.points, 2 * size.points, 0, 0, math.sqrt(points), headroom(points),
        N0=outer, REAL=False, **_constants(planes, size),
    )  # fmt: skip
    return prepared


def gradients(
    sums: Tensor, taps: int, taps_reverse: int | None, size: Size
) -> tuple[Tensor, Tensor | None]:
    """Gradients of whole filters from sums (groups, D, 2, N1, N2): the inverse of `transform`."""
    groups, D = sums.shape[:2]
    df = sums.new_empty(D, taps)
    dback = None if taps_reverse is None else sums.new_empty(D, taps_reverse)
    programs = min(D, 2 * multiprocessors(sums.device))
    filter_gradient_kernel[(programs,)](
        sums, df, dback, *factors(size, torch.float16, sums.device, True),
        *_form(df), *_form(dback), D, groups, math.sqrt(size.points), **_constants(sums, size),
    )  # fmt: skip
    return df, dback


def _empty(like: Tensor, rows: int, size: Size) -> Prepared:
    packed = like.new_empty((rows, size.N1, size.N2), dtype=torch.int32)
    return Prepared(packed, like.new_empty(rows, dtype=torch.float32))


def _constants(like: Tensor, size: Size) -> dict[str, Any]:
    return {
        "N1": size.N1, "N2": size.N2, "FAST": like.is_cuda, "PRECISION": "tf32",
        "num_warps": size.warps,
    }  # fmt: skip


def _form(x: Tensor | None) -> tuple[int, int]:
    """Stride of channels and length of a filter; zeros without one."""
    return (0, 0) if x is None else (x.stride(0), x.shape[1])
