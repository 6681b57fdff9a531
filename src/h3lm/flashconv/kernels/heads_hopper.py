"""State passing forward for heads of 8 channels on Hopper, in Gluon; mathematics of `heads_triton`.

A program walks along rows of the batch for one head. Matrices lie [pair, time or state]: the data
are left operands, which never leave the registers, the operators right ones, in shared memory for
the whole walk:

    y = x P^T + w M^T;   x <- decay x + w K^T;   w_ij = s_i v_j;   o_j = sum_i q_i y_ij

A thread makes the w that it multiplies, and the state that a product leaves is a left operand as it
lies. Columns are ordered so that a thread has 16 times side by side, and rows so that of the sum
over i two lie in a thread and the rest in the lanes beside it. While the new state is made, y is
read out: of bfloat16 inputs, products and sums of two in bfloat16, as y leaves plain PyTorch that
rounds each step; the sum of these in float32. Inputs arrive two chunks at a time: a span.

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
from h3lm.flashconv.kernels.chunk_hopper import unknown
from h3lm.flashconv.kernels.launch import Operators, multiprocessors, strides
from h3lm.flashconv.kernels.overlap import can_overlap, wait_for_inputs
from h3lm.flashconv.kernels.tile import T, place

HEAD_DIM = gl.constexpr(8)
PAIRS = gl.constexpr(64)
N = gl.constexpr(64)
SPAN = gl.constexpr(128)  # times of two chunks
STAGES = gl.constexpr(3)  # spans whose inputs are in shared memory or on their way
PROGRAMS = 3  # that fit on a multiprocessor, with so many registers for a thread
FORWARD = {"num_warps": 4, "maxnreg": 168}

SQUARE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
OPERATOR = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, PRODUCT, k_width=2))
# channels of a head [8, time]: what a warp reads at once lies in different banks
CHANNELS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0]))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
# [j, i, time] of a product, in the order of its registers and lanes
PAIRED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 4, 0], [0, 0, 2], [0, 0, 4], [0, 0, 8]],
        [[0, 0, 16], [0, 0, 32], [0, 1, 0], [0, 2, 0], [1, 0, 0]],
        [[2, 0, 0], [4, 0, 0]],
        [],
        [8, 8, 64],
    )
)
KEYS = gl.constexpr(gl.SliceLayout(0, PAIRED))
VALUES = gl.constexpr(gl.SliceLayout(1, PAIRED))
# [j, i % 4, time]: what is left of the sum over i lies in a thread, times go to the lanes
SPREAD = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0]],
        [[0, 0, 16], [0, 0, 32], [0, 0, 4], [0, 0, 8], [1, 0, 0]],
        [[2, 0, 0], [4, 0, 0]],
        [],
        [8, 4, 64],
    )
)
OUTPUT = gl.constexpr(gl.SliceLayout(1, SPREAD))
# [pair, mode] of a product
MODES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0], [0, 4], [0, 8], [0, 16]],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 32],
    )
)


@gluon.jit
def time_of(column):
    """Time of a product's column, and of a row of its right operand."""
    return column // 2 % 4 * 16 + column // 8 * 2 + column % 2


@gluon.jit
def pair_of(row):
    """Pair 8 i + j of a product's row."""
    return (row // 8 % 2 * 4 + row % 4) * 8 + row // 16 * 2 + row // 4 % 2


@gluon.jit
def state_offsets():
    """Where the states of a product [pair, state] lie in memory, made where they are used."""
    pair = unknown(gl.arange(0, PAIRS, gl.SliceLayout(1, PRODUCT)))
    state = gl.arange(0, N, gl.SliceLayout(0, PRODUCT))
    return (pair_of(pair) * N)[:, None] + state[None, :]


@gluon.jit
def load_operator(buffer, pointer, row, column, WIDTH: gl.constexpr):
    """Rows and columns of a matrix in the dtype and order of a product."""
    at = pointer + row[:, None] * WIDTH + column[None, :]
    buffer.store(gl.load(at).to(buffer.dtype))


@gluon.jit
def turned(x, re, im):
    """States [pairs, N] times a complex number for each mode."""
    x_re, x_im = gl.split(gl.reshape(x, [PAIRS, N // 2, 2]))
    x_re = place(x_re, MODES)
    x_im = place(x_im, MODES)
    y = gl.join(re * x_re - im * x_im, re * x_im + im * x_re)
    return place(gl.reshape(y, [PAIRS, N]), PRODUCT)


@gluon.jit
def as_left(x, dtype: gl.constexpr):
    """A product [pairs, N] as a left operand in a half dtype.

    Two at once: the compiler would pair values of different rows, and sort them afterwards.
    """
    x = place(x, LEFT)
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def form_products(s_tile, v_tile, HALF: gl.constexpr):
    """W [pairs, T], the products s_i v_j of a chunk of a span, as a left operand."""
    s = gl.expand_dims(s_tile.slice(HALF * T, T, 1).load(KEYS), 0)
    v = gl.expand_dims(v_tile.slice(HALF * T, T, 1).load(VALUES), 1)
    w = gl.reshape(s * v, [4, 2, 2, 4, 4, 8, 2])  # j in two parts, i in two, time in three
    w = gl.permute(w, (0, 2, 1, 3, 5, 4, 6))
    return place(gl.reshape(w, [PAIRS, T]), LEFT)


@gluon.jit
def read_out(y, q_tile, HALF: gl.constexpr):
    """The sum over i of q_i y_ij, [j, time], of y [pairs, T] and a chunk of a span of q."""
    dtype: gl.constexpr = q_tile.dtype
    y = gl.permute(gl.reshape(y, [4, 2, 2, 4, 8, 4, 2]), (0, 2, 1, 3, 5, 4, 6))
    y = place(gl.reshape(y, [HEAD_DIM, HEAD_DIM, T]), PAIRED)
    gate = gl.expand_dims(q_tile.slice(HALF * T, T, 1).load(KEYS), 0)
    if dtype == gl.bfloat16:  # float16 has not the range for y
        gate, _ = gl.broadcast(gate, y)
        y_0, y_1 = halves_of_keys(y)
        gate_0, gate_1 = halves_of_keys(gate)
        y = rounded_products(y_0, y_1, gate_0, gate_1)
        y = widened(gl.convert_layout(y, SPREAD))
    else:
        y = gl.sum(gl.reshape(y * gate.to(gl.float32), [HEAD_DIM, 2, 4, T]), 1)
        y = gl.convert_layout(y, SPREAD)
    return gl.sum(y, 1).to(dtype)


@gluon.jit
def halves_of_keys(x):
    """[j, i, time] with i below 4, and the rest."""
    return gl.split(gl.permute(gl.reshape(x, [HEAD_DIM, 2, 4, T]), (0, 2, 3, 1)))


@gluon.jit
def rounded_products(y_0, y_1, gate_0, gate_1):
    """Sums of two products in bfloat16, two times to an instruction.

    y is rounded, as it is where each step leaves bfloat16.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b;
        cvt.rn.bf16x2.f32 a, $2, $1;
        cvt.rn.bf16x2.f32 b, $4, $3;
        mul.rn.bf16x2 a, a, $5;
        fma.rn.bf16x2 $0, b, $6, a;
        }
        """,
        "=r,r,r,r,r,r,r", [y_0, y_1, gate_0, gate_1], gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def widened(x):
    """Bfloat16 as float32, with one operation for each of the two that lie in a word."""
    return gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        "=r,=r,r", [x], gl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def span_pointers(pointer, row, head, row_stride, channel_stride):
    """The first span of a row of a head, [channel, time]."""
    channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(1, COPY))[:, None]
    time = gl.arange(0, SPAN, gl.SliceLayout(0, COPY))[None, :]
    base = row.to(gl.int64) * row_stride + (head * HEAD_DIM).to(gl.int64) * channel_stride
    return pointer + base + (channel * channel_stride + time)


@gluon.jit
def copy_span(tile, at, left, EVEN: gl.constexpr):
    """Start the copy of a span [channel, time]; what lies behind the row becomes 0."""
    if EVEN:
        async_copy.async_copy_global_to_shared(tile, at)
    else:
        channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(1, COPY))[:, None]
        time = gl.arange(0, SPAN, gl.SliceLayout(0, COPY))[None, :]
        async_copy.async_copy_global_to_shared(tile, at, mask=(time < left) & (channel >= 0))


@gluon.jit
def copy_next(
    q_at, s_at, v_at, q_tile, s_tile, v_tile, here, span, spans, L, q_row, s_row, v_row,
    EVEN: gl.constexpr,
):  # fmt: skip
    """Start the copies of a span, if it is here; returns the place and number of the next one."""
    if here:
        left = L - span * SPAN
        copy_span(s_tile, s_at, left, EVEN)
        copy_span(v_tile, v_at, left, EVEN)
        copy_span(q_tile, q_at, left, EVEN)
    async_copy.commit_group()
    last = span + 1 == spans
    back = span * SPAN
    q_at += gl.where(last, q_row - back, SPAN)
    s_at += gl.where(last, s_row - back, SPAN)
    v_at += gl.where(last, v_row - back, SPAN)
    return q_at, s_at, v_at, gl.where(last, 0, span + 1)


@gluon.jit
def next_chunk(
    x, q_tile, s_tile, v_tile, o_span, M_h, P_h, K_h, decay_re, decay_im, here,
    HALF: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Write the output of a chunk of a span; returns the state behind it.

    A row that is not EVEN ends with one chunk of a span. The other one's inputs are 0, its decay 1.
    """
    dtype: gl.constexpr = q_tile.dtype
    zero = gl.zeros([PAIRS, T], gl.float32, PRODUCT)
    w = form_products(s_tile, v_tile, HALF)
    x_left = as_left(x, dtype)
    if not EVEN and HALF == 1:
        if here:
            x = turned(x, decay_re, decay_im)
    else:
        x = turned(x, decay_re, decay_im)
    y = warpgroup_mma(w, M_h.permute((1, 0)), zero, use_acc=False, is_async=True)
    y = warpgroup_mma(x_left, P_h.permute((1, 0)), y, is_async=True)
    x = warpgroup_mma(w, K_h.permute((1, 0)), x, is_async=True)
    y, x_left = warpgroup_mma_wait(1, deps=[y, x_left])
    out = read_out(y, q_tile, HALF)
    if EVEN:
        gl.store(o_span + HALF * T, out)
    else:
        gl.store(o_span + HALF * T, out, here)
    x, w = warpgroup_mma_wait(0, deps=[x, w])
    return x


@gluon.jit(do_not_specialize=["B", "H", "rows"])
def forward_kernel(
    q, s, v, o, M, K, P, decay, start, end,
    q_row, q_channel, s_row, s_channel, v_row, v_channel, B, H, L, rows,
    EVEN: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Outputs of `rows` rows of a head; o is contiguous. EARLY: s may still be in the making."""
    dtype: gl.constexpr = s.dtype.element_ty
    head = gl.program_id(0) % H
    first_row = gl.program_id(0) // H * rows
    behind = gl.minimum(first_row + rows, B)
    chunks = L // T
    spans = (chunks + 1) // 2
    total = (behind - first_row) * spans
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, HEAD_DIM, SPAN], CHANNELS)
    s_tiles = gl.allocate_shared_memory(dtype, [STAGES, HEAD_DIM, SPAN], CHANNELS)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, HEAD_DIM, SPAN], CHANNELS)
    # operators, columns and rows in the order of their products
    M_h = gl.allocate_shared_memory(dtype, [T, T], SQUARE)
    P_h = gl.allocate_shared_memory(dtype, [T, N], SQUARE)
    K_h = gl.allocate_shared_memory(dtype, [N, T], SQUARE)
    row = gl.arange(0, 64, gl.SliceLayout(1, OPERATOR))
    column = gl.arange(0, 64, gl.SliceLayout(0, OPERATOR))
    state_row = row % 2 * (N // 2) + row // 2
    state_column = column % 2 * (N // 2) + column // 2
    load_operator(M_h, M + head * (T * T), time_of(row), time_of(column), T)
    load_operator(P_h, P + head * (T * N), time_of(row), state_column, N)
    load_operator(K_h, K + head * (T * N), state_row, time_of(column), T)
    mode = gl.arange(0, N // 2, gl.SliceLayout(0, MODES))[None, :]
    decay_re = gl.load(decay + head * N + 2 * mode)
    decay_im = gl.load(decay + head * N + 2 * mode + 1)
    value = gl.arange(0, HEAD_DIM, gl.SliceLayout(1, OUTPUT))[:, None]
    time = gl.arange(0, T, gl.SliceLayout(0, OUTPUT))[None, :]
    o_at = value * L + time
    fence_async_shared()
    gl.thread_barrier()

    wait_for_inputs(0, EARLY)
    q_at = span_pointers(q, first_row, head, q_row, q_channel)
    s_at = span_pointers(s, first_row, head, s_row, s_channel)
    v_at = span_pointers(v, first_row, head, v_row, v_channel)
    ahead = 0
    for n in gl.static_range(STAGES - 1):
        q_at, s_at, v_at, ahead = copy_next(
            q_at, s_at, v_at, q_tiles.index(n), s_tiles.index(n), v_tiles.index(n),
            n < total, ahead, spans, L, q_row, s_row, v_row, EVEN,
        )  # fmt: skip
    step = 0
    for n in range(behind - first_row):
        member = (first_row + n).to(gl.int64) * H + head
        if start is not None:
            x = gl.load(start + member * (PAIRS * N) + state_offsets())
        else:
            x = gl.zeros([PAIRS, N], gl.float32, PRODUCT)
        for span in range(spans):
            async_copy.wait_group(STAGES - 2)
            gl.thread_barrier()  # all have read what is overwritten
            stage = step % STAGES
            o_span = o + (member * HEAD_DIM * L + span * SPAN) + o_at
            x = next_chunk(
                x, q_tiles.index(stage), s_tiles.index(stage), v_tiles.index(stage), o_span,
                M_h, P_h, K_h, decay_re, decay_im, True, 0, EVEN,
            )  # fmt: skip
            # here, and not before the first chunk, it takes no registers from that
            free = (step + STAGES - 1) % STAGES
            q_at, s_at, v_at, ahead = copy_next(
                q_at, s_at, v_at, q_tiles.index(free), s_tiles.index(free), v_tiles.index(free),
                step + (STAGES - 1) < total, ahead, spans, L, q_row, s_row, v_row, EVEN,
            )  # fmt: skip
            x = next_chunk(
                x, q_tiles.index(stage), s_tiles.index(stage), v_tiles.index(stage), o_span,
                M_h, P_h, K_h, decay_re, decay_im, 2 * span + 1 < chunks, 1, EVEN,
            )  # fmt: skip
            step += 1
        if end is not None:
            gl.store(end + member * (PAIRS * N) + state_offsets(), x)


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
    early = operators.F is not None and can_overlap(k.device)  # operators are older than s
    forward_kernel[(H * -(-B // rows),)](
        q, s, v, o, M, K, P, decay, start, end if with_end else None,
        *strides(q), *strides(s), *strides(v), B, H, L, rows, EVEN=L % SPAN.value == 0,
        EARLY=early, **FORWARD, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return o, end, k.new_empty(0, dtype=torch.float32)


backward = heads_triton.backward
