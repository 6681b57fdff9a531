"""Launches of the block FFT for rows that one program holds."""

from typing import Any

import torch
from torch import Tensor

from h3lm.flashconv import fft
from h3lm.flashconv.kernels import fft_triton
from h3lm.flashconv.kernels.fft_filter import (
    Prepared,
    empty_spectrum,
    pack_spectrum,
    transform,
    transform_back,
    unpacked_gradients,
)
from h3lm.flashconv.kernels.fft_size import Size, factors
from h3lm.flashconv.kernels.launch import multiprocessors, strides


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
