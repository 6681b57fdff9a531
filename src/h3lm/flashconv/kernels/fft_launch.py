"""Launches of the block FFT for rows that one program holds."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from h3lm.flashconv.filters import Filter, FilterGradients
from h3lm.flashconv.kernels import fft_triton
from h3lm.flashconv.kernels.fft_filter import (
    Prepared,
    gradients,
    gradients_by_library,
    prepare_by_library,
    transform,
)
from h3lm.flashconv.kernels.fft_size import Size, factors
from h3lm.flashconv.kernels.launch import multiprocessors, strides


def filter_gradients(u: Tensor, sums: Tensor, filter: Filter, size: Size) -> FilterGradients:
    """Gradients of the parts of a filter from partial sums of conj(Z) G.

    Args:
        u: The rows.
        sums: (groups, D, 2, N1, N2), float32.
        filter: The filter.
        size: Of the transform.
    """
    if size.precision != "tf32x3":
        return gradients(sums, filter, size, factors(size, u.device, True))
    total = sums[0] if len(sums) == 1 else sums.sum(0)
    return filter.gradients(*gradients_by_library(total, filter.taps, filter.taps_reverse))


def forward(
    u: Tensor, spectrum: Prepared, size: Size, pre: Tensor | None, post: Tensor | None
) -> Tensor:
    """Convolve rows of up to the size's points; positions are contiguous."""
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    _convolve(u, y, spectrum, size, pre, post)
    return y


def _convolve(
    u: Tensor,
    y: Tensor,
    spectrum: Prepared,
    size: Size,
    pre: Tensor | None,
    post: Tensor | None,
    other: Tensor | None = None,
    by: Tensor | None = None,
    conjugate: bool = False,
) -> None:
    B, D, L = u.shape
    run = _Run(u, size)
    fft_triton.forward_kernel[(D * run.groups,)](
        u, pre, post, y, other, by, spectrum.packed, spectrum.unscale, *run.tables,
        *strides(u), *strides(pre), *strides(post), *strides(y), *strides(by), B, D, L,
        run.rows_per_program, CONJUGATE=conjugate, **run.constants,
    )  # fmt: skip


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
    shape = (run.groups, D, 2, size.N1, size.N2)
    sums = u.new_empty(shape, dtype=torch.float32) if filters else None
    together = size.together and data and filters
    if du is not None and not together:
        _convolve(dy, du, spectrum, size, post, pre, dpre, u, conjugate=True)
    if filters:
        fft_triton.backward_kernel[(D * run.groups,)](
            dy, u, pre, post, du, dpre, sums, None, None,
            spectrum.packed, spectrum.unscale, None, None, *run.tables,
            *strides(dy), *strides(u), *strides(pre), *strides(post), *strides(du),
            B, D, L, run.rows_per_program, DATA=together, OUTER=1, **run.constants,
        )  # fmt: skip
    return du, dpre, sums


def prepare(u: Tensor, filter: Filter, size: Size, backward: bool = False) -> Prepared:
    """The spectrum of a filter, for rows like u and their gradients."""
    if size.precision == "tf32x3":
        return prepare_by_library(*filter.folded(), size)
    return transform(filter, size, factors(size, u.device, True))


class _Run:
    """What the launches for one tensor have in common."""

    def __init__(self, u: Tensor, size: Size) -> None:
        B, D, L = u.shape
        self.rows_per_program, self.groups = rows_per_program(u.device, size, B, D)
        self.tables = factors(size, u.device, True)
        self.constants = _constants(size, size.points == L, size.fast(u))


@cache
def _constants(size: Size, even: bool, fast: bool) -> dict[str, Any]:
    return {
        "N1": size.N1, "N2": size.N2, "REAL": True, "SCALED": size.precision != "tf32x3",
        "EVEN": even, "FAST": fast, "KEEP": size.keep and size.precision == "half",
        "PRECISION": size.precision, "APART": size.apart,
        "AHEAD": size.ahead, "num_warps": size.warps, "maxnreg": size.registers,
    }  # fmt: skip


def rows_per_program(device: torch.device, size: Size, rows: int, channels: int) -> tuple[int, int]:
    """Rows that a program takes, and programs of a channel: as few as fill the GPU."""
    groups = min(rows, -(-size.programs * multiprocessors(device) // channels))
    each = -(-rows // groups)
    return each, -(-rows // each)
