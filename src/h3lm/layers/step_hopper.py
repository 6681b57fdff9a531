"""Products of few rows on Hopper, in Gluon: weights are in shared memory when the inputs come.

`step_triton.product_kernel` can ask for its weights in front of the wait for x no closer than the
L2 cache, because there the compiler orders copies. Here the first tiles of weights go to shared
memory in front of it, by TMA, and behind it only x and the later ones are still to come.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from h3lm.flashconv.kernels.overlap import fetch, wait_for_inputs
from h3lm.layers.step_triton import tanh_gelu

TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def expect_tile(matrix, barriers, i, steps, STAGES: gl.constexpr):
    """Say that tile i of an operand will come, if there is one."""
    mbarrier.expect(barriers.index(i % STAGES), matrix.block_type.nbytes, pred=i < steps)


@gluon.jit
def copy_tile(matrix, tiles, barriers, i, row, begin, steps, STAGES: gl.constexpr):
    """Start the copy of tile i of an operand, whose inputs go on from `begin`."""
    s = i % STAGES
    at = begin + i * matrix.block_shape[1]
    tma.async_copy_global_to_shared(
        matrix, [row, at], barriers.index(s), tiles.index(s), pred=i < steps
    )  # fmt: skip


@gluon.jit
def make_ring(matrix, STAGES: gl.constexpr):
    """Shared memory for tiles of an operand, and a barrier for each."""
    tiles = gl.allocate_shared_memory(
        matrix.dtype, [STAGES, matrix.block_shape[0], matrix.block_shape[1]], matrix.layout
    )  # fmt: skip
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(barriers.index(s), count=1)
    return tiles, barriers


@gluon.jit
def fetch_weights(
    weights, first, begin, end, N, K, COLUMNS: gl.constexpr, DEPTH: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Ask for weights of a program's outputs to be brought to the L2 cache, line by line."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [WARPS, 1], [0, 1])
    LINE: gl.constexpr = 64
    column = gl.minimum(first + gl.arange(0, COLUMNS, gl.SliceLayout(1, layout)), N - 1)
    line = gl.arange(0, DEPTH // LINE, gl.SliceLayout(0, layout)) * LINE
    for at in range(begin, end, DEPTH):
        where = column.to(gl.int64)[:, None] * K + gl.minimum(at + line, K - 1)[None, :]
        fetch(weights + where, True)


@gluon.jit(do_not_specialize=["ahead", "first"])
def product_kernel(
    x, weight, weights, bias, y, M, N, K, depth_of_part, ahead, first,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, WHOLE: gl.constexpr,
    BIAS: gl.constexpr, GELU: gl.constexpr, STAGES: gl.constexpr, X_STAGES: gl.constexpr,
    WARPS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Product x weight^T of tiles that TMA brings, with bias and GELU if WHOLE; else a part.

    x and weight are descriptors of boxes [ROWS, DEPTH] and [COLUMNS, DEPTH]; what lies outside of
    the matrices comes as zero.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, WARPS // 4], [16, COLUMNS // (WARPS // 4), 16]
    )
    out: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
    part = gl.program_id(1)
    left = gl.program_id(0) * COLUMNS
    begin = part * depth_of_part
    steps = gl.cdiv(min(depth_of_part, K - begin), DEPTH)
    w_tiles, w_barriers = make_ring(weight, STAGES)
    x_tiles, x_barriers = make_ring(x, X_STAGES)
    for i in gl.static_range(STAGES):
        expect_tile(weight, w_barriers, i, steps, STAGES)
    for i in gl.static_range(X_STAGES):
        expect_tile(x, x_barriers, i, steps, X_STAGES)
    for i in gl.static_range(STAGES):
        copy_tile(weight, w_tiles, w_barriers, i, left, begin, steps, STAGES)
    if EARLY:
        fetch_weights(
            weights, left, begin + STAGES * DEPTH, begin + min(ahead, depth_of_part), N, K,
            COLUMNS, DEPTH, WARPS,
        )  # fmt: skip
    wait_for_inputs(first, EARLY)
    for i in gl.static_range(X_STAGES):
        copy_tile(x, x_tiles, x_barriers, i, 0, begin, steps, X_STAGES)

    total = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    for step in range(steps):
        mbarrier.wait(w_barriers.index(step % STAGES), (step // STAGES) & 1)
        mbarrier.wait(x_barriers.index(step % X_STAGES), (step // X_STAGES) & 1)
        w_tile = w_tiles.index(step % STAGES).permute((1, 0))
        total = warpgroup_mma(x_tiles.index(step % X_STAGES), w_tile, total, is_async=True)
        total = warpgroup_mma_wait(1, deps=[total])
        gl.thread_barrier()  # all warps are done with the tiles before these
        if step > 0:
            w_next = step - 1 + STAGES
            x_next = step - 1 + X_STAGES
            expect_tile(weight, w_barriers, w_next, steps, STAGES)
            expect_tile(x, x_barriers, x_next, steps, X_STAGES)
            copy_tile(weight, w_tiles, w_barriers, w_next, left, begin, steps, STAGES)
            copy_tile(x, x_tiles, x_barriers, x_next, 0, begin, steps, X_STAGES)
    total = warpgroup_mma_wait(0, deps=[total])

    total = gl.convert_layout(total, out)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, out))
    column = left + gl.arange(0, COLUMNS, gl.SliceLayout(0, out))
    mask = (row < M)[:, None] & (column < N)[None, :]
    at = row.to(gl.int64)[:, None] * N + column[None, :]
    if WHOLE:
        if BIAS:
            total += gl.load(bias + column, mask=column < N, other=0.0).to(gl.float32)[None, :]
        if GELU:
            total = tanh_gelu(total)
        gl.store(y + at, total.to(y.dtype.element_ty), mask=mask)
    else:
        gl.store(y + part.to(gl.int64) * M * N + at, total, mask=mask)


def launch(
    grid: tuple[int, int],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    depth_of_part: int,
    columns: int,
    depth: int,
    stages: int,
    x_stages: int,
    choices: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Launch the kernel for `step_triton.product`: 64 rows at most, K a multiple of 8."""
    (M, K), N = x.shape, weight.shape[0]
    x_box = TensorDescriptor.from_tensor(x, [64, depth], TILE)
    w_box = TensorDescriptor.from_tensor(weight, [columns, depth], TILE)
    product_kernel[grid](
        x_box, w_box, weight, bias, y, M, N, K, depth_of_part, ROWS=64, COLUMNS=columns,
        DEPTH=depth, STAGES=stages, X_STAGES=x_stages, WARPS=options["num_warps"],
        **choices, **options,
    )  # fmt: skip
