"""Launches of the block FFT: sizes, tables of factors, spectra, and the way around the kernels."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from h3lm.flashconv import fft
from h3lm.flashconv.kernels import fft_triton
from h3lm.flashconv.kernels.launch import multiprocessors, strides

MAX_LENGTH = 4096  # of rows that one program transforms at once


@dataclass(frozen=True)
class Size:
    """Factors of a transform of n = N1 N2 points, and how its kernels are launched.

    Attributes:
        N1: Rows; at least 64, that a warp group's products are full.
        N2: Columns, at least 16.
        warps: N1 / 16: a thread then holds both parts of a point.
        stages: Row pairs in flight.
        together: Whether one backward kernel makes the gradients of rows and filter.
        registers: Most registers of a thread; None leaves them to the compiler.
    """

    N1: int
    N2: int
    warps: int
    stages: int = 1
    together: bool = False
    registers: int | None = None

    @property
    def points(self) -> int:
        """n, twice the longest row."""
        return self.N1 * self.N2


# by transform size; measured on an H200, see docs/log.md
SIZES = {
    1024: Size(64, 16, 4, together=True),
    2048: Size(64, 32, 4, together=True),
    4096: Size(64, 64, 4, together=True),
    8192: Size(128, 64, 8, together=True),
}


def size_for(length: int) -> Size:
    """The smallest transform whose zero half holds what a row's convolution reaches beyond it.

    Raises:
        ValueError: if the row is too long for one program.
    """
    for points, size in SIZES.items():
        if 2 * length <= points:
            return size
    raise ValueError(f"rows of {length} are over {MAX_LENGTH}, the most that one program holds")


@cache
def factors(size: Size, dtype: torch.dtype, device: torch.device, full: bool) -> tuple[Tensor, ...]:
    """The two unitary factors as real matrices, see `fft_triton`; made in float64.

    F is (2 N1, K) with rows (part, k1) and columns (row of the pair, l1), l1 < N1 / 2 unless
    `full`. W is (2 N2, 2 N2) with rows of l2 and columns of k2 in the kernels' order of parts.
    """
    N1, N2 = size.N1, size.N2
    rows = N1 if full else N1 // 2
    first = unitary_dft(N1)[:, :rows]
    F = torch.cat([torch.cat([first.real, -first.imag], 1), torch.cat([first.imag, first.real], 1)])
    second = unitary_dft(N2)
    parts = torch.stack(
        [
            torch.stack([second.real, second.imag], -1),
            torch.stack([-second.imag, second.real], -1),
        ],
        1,
    )  # [l2, part of l2, k2, part of k2]
    W = parts.unflatten(2, (-1, 8)).unflatten(0, (-1, 8))  # [j, i, part, j', i', part']
    W = W.permute(0, 2, 1, 3, 5, 4).reshape(2 * N2, 2 * N2)
    return F.to(device, dtype).contiguous(), W.to(device, dtype).contiguous()


def unitary_dft(n: int) -> Tensor:
    """The unitary DFT matrix."""
    k = torch.arange(n, dtype=torch.float64)
    return torch.polar(
        torch.full((n, n), n**-0.5, dtype=torch.float64), -2 * math.pi / n * (k[:, None] * k % n)
    )


def headroom(length: int) -> int:
    """The h with which no product of spectra overflows float16, see `fft_triton`."""
    return math.floor(math.log2(65504 / (8 * math.sqrt(length))))


class Prepared(NamedTuple):
    """Filters' spectra as the kernels read them.

    Attributes:
        packed: float16 (D N0, N1, 2 N2) for half inputs, float32 (D N0, 2, N1, N2) else.
        unscale: What outputs are multiplied with, (D N0,), float32.
    """

    packed: Tensor
    unscale: Tensor


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
    fft_triton.pack_kernel[(D, outer * size.N1 // block)](
        pairs, peak, packed, unscale, points, headroom(points // 2),
        N0=outer, N1=size.N1, N2=size.N2, BLOCK=block, HALF=half,
    )  # fmt: skip
    return Prepared(packed, unscale)


def filter_gradients(
    u: Tensor, sums: Tensor, size: Size, taps: int, taps_reverse: int | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of both filters from partial sums of conj(Z) G.

    Args:
        u: The rows.
        sums: (groups, D, 1, 2, N1, N2), float32.
        size: Of the transform.
        taps: Taps of the filter.
        taps_reverse: Taps of the reverse one.
    """
    total = sums[0] if len(sums) == 1 else sums.sum(0)
    if taps_reverse is not None or u.dtype == torch.float32:
        return unpacked_gradients(total, taps, taps_reverse)
    df = total.new_empty(len(total), taps)
    transform_back(total, df, size, factors(size, torch.float16, u.device, False))
    return df, None


def unpacked_gradients(
    total: Tensor, taps: int, taps_reverse: int | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of both filters from sums (D, N0, 2, N1, N2), in float32 by torch.fft."""
    D, outer, _, N1, N2 = total.shape
    n = outer * N1 * N2
    spectrum = total.new_empty(D, n // 2 + 1, 2)
    block = min(32, outer * N1)
    fft_triton.unpack_kernel[(D, outer * N1 // block)](
        total, spectrum, n, N0=outer, N1=N1, N2=N2, BLOCK=block
    )
    moved = torch.fft.irfft(torch.view_as_complex(spectrum), n=n, norm="forward")
    return fft.filter_gradients(total, moved, n, taps, taps_reverse)


def forward(
    u: Tensor, spectrum: Prepared, size: Size, pre: Tensor | None, post: Tensor | None
) -> Tensor:
    """Convolve rows of up to half of the size's points; positions are contiguous."""
    B, D, L = u.shape
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    run = _Run(u, size)
    fft_triton.forward_kernel[(D * run.groups,)](
        u, pre, post, y, spectrum.packed, spectrum.unscale, *run.tables,
        *strides(u), *strides(pre), *strides(post), *strides(y), 2, B, D, L,
        run.pairs, run.pairs_per_program, **run.constants,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor,
    u: Tensor,
    spectrum: Prepared,
    size: Size,
    pre: Tensor | None,
    post: Tensor | None,
    *,
    data: bool,
    filters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of rows and first gate (`data`); partial sums of conj(Z) G (`filters`)."""
    B, D, L = u.shape
    run = _Run(u, size)
    du = torch.empty_like(u, memory_format=torch.contiguous_format) if data else None
    dpre = torch.empty_like(du) if du is not None and pre is not None else None
    shape = (run.groups, D, 1, 2, size.N1, size.N2)
    sums = u.new_empty(shape, dtype=torch.float32) if filters else None
    passes = [(data, filters)] if size.together else [(data, False), (False, filters)]
    for with_data, with_filter in passes:
        if with_data or with_filter:
            fft_triton.backward_kernel[(D * run.groups,)](
                dy, u, pre, post, du, dpre, sums, spectrum.packed, spectrum.unscale, None,
                *run.tables, *strides(dy), *strides(u), *strides(pre), *strides(post), *strides(du),
                2, B, D, L, run.pairs, run.pairs_per_program, DATA=with_data, FILTER=with_filter,
                **run.constants,
            )  # fmt: skip
    return du, dpre, sums


def prepare(u: Tensor, f: Tensor, f_reverse: Tensor | None, size: Size) -> Prepared:
    """The spectrum of a filter that reaches both ways, for rows like u."""
    half = u.dtype != torch.float32
    if f_reverse is not None or not half:
        return pack_spectrum(fft.filter_spectrum(f, f_reverse, size.points), size, half)
    f = f if f.stride(1) == 1 else f.contiguous()
    prepared = empty_spectrum(f, size)
    transform(f, prepared, size, factors(size, torch.float16, f.device, False))
    return prepared


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
    fft_triton.spectrum_kernel[(len(prepared.unscale),)](
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
    fft_triton.filter_gradient_kernel[(len(total) * outer,)](
        total, exponents, out, *tables,
        out.stride(0) if whole else 2 * size.points, 0 if whole else size.points,
        out.shape[1] if whole else size.points, math.sqrt(outer * size.points),
        N0=outer, N1=size.N1, N2=size.N2, K=tables[0].shape[1], FAST=total.is_cuda,
        PRECISION="tf32", num_warps=size.warps,
    )  # fmt: skip


class _Run:
    """What the launches for one tensor have in common."""

    def __init__(self, u: Tensor, size: Size) -> None:
        B, D, L = u.shape
        half = u.dtype != torch.float32
        self.pairs = -(-B // 2)
        slots = 2 * multiprocessors(u.device)
        groups = min(self.pairs, -(-slots // D))
        self.pairs_per_program = -(-self.pairs // groups)
        self.groups = -(-self.pairs // self.pairs_per_program)
        self.tables = factors(size, torch.float16 if half else torch.float32, u.device, False)
        self.constants: dict[str, Any] = {
            "N1": size.N1, "N2": size.N2, "K": size.N1, "HALF": half, "SCALED": half,
            "EVEN": B % 2 == 0 and size.points == 2 * L, "FAST": half and u.is_cuda,
            "PRECISION": "tf32" if half else "tf32x3", "STAGES": size.stages,
            "num_warps": size.warps, "maxnreg": size.registers,
        }  # fmt: skip
