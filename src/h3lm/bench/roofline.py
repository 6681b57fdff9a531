"""The physical floor of a measurement."""

import torch
from torch import Tensor

from h3lm.bench.measure import median_ms

# bytes per element in a half dtype: q, k, v, o forward; q, k, v, do, dq, dk, dv backward
FORWARD_BYTES = 8
BOTH_BYTES = 22


def forward_roof_ms(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Time of a kernel that reads q, k, v and writes one tensor like them, and nothing else."""
    from h3lm.flashconv.kernels.roof import product

    o = torch.empty_like(q)
    return median_ms(lambda: product(q, k, v, o))


def both_roof_ms(forward_ms: float) -> float:
    """The same for forward and backward, by bytes."""
    return forward_ms * BOTH_BYTES / FORWARD_BYTES
