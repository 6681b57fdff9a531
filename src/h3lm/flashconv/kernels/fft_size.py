"""Sizes of the block FFT's transforms, and the tables of their factors."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from h3lm.flashconv.dispatch import FFT_LENGTHS

# what products are made of, see `fft_triton`
Precision = Literal["half", "pairs", "tf32x3"]

# what the transforms of real rows add to an index of frequency, see `fft_triton`
SHIFT = -0.25


@dataclass(frozen=True)
class Size:
    """Factors of a transform of n = N1 N2 points, and how its kernels are launched.

    Attributes:
        N1: Rows; at least 64, that a warp group's products are full.
        N2: Columns, at least 16.
        warps: N1 / 16: a thread then holds both parts of a point.
        ahead: Whether a row is loaded while the one before is convolved.
        together: Whether one backward kernel makes the gradients of rows and filter.
        registers: Most registers of a thread; None leaves them to the compiler.
        keep: Whether programs keep the turns, in float16, instead of making them for each row.
        programs: Programs of a multiprocessor that the rows are divided for.
        precision: What its products are made of.
        apart: Whether real and imaginary parts are tiles of their own, see `fft_triton`; of pairs.
    """

    N1: int
    N2: int
    warps: int
    ahead: bool = False
    together: bool = False
    registers: int | None = None
    keep: bool = False
    programs: int = 2
    precision: Precision = "half"
    apart: bool = False

    @property
    def points(self) -> int:
        """n, the longest row."""
        return self.N1 * self.N2

    def fast(self, x: Tensor) -> bool:
        """Whether turns are made by the approximation that a GPU has."""
        return self.precision == "half" and x.is_cuda


# by transform size; measured on an H200, see docs/log.md
SIZES = {
    512: Size(32, 16, 2, together=True),
    1024: Size(64, 16, 4, together=True),
    2048: Size(64, 32, 4, together=True),
    4096: Size(64, 64, 4, together=True),
    8192: Size(128, 64, 8, together=True),
}
# what is different for pairs
_OF_PAIRS: dict[int, dict[str, Any]] = {
    512: {"apart": True},
    4096: {"apart": True, "together": False},
    8192: {"apart": True, "together": False},
}
# operands take twice the shared memory as pairs, four times as tf32x3
_PRECISION: dict[torch.dtype, Precision] = {
    torch.bfloat16: "half", torch.float16: "pairs", torch.float32: "tf32x3"
}  # fmt: skip
MOST_POINTS = {_PRECISION[dtype]: large for dtype, (large, _) in FFT_LENGTHS.items()}


def precision_of(dtype: torch.dtype) -> Precision:
    """What products are made of for rows of a dtype, so that they are right to its last place."""
    return _PRECISION[dtype]


def sizes(precision: Precision) -> dict[int, Size]:
    """Sizes of rows that one program holds, by their points."""
    most, changes = MOST_POINTS[precision], _OF_PAIRS if precision == "pairs" else {}
    return {
        n: replace(size, precision=precision, **changes.get(n, {}))
        for n, size in SIZES.items()
        if n <= most
    }


@cache
def size_for(length: int, precision: Precision) -> Size:
    """The smallest transform that holds a row.

    Raises:
        ValueError: if the row is too long for one program.
    """
    for points, size in sizes(precision).items():
        if length <= points:
            return size
    most = MOST_POINTS[precision]
    raise ValueError(f"rows of {length} are over {most}, the most that one program holds")


@cache
def factors(size: Size, device: torch.device, real: bool) -> tuple[Tensor, ...]:
    """The two unitary factors as real matrices, see `fft_triton`; made in float64.

    F has rows (part, k1). For real rows its columns are l1, else (part, l1). W is (2 N2, 2 N2) with
    rows of l2 and columns of k2 in the kernels' order of parts, (2, N2, N2) if they are apart. Each
    as `as_operands` makes it.
    """
    first = unitary_dft(size.N1, SHIFT if real else 0.0)
    F = torch.cat([first.real, first.imag])
    if not real:
        F = torch.cat([F, torch.cat([-first.imag, first.real])], 1)
    second = unitary_dft(size.N2)
    if size.apart:
        W = torch.stack([second.real, second.imag])
        return tuple(as_operands(x, size.precision).to(device) for x in (F, W))
    parts = torch.stack(
        [
            torch.stack([second.real, second.imag], -1),
            torch.stack([-second.imag, second.real], -1),
        ],
        1,
    )  # [l2, part of l2, k2, part of k2]
    W = parts.unflatten(2, (-1, 8)).unflatten(0, (-1, 8))  # [j, i, part, j', i', part']
    W = W.permute(0, 2, 1, 3, 5, 4).reshape(2 * size.N2, 2 * size.N2)
    return tuple(as_operands(x, size.precision).to(device) for x in (F, W))


def as_operands(x: Tensor, precision: Precision) -> Tensor:
    """A float64 matrix as products take it; both halves of pairs one after the other."""
    if precision == "tf32x3":
        return x.float().contiguous()
    high = x.half()
    if precision == "half":
        return high.contiguous()
    return torch.stack([high, (2048 * (x - high)).half()])


def unitary_dft(n: int, shift: float = 0.0) -> Tensor:
    """The unitary DFT matrix, of frequencies k + shift."""
    l = torch.arange(n, dtype=torch.float64)
    turns = (l[:, None] * l) % n + shift * l
    return torch.polar(torch.full_like(turns, n**-0.5), -2 * math.pi / n * turns)
