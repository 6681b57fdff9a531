"""The memory roof: a kernel that only reads three tensors and writes one."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


@triton.jit
def product_kernel(q, k, v, o, BLOCK: tl.constexpr):
    """Elementwise o = q k v."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o + i, tl.load(q + i) * tl.load(k + i) * tl.load(v + i))


def product(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    """Write q k v to o, all contiguous, of a size that is a multiple of 8192."""
    product_kernel[(q.numel() // BLOCK,)](q, k, v, o, BLOCK=BLOCK, num_warps=8)
