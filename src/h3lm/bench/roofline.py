"""The physical floor of a measurement."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from h3lm.bench.measure import median_ms

# bytes per element in a half dtype: q, k, v, o forward; q, k, v, do, dq, dk, dv backward
FORWARD_BYTES = 8
BOTH_BYTES = 22
# of float16 for one product; those of tf32 are half as fast
PRODUCTS = {"half": 1, "pairs": 3, "tf32x3": 6}


def forward_roof_ms(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Time of a kernel that reads q, k, v and writes one tensor like them, and nothing else."""
    from h3lm.flashconv.kernels.roof import product

    o = torch.empty_like(q)
    return median_ms(lambda: product(q, k, v, o))


def both_roof_ms(forward_ms: float) -> float:
    """The same for forward and backward, by bytes."""
    return forward_ms * BOTH_BYTES / FORWARD_BYTES


@dataclass(frozen=True)
class Ceilings:
    """What this GPU gave in this process, on random bfloat16 data.

    Attributes:
        bytes_per_ms: Of a copy, read and written.
        flop_per_ms: Of a product of matrices of 8192 x 8192.
    """

    bytes_per_ms: float
    flop_per_ms: float

    @classmethod
    def measured(cls) -> "Ceilings":
        """Measure them."""
        x = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
        y = torch.empty_like(x)
        a = x[: 1 << 26].view(8192, 8192)
        copy_ms, product_ms = median_ms(lambda: y.copy_(x), 9), median_ms(lambda: a @ a, 9)
        return cls(4 * x.numel() / copy_ms, 2 * 8192**3 / product_ms)

    def __str__(self) -> str:
        tera = self.bytes_per_ms / 1e9, self.flop_per_ms / 1e9
        return f"copies {tera[0]:.2f} TB/s, multiplies {tera[1]:.0f} TFLOP/s in bfloat16"

    def floor_ms(self, elements: int, work: "Work") -> float:
        """Time that the bytes or the matrix operations need, whichever is longer."""
        return elements * max(work.bytes / self.bytes_per_ms, work.flop / self.flop_per_ms)


@dataclass(frozen=True)
class Work:
    """What an element costs: bytes of inputs and outputs, operations on the matrix units."""

    bytes: float
    flop: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flop + other.flop)


def conv_work(size: Any, gates: int) -> tuple[Work, Work]:
    """Forward and backward of a long convolution in a half dtype, with a size of its kernels.

    Forward reads x and each gate and writes y. Backward reads x, dy and the gates and writes the
    gradients of x and the gates; that of the second gate is another forward pass of operations.
    """
    forward, backward = _conv_flop(size)
    again = forward if gates > 1 else 0
    return Work(4 + 2 * gates, forward), Work(6 + 4 * gates, backward + again)


def _conv_flop(size: Any) -> tuple[float, float]:
    """Operations of the matrix products for an element, forward and backward."""
    from h3lm.flashconv.kernels.fft_long import MIN_OUTER, LongSize
    from h3lm.flashconv.kernels.toeplitz_size import ToeplitzSize

    if isinstance(size, ToeplitzSize):
        # blocks above the diagonal are left out, those on it are full
        forward = float(size.behind + size.ahead + 1 + size.tile.T)
        return forward, 2 * forward
    if isinstance(size, LongSize):
        # the inner transforms are of complex rows without zeros, the outer ones padded to 16
        inner, outer = 8 * (size.inner.N1 + size.inner.N2), 4 * max(size.outer, MIN_OUTER)
        products = PRODUCTS[size.inner.precision]
        return 2.0 * products * (inner + outer), 3.0 * products * (inner + outer)
    each = PRODUCTS[size.precision] * (4.0 * size.N1 + 8.0 * size.N2)
    return 2.0 * each, 3.0 * each
