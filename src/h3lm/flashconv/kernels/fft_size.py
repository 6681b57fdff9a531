"""Sizes of the block FFT's transforms, and the tables of their factors."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

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
