# ruff: noqa: SIM108  (compile-time branches are kept apart from run-time ones)
"""State passing forward for heads of 8 channels on Hopper, in Gluon; mathematics of `heads_triton`.

A program walks along rows of the batch for one head. Matrices lie [time or state, pair]: the
operators are left operands and stay in registers for the whole walk, the right ones, w and the
state in the dtype of the inputs, pass through shared memory. A thread holds all products that
differ only in i, so the sum over i is its own:

    o_j = sum_i q_i y_ij;   y = M w + P x;   x <- decay x + K w;   w_ij = s_i v_j

While a chunk's products run, the w of the next chunk is formed. One barrier stands in a chunk:
before it w and x have been written, and the copies of the next chunk have arrived; what is written
behind it goes to the buffers that the chunk before read.

Whole chunks of rows only; the rest, and the backward pass, are plain Triton's.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from h3lm.flashconv.kernels import filter_triton, heads_triton
from h3lm.flashconv.kernels.launch import Operators, multiprocessors, strides
from h3lm.flashconv.kernels.tile import T, mode_of_row, part_of_row, place

HEAD_DIM = gl.constexpr(8)
PAIRS = gl.constexpr(64)
N = gl.constexpr(64)
STAGES = gl.constexpr(4)  # chunks whose inputs are in shared memory or on their way
PROGRAMS = 3  # that fit on a multiprocessor, with so many registers for a thread
FORWARD = {"num_warps": 4, "maxnreg": 168}

SQUARE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, PRODUCT, k_width=2))
COPY = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
# [i, j, time]: 8 times and 2 x 2 pairs in a thread, the lanes of a quarter warp along time
PRODUCTS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 1, 0], [1, 0, 0]],
        [[0, 0, 8], [0, 0, 16], [0, 0, 32], [0, 2, 0], [2, 0, 0]],
        [[0, 4, 0], [4, 0, 0]],
        [],
        [8, 8, 64],
    )
)
# [time, i, j] of a product whose row 16 w + 8 h + g is time 16 w + 2 g + h
READ_OUT = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 0, 2], [0, 0, 4], [2, 0, 0], [4, 0, 0], [8, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, 8, 8],
    )
)
# the same without i, two times side by side in a thread
OUTPUT = gl.constexpr(
    gl.DistributedLinearLayout(
        [[1, 0], [0, 1]],
        [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 8],
    )
)
# [mode, pair] of a product whose rows are states in the order of `tile`
MODES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 8], [0, 16], [0, 32]],
        [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[8, 0], [16, 0]],
        [],
        [32, 64],
    )
)


@gluon.jit
def time_of_row(row):
    """Time of a product's row: the two of a thread stand side by side."""
    return row // 16 * 16 + row % 8 * 2 + row // 8 % 2


@gluon.jit
def state_offsets():
    """Where the states of a product [state, pair] lie in memory, (pairs, N/2, 2)."""
    state = gl.arange(0, N, gl.SliceLayout(1, PRODUCT))
    state = (2 * mode_of_row(state) + part_of_row(state))[:, None]
    return gl.arange(0, PAIRS, gl.SliceLayout(0, PRODUCT))[None, :] * N + state


@gluon.jit
def turned(x, re, im):
    """States [N, pairs] times a complex number for each mode."""
    parts = gl.permute(gl.reshape(x, [N // 16, 2, 8, PAIRS]), (0, 2, 3, 1))
    x_re, x_im = gl.split(gl.reshape(parts, [N // 2, PAIRS, 2]))
    x_re = place(x_re, MODES)
    x_im = place(x_im, MODES)
    y = gl.join(re * x_re - im * x_im, re * x_im + im * x_re)
    y = gl.permute(gl.reshape(y, [N // 16, 8, PAIRS, 2]), (0, 3, 1, 2))
    return place(gl.reshape(y, [N, PAIRS]), PRODUCT)


@gluon.jit
def read_out(y, gate):
    """The sum over i of q_i y_ij, [time, j], of y [row, pair] and q [time, i, 1]."""
    y = gl.permute(gl.reshape(y, [T // 16, 2, 8, HEAD_DIM, HEAD_DIM]), (0, 2, 1, 3, 4))
    y = place(gl.reshape(y, [T, HEAD_DIM, HEAD_DIM]), READ_OUT)
    return gl.convert_layout(gl.sum(y * gate, 1), OUTPUT)


@gluon.jit
def copy_chunk(tile, pointer, row, head, chunk, row_stride, channel_stride):
    """Start the copy of a chunk of a head, [channel, time]."""
    channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(1, COPY))[:, None]
    time = gl.arange(0, T, gl.SliceLayout(0, COPY))[None, :]
    base = row.to(gl.int64) * row_stride + (head * HEAD_DIM).to(gl.int64) * channel_stride
    at = pointer + (base + chunk * T) + (channel * channel_stride + time)
    async_copy.async_copy_global_to_shared(tile, at)


@gluon.jit
def copy_next(
    q, s, v, q_tiles, s_tiles, v_tiles, stage, row, behind, head, chunk, chunks,
    q_row, q_channel, s_row, s_channel, v_row, v_channel,
):  # fmt: skip
    """Start the copies of a chunk, if there is one; returns row and number of the one behind it."""
    if row < behind:
        copy_chunk(s_tiles.index(stage), s, row, head, chunk, s_row, s_channel)
        copy_chunk(v_tiles.index(stage), v, row, head, chunk, v_row, v_channel)
        copy_chunk(q_tiles.index(stage), q, row, head, chunk, q_row, q_channel)
    async_copy.commit_group()
    last = chunk + 1 == chunks
    return gl.where(last, row + 1, row), gl.where(last, 0, chunk + 1)


@gluon.jit
def form_products(s_tile, v_tile, w_tile):
    """W [pair, time], the products s_i v_j, from a chunk of s and v [channel, time]."""
    s = gl.expand_dims(s_tile.load(gl.SliceLayout(1, PRODUCTS)), 1)
    v = gl.expand_dims(v_tile.load(gl.SliceLayout(0, PRODUCTS)), 0)
    w_tile.store(gl.reshape(s * v, [PAIRS, T]))


@gluon.jit(do_not_specialize=["B", "H", "rows", "chunks"])
def forward_kernel(
    q, s, v, o, M, K, P, decay, start, end,
    q_row, q_channel, s_row, s_channel, v_row, v_channel, B, H, L, rows, chunks,
):  # fmt: skip
    """Outputs of `rows` rows of a head; o is contiguous."""
    dtype: gl.constexpr = s.dtype.element_ty
    head = gl.program_id(0) % H
    first_row = gl.program_id(0) // H * rows
    behind = gl.minimum(first_row + rows, B)
    # operators as left operands, rows in the order of their products
    row = gl.arange(0, 64, gl.SliceLayout(1, LEFT))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, LEFT))[None, :]
    state_row = part_of_row(row) * (N // 2) + mode_of_row(row)
    state_column = part_of_row(column) * (N // 2) + mode_of_row(column)
    M_h = gl.load(M + head * (T * T) + time_of_row(row) * T + column).to(dtype)
    P_h = gl.load(P + head * (T * N) + time_of_row(row) * N + state_column).to(dtype)
    K_h = gl.load(K + head * (T * N) + state_row * T + column).to(dtype)
    modes = gl.arange(0, N // 2, gl.SliceLayout(1, MODES))[:, None]
    decay_re = gl.load(decay + head * N + 2 * modes)
    decay_im = gl.load(decay + head * N + 2 * modes + 1)
    time = gl.arange(0, T, gl.SliceLayout(1, OUTPUT))[:, None]
    value = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUTPUT))[None, :]
    o_at = value * L + time

    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, HEAD_DIM, T], PLAIN)
    s_tiles = gl.allocate_shared_memory(dtype, [STAGES, HEAD_DIM, T], PLAIN)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, HEAD_DIM, T], PLAIN)
    w_tiles = gl.allocate_shared_memory(dtype, [2, PAIRS, T], SQUARE)
    x_tiles = gl.allocate_shared_memory(dtype, [2, N, PAIRS], SQUARE)
    next_row = first_row
    next_chunk = 0
    for n in gl.static_range(STAGES - 1):
        next_row, next_chunk = copy_next(
            q, s, v, q_tiles, s_tiles, v_tiles, n, next_row, behind, head, next_chunk, chunks,
            q_row, q_channel, s_row, s_channel, v_row, v_channel,
        )  # fmt: skip
    async_copy.wait_group(STAGES - 2)
    gl.thread_barrier()
    form_products(s_tiles.index(0), v_tiles.index(0), w_tiles.index(0))
    zero = gl.zeros([T, PAIRS], gl.float32, PRODUCT)

    step = 0
    for n in range(behind - first_row):
        member = (first_row + n).to(gl.int64) * H + head
        states = member * (PAIRS * N)
        o_base = o + member * HEAD_DIM * L
        if start is not None:
            x = gl.load(start + states + state_offsets())
        else:
            x = zero
        for chunk in range(chunks):
            w = w_tiles.index(step % 2).permute((1, 0))
            x_tile = x_tiles.index(step % 2)
            x_tile.store(x.to(dtype))
            x = turned(x, decay_re, decay_im)
            async_copy.wait_group(STAGES - 3)
            next_row, next_chunk = copy_next(
                q, s, v, q_tiles, s_tiles, v_tiles, (step + STAGES - 1) % STAGES,
                next_row, behind, head, next_chunk, chunks,
                q_row, q_channel, s_row, s_channel, v_row, v_channel,
            )  # fmt: skip
            fence_async_shared()
            gl.thread_barrier()
            y = warpgroup_mma(M_h, w, zero, use_acc=False, is_async=True)
            y = warpgroup_mma(P_h, x_tile, y, is_async=True)
            x = warpgroup_mma(K_h, w, x, is_async=True)
            gate = q_tiles.index(step % STAGES).permute((1, 0)).load(gl.SliceLayout(2, READ_OUT))
            step += 1
            form_products(
                s_tiles.index(step % STAGES), v_tiles.index(step % STAGES), w_tiles.index(step % 2)
            )
            y = warpgroup_mma_wait(1, deps=[y])
            out = read_out(y, gl.expand_dims(gate, 2).to(gl.float32)).to(dtype)
            gl.store(o_base + chunk * T + o_at, out)
            x = warpgroup_mma_wait(0, deps=[x])
        if end is not None:
            gl.store(end + states + state_offsets(), x)


def takes(D: int, length: int, operators: Operators, segments: int) -> bool:
    """Whether the kernel does a forward pass with outputs."""
    H, modes, _ = operators.K.shape
    sizes = (D, modes) == (HEAD_DIM.value * H, N.value)
    return sizes and length % T.value == 0 and segments == 1


def forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    operators: Operators,
    carry: Tensor | None,
    start: Tensor | None,
    *,
    with_output: bool,
    with_end: bool,
    save_states: bool,
    segments: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward pass: as `heads_triton.forward`, which takes over where this cannot."""
    B, D, L = k.shape
    if not with_output or not takes(D, L, operators, segments):
        return heads_triton.forward(
            q, k, v, operators, carry, start, with_output=with_output, with_end=with_end,
            save_states=save_states, segments=segments,
        )  # fmt: skip
    H = D // HEAD_DIM.value
    s = k if operators.F is None else filter_triton.forward(k, operators.F, carry)
    rows = -(-B // min(B, max(1, PROGRAMS * multiprocessors(k.device) // H)))
    o = k.new_empty(k.shape)
    end = k.new_empty(
        (B, D * HEAD_DIM.value, N.value // 2, 2) if with_end else (0,), dtype=torch.float32
    )
    _, M, K, P, decay = operators
    forward_kernel[(H * -(-B // rows),)](
        q, s, v, o, M, K, P, decay, start, end if with_end else None,
        *strides(q), *strides(s), *strides(v), B, H, L, rows, L // T.value, **FORWARD,
    )  # fmt: skip
    return o, end, k.new_empty(0, dtype=torch.float32)


backward = heads_triton.backward
