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
    join_columns,
    load_factors,
    power_of_two,
    to_spectrum,
    to_unit,
)


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
    k1, column = tl.arange(0, N1), tl.arange(0, 2 * N2)
    F, W = load_factors(F_table, W_table, N1, N2, K)
    position = tl.arange(0, K)[:, None] * N2 + tl.arange(0, N2)[None, :]
    inside = position < L
    value = tl.load(x + channel * x_channel + position, inside, 0.0).to(tl.float32)
    if REAL:
        exponent = exponent_of(value, inside)
        value *= to_unit(exponent)
    else:
        exponent = tl.load(exponents + channel // N0)
    zero = tl.program_id(0) >> 31
    re, im = to_spectrum(value.to(F.dtype), F, W, zero, N1, N2, REAL, FAST, PRECISION)
    if REAL:
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
    sums, exponents, out, F_table, W_table, out_channel, L, root,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, REAL: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of `spectrum_kernel`: the real part of what has the spectrum `sums`.

    A whole filter comes out as it is, the N0 complex rows of one scaled by `exponents`.
    """
    K: tl.constexpr = N1 if REAL else 2 * N1
    channel = tl.program_id(0).to(tl.int64)
    F, W = load_factors(F_table, W_table, N1, N2, K)
    points = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    sums += channel * (2 * N1 * N2)
    re, im = tl.load(sums + points), tl.load(sums + N1 * N2 + points)
    if REAL:
        exponent = exponent_of(tl.maximum(tl.abs(re), tl.abs(im)), points >= 0)
    else:
        exponent = tl.load(exponents + channel // N0)
    scale, zero = to_unit(exponent), tl.program_id(0) >> 31
    value = from_spectrum(re * scale, im * scale, F, W, zero, N1, N2, REAL, FAST, PRECISION)
    if REAL:
        value *= power_of_two(exponent) * root
    position = tl.arange(0, K)[:, None] * N2 + tl.arange(0, N2)[None, :]
    out += channel * out_channel
    tl.store(out + position, value.to(out.dtype.element_ty), position < L)


@triton.jit
def place(frequency, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, HALF: tl.constexpr):
    """Where the parts of frequency k0 + N0 (k1 + N1 k2) stand among those of a filter.

    HALF: as `load_spectrum` reads them; else (N0, 2, N1, N2).
    """
    k0, k1, k2 = frequency % N0, frequency // N0 % N1, frequency // (N0 * N1)
    if HALF:
        re = (k0 * N1 + k1) * (2 * N2) + 16 * (k2 // 8) + k2 % 8
        return re, re + 8
    else:
        re = (k0 * (2 * N1) + k1) * N2 + k2
        return re, re + N1 * N2


@triton.jit(do_not_specialize=["headroom"])
def pack_kernel(
    spectrum, peak, packed, unscale, n, headroom,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Order a filter's spectrum as `load_spectrum` reads it, and scale it.

    `headroom` is h; float32 is left as it is.
    """
    filter_index = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # k0 + N0 k1
    frequency = row + N0 * N1 * tl.arange(0, N2)[:, None]
    at = spectrum + filter_index * (2 * n) + 2 * frequency
    to_re, to_im = place(frequency, N0, N1, N2, HALF)
    factor, back = 1.0, 1.0
    if HALF:
        exponent = (tl.load(peak + filter_index).to(tl.int32, bitcast=True) >> 23) & 0xFF
        factor = to_unit(exponent) * power_of_two(127 + headroom)
        back = power_of_two(exponent) * power_of_two(127 - headroom)
    packed += filter_index * (2 * n)
    tl.store(packed + to_re, (tl.load(at) * factor).to(packed.dtype.element_ty))
    tl.store(packed + to_im, (tl.load(at + 1) * factor).to(packed.dtype.element_ty))
    if tl.program_id(1) == 0:
        # one for each transform: the kernels index both by channel
        for k0 in range(N0):
            tl.store(unscale + filter_index * N0 + k0, back)


@triton.jit
def unpack_kernel(
    sums, spectrum, n,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The order of float32 that `pack_kernel` makes, back to the natural one."""
    filter_index = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    frequency = row + N0 * N1 * tl.arange(0, N2)[:, None]
    from_re, from_im = place(frequency, N0, N1, N2, False)
    sums += filter_index * (2 * n)
    out = spectrum + filter_index * (2 * n) + 2 * frequency
    tl.store(out, tl.load(sums + from_re))
    tl.store(out + 1, tl.load(sums + from_im))


class Prepared(NamedTuple):
    """Filters' spectra as the kernels read them.

    Attributes:
        packed: float16 (D N0, N1, 2 N2) for half inputs, float32 (D N0, 2, N1, N2) else.
        unscale: What outputs are multiplied with, (D N0,), float32.
    """

    packed: Tensor
    unscale: Tensor


def headroom(points: int) -> int:
    """The h with which no product of spectra overflows float16, see `fft_triton`."""
    return math.floor(math.log2(65504 / (8 * math.sqrt(points))))


def prepare_by_library(
    f: Tensor, f_reverse: Tensor | None, size: Size, half: bool, outer: int = 1
) -> Prepared:
    """Spectra for transforms of `outer` times the size's points, by torch.fft in float32."""
    D, points = f.shape[0], outer * size.points
    spectrum = torch.view_as_real(_spectrum(f, f_reverse, points))
    shape = (D * outer, size.N1, 2 * size.N2) if half else (D * outer, 2, size.N1, size.N2)
    packed = f.new_empty(shape, dtype=torch.float16 if half else torch.float32)
    unscale = f.new_empty(D * outer)
    peak = unscale
    if half:
        lowest, highest = spectrum.flatten(1).aminmax(dim=1)
        peak = torch.maximum(-lowest, highest)
    block = min(32, outer * size.N1)
    pack_kernel[(D, outer * size.N1 // block)](
        spectrum, peak, packed, unscale, points, headroom(points),
        N0=outer, N1=size.N1, N2=size.N2, BLOCK=block, HALF=half,
    )  # fmt: skip
    return Prepared(packed, unscale)


def gradients_by_library(
    total: Tensor, taps: int, taps_reverse: int | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of both filters from sums (D, N0, 2, N1, N2), in float32 by torch.fft."""
    D, outer, _, N1, N2 = total.shape
    n = outer * N1 * N2
    spectrum = total.new_empty(D, n, 2)
    block = min(32, outer * N1)
    unpack_kernel[(D, outer * N1 // block)](total, spectrum, n, N0=outer, N1=N1, N2=N2, BLOCK=block)
    moved = torch.fft.ifft(torch.view_as_complex(spectrum), norm="forward")
    moved *= torch.conj_physical(_quarter_turns(n, total.device))
    df = moved.real[:, :taps].contiguous()
    if taps_reverse is None:
        return df, None
    ahead = -moved.imag[:, n - taps_reverse + 1 :].flip(1)
    return df, torch.cat([df[:, :1], ahead], 1)


def _spectrum(f: Tensor, f_reverse: Tensor | None, points: int) -> Tensor:
    """Values of the filters' polynomials where t^points = i, (D, points), complex64.

    There a lag of -s is t^-s = -i t^(points - s).
    """
    x = f.new_zeros(f.shape[0], points, 2)
    x[:, : f.shape[1], 0] = f
    if f_reverse is not None:
        x[:, 0, 0] += f_reverse[:, 0]
        x[:, points - f_reverse.shape[1] + 1 :, 1] = -f_reverse[:, 1:].flip(1)
    return torch.fft.fft(torch.view_as_complex(x) * _quarter_turns(points, f.device))


def _quarter_turns(points: int, device: torch.device) -> Tensor:
    """What brings frequencies k - 1/4 to k; made in float64."""
    angle = torch.arange(points, dtype=torch.float64, device=device) * (math.pi / 2 / points)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


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
    real = exponents is None
    points = outer * size.points
    spectrum_kernel[(len(prepared.unscale),)](
        x, exponents, sums, *prepared, *tables,
        *((x.stride(0), x.shape[1]) if real else (2 * size.points, 2 * size.points)),
        math.sqrt(points), headroom(points),
        N0=outer, N1=size.N1, N2=size.N2, REAL=real, FAST=x.is_cuda, PRECISION="tf32",
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
    real = exponents is None
    filter_gradient_kernel[(len(total) * outer,)](
        total, exponents, out, *tables,
        *((out.stride(0), out.shape[1]) if real else (2 * size.points, 2 * size.points)),
        math.sqrt(outer * size.points),
        N0=outer, N1=size.N1, N2=size.N2, REAL=real, FAST=total.is_cuda,
        PRECISION="tf32", num_warps=size.warps,
    )  # fmt: skip
