# ruff: noqa: SIM102, SIM108  (compile-time branches are kept apart from run-time ones)
"""State passing for the H3 core on Hopper, in Gluon; the mathematics is that of `chunk_triton`.

Every matrix operand lies in shared memory, [64, 64] with 128-byte swizzle: an operator is the left
operand of a product, a data tile, stored [chunk, time] as it lies in memory, the right one through
a transposed view. The next tile is copied (cp.async) while this one is worked on, and products
that do not depend on each other are in flight together. k is copied twice, the second time one
chunk back, so that the short filter is one chain of products.

The forward pass takes one warpgroup (4 warps) and two programs per multiprocessor; the backward
pass two warpgroups (8 warps) and one, because its four sums of operator gradients live in
registers: nearly all there are, so that what a thread carries through the loop decides its speed.
As nothing else runs beside it on a multiprocessor, that program makes the short filter's product
for the next tile while it ends one, and goes on to other channels where each has but one tile.

A buffer that threads wrote and a product reads next needs a proxy fence in every writing thread,
then a barrier. Buffers are used in place where all their readers are done: w over v, x over k,
o over q.
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

from h3lm.flashconv.kernels.launch import (
    Gradients,
    Operators,
    empty_rows,
    filter_blocks,
    multiprocessors,
    plan,
    saved_states_shape,
    segment_length,
    strides,
)
from h3lm.flashconv.kernels.tile import (
    T,
    add_conjugate_products,
    chunk_of_column,
    group_starts,
    group_states,
    group_states_reversed,
    group_totals,
    join_states,
    load_complex,
    load_row_states,
    mode_of_row,
    part_of_row,
    place_all,
    power8,
    segment_of,
    shift_left,
    split_groups,
    split_states,
    store_complex,
)

C = gl.constexpr(64)
N = gl.constexpr(64)
SQUARE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))

# lanes of a warp: 2 bits of the column's quad (p), 3 bits of the row
_LANES = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
_LANES_ROW_ONLY = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]

# One warpgroup: both halves g of the columns lie in the registers of a thread.
PRODUCT_4 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
COPY_4 = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
MODES_4 = gl.constexpr(  # [32 modes, 8 groups]
    gl.DistributedLinearLayout([[0, 4]], _LANES, [[8, 0], [16, 0]], [], [32, 8])
)
ALL_GROUPS_4 = gl.constexpr(  # the same values, all groups in each thread of a quad
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4]], _LANES_ROW_ONLY, [[8, 0], [16, 0]], [], [32, 8]
    )
)

# Two warpgroups: each has one half of the columns.
PRODUCT_8 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
COPY_8 = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
MODES_8 = gl.constexpr(
    gl.DistributedLinearLayout([], _LANES, [[8, 0], [16, 0], [0, 4]], [], [32, 8])
)
TIMES_8 = gl.constexpr(  # [64 times, 8 groups]
    gl.DistributedLinearLayout([[8, 0]], _LANES, [[16, 0], [32, 0], [0, 4]], [], [64, 8])
)
ALL_GROUPS_8 = gl.constexpr(  # [32 modes, 8 groups, (re, im)]
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[8, 0, 0], [16, 0, 0], [0, 0, 0]],
        [],
        [32, 8, 2],
    )
)
TOTALS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0]))


@gluon.jit
def lower_toeplitz(row, column):
    """Where the values of F_0 and M lie, and where they have some, in pieces of 16 bytes.

    On a diagonal they are the same, so that all are in the last eight rows: 1 KB is read, not 8,
    which is what short work takes most of its time for.
    """
    block = row // 8 * 8
    at = (row % 8 * T + T * (T - 8) + (T - 8) - block)[:, None] + column[None, :]
    return at, (column // 8 * 8)[None, :] <= row[:, None]


@gluon.jit
def upper_toeplitz(row, column):
    """The same for F_1, in its first eight rows."""
    block = row // 8 * 8
    at = (row % 8 * T - block)[:, None] + column[None, :]
    return at, (column // 8 * 8 + 7)[None, :] > row[:, None]


@gluon.jit
def load_operator(buffer, pointer, index, mask):
    """An operator [64, 64] into shared memory, from elements at `pointer + index`, 0 where masked.

    Of the right dtype it is copied: it is there when the first tile is waited for.
    """
    if pointer.dtype.element_ty == buffer.dtype:
        async_copy.async_copy_global_to_shared(buffer, pointer + index, mask=mask)
        async_copy.commit_group()
    elif mask is None:
        buffer.store(gl.load(pointer + index).to(buffer.dtype))
    else:
        buffer.store(gl.load(pointer + index, mask, 0.0).to(buffer.dtype))


@gluon.jit
def to_shared(pointer, index, mask, dtype: gl.constexpr):
    """`load_operator` into a buffer of its own."""
    buffer = gl.allocate_shared_memory(dtype, [T, T], SQUARE)
    load_operator(buffer, pointer, index, mask)
    return buffer


@gluon.jit
def publish():
    """Make what this thread wrote to shared memory visible to products of all threads."""
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def copy(buffer, pointers, mask, EVEN: gl.constexpr):
    """Start the copy of a tile; what is masked becomes 0."""
    if EVEN:
        async_copy.async_copy_global_to_shared(buffer, pointers)
    else:
        async_copy.async_copy_global_to_shared(buffer, pointers, mask=mask)


@gluon.jit
def store_tile(buffer, pointers, mask, layout: gl.constexpr, EVEN: gl.constexpr):
    """Write a tile [chunk, time] from shared memory."""
    if EVEN:
        gl.store(pointers, buffer.load(layout))
    else:
        gl.store(pointers, buffer.load(layout), mask)


@gluon.jit
def tile_base(pointer, row, channel, position, row_stride, channel_stride):
    """Address of a tile's first element."""
    offset = row.to(gl.int64) * row_stride + channel.to(gl.int64) * channel_stride
    return pointer + (offset + position)


@gluon.jit
def whole_rows(row, channel, d_row, d_channel, total):
    """Offset of a row's first element, with strides that count rows of `total` elements."""
    return (row * d_row + channel * d_channel).to(gl.int64) * total


@gluon.jit
def in_tile_offsets(row_in_tile, inner, row_stride, ROWS: gl.constexpr):
    """Offsets [C, T] in a tile; `inner` is the position behind the tile's first one."""
    if ROWS == 1:
        return inner
    else:
        return (row_in_tile * row_stride)[:, None] + inner


@gluon.jit
def tile_masks(
    row, position, begin, B, L, row_in_tile, inner, ROWS: gl.constexpr, EVEN: gl.constexpr
):
    """Where a tile has values, and where the tile one chunk back has.

    In front of the row lie `begin` more positions of the same sequence.
    """
    if EVEN:
        mask = inner >= 0
        return mask, position + begin + inner >= T
    else:
        valid = (row + row_in_tile < B)[:, None]
        at = position + inner
        return valid & (at < L), valid & (at + begin >= T) & (at < L + T)


@gluon.jit
def forward_copies(
    q, k, v, q_tile, k_tile, h_tile, v_tile, tile, row, channel,
    q_row, q_channel, k_row, k_channel, v_row, v_channel,
    B, L, total, segments, row_in_tile, inner,
    ROWS: gl.constexpr, EVEN: gl.constexpr, SEGMENTED: gl.constexpr,
):  # fmt: skip
    """Start the copies of a tile: k, k one chunk back (h), v and q."""
    source, begin, length = segment_of(row, L, total, segments, SEGMENTED)
    position = tile * (C // ROWS * T)
    mask, mask_back = tile_masks(row, position, begin, B, length, row_in_tile, inner, ROWS, EVEN)
    k_base = tile_base(k, source, channel, begin + position, k_row, k_channel)
    k_at = in_tile_offsets(row_in_tile, inner, k_row, ROWS)
    copy(k_tile, k_base + k_at, mask, EVEN)
    copy(h_tile, k_base - T + k_at, mask_back, False)
    v_base = tile_base(v, source, channel, begin + position, v_row, v_channel)
    copy(v_tile, v_base + in_tile_offsets(row_in_tile, inner, v_row, ROWS), mask, EVEN)
    if q is not None:
        q_base = tile_base(q, source, channel, begin + position, q_row, q_channel)
        copy(q_tile, q_base + in_tile_offsets(row_in_tile, inner, q_row, ROWS), mask, EVEN)
    async_copy.commit_group()


@gluon.jit
def all_groups_4(total):
    """Totals [32, 8] of one warpgroup as 8 vectors that every thread has."""
    vectors = split_groups(gl.convert_layout(total, ALL_GROUPS_4), C)
    return place_all(vectors, gl.SliceLayout(1, MODES_4))


@gluon.jit(do_not_specialize=["B", "rows_per_program", "tiles", "segments"])
def forward_kernel(
    q, k, v, o, F, M, K, P, decay, carry, start, end, tile_states,
    q_row, q_channel, k_row, k_channel, v_row, v_channel, o_row, o_channel,
    B, D, L, rows_per_program, tiles, total, segments,
    ROWS: gl.constexpr, EVEN: gl.constexpr, SEGMENTED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Forward pass; strides and the length are multiples of 16.

    STAGES: 2, or 1 where a program has one tile: then M and P take the place of F_0 and F_1, and
    four programs fit on a multiprocessor.
    """
    CHUNKS: gl.constexpr = C // ROWS
    dtype: gl.constexpr = k.dtype.element_ty
    mma: gl.constexpr = PRODUCT_4
    channel = gl.program_id(0) % D
    first_row = gl.program_id(0) // D * rows_per_program
    time = gl.arange(0, T, gl.SliceLayout(0, COPY_4))
    column = gl.arange(0, C, gl.SliceLayout(1, COPY_4))
    in_tile = chunk_of_column(column)
    row_in_tile = in_tile // CHUNKS
    inner = (in_tile % CHUNKS * T)[:, None] + time[None, :]
    modes = gl.arange(0, N // 2, gl.SliceLayout(1, MODES_4))
    group = gl.arange(0, 8, gl.SliceLayout(0, MODES_4))[None, :]
    zero_modes = gl.zeros([N // 2, 8], gl.float32, MODES_4)
    zero = gl.zeros([T, C], gl.float32, mma)

    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, T], SQUARE)
    h_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, T], SQUARE)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, T], SQUARE)
    if q is not None:
        q_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, T], SQUARE)
    else:
        q_tiles = v_tiles
    # the first tile is on its way while operators are loaded
    forward_copies(
        q, k, v, q_tiles.index(0), k_tiles.index(0), h_tiles.index(0), v_tiles.index(0),
        0, first_row, channel, q_row, q_channel, k_row, k_channel, v_row, v_channel,
        B, L, total, segments, row_in_tile, inner, ROWS, EVEN, SEGMENTED,
    )  # fmt: skip
    state_row = part_of_row(column) * (N // 2) + mode_of_row(column)
    state_column = part_of_row(time) * (N // 2) + mode_of_row(time)
    lower_at, lower = lower_toeplitz(column, time)
    upper_at, upper = upper_toeplitz(column, time)
    F0 = to_shared(F + channel * 2 * T * T, lower_at, lower, dtype)
    F1 = to_shared(F + channel * 2 * T * T + T * T, upper_at, upper, dtype)
    K_c = to_shared(K + channel * N * T, state_row[:, None] * T + time[None, :], None, dtype)
    out_of = column[:, None] * N + state_column[None, :]
    if STAGES == 1:
        M_c = F0._reinterpret(dtype, [T, T], SQUARE)
        P_c = F1._reinterpret(dtype, [T, N], SQUARE)
    elif o is not None:
        M_c = to_shared(M + channel * T * T, lower_at, lower, dtype)
        P_c = to_shared(P + channel * N * T, out_of, None, dtype)
    decay_re, decay_im = load_complex(decay + channel * N, modes, None)
    group_re, group_im = power8(decay_re, decay_im)
    chunk_re = decay_re[:, None]
    chunk_im = decay_im[:, None]
    x_re = gl.zeros([N // 2], gl.float32, gl.SliceLayout(1, MODES_4))
    x_im = x_re

    steps = rows_per_program // ROWS * tiles
    for step in range(steps):
        tile = step % tiles
        tile_row = first_row + step // tiles * ROWS
        source, begin, length = segment_of(tile_row, L, total, segments, SEGMENTED)
        full_chunks = length // T
        last_tile = (length - 1) // (CHUNKS * T) if SEGMENTED else tiles - 1
        k_tile = k_tiles.index(step % STAGES)
        h_tile = h_tiles.index(step % STAGES)
        v_tile = v_tiles.index(step % STAGES)
        q_tile = q_tiles.index(step % STAGES)
        async_copy.wait_group(0)
        publish()
        if STAGES > 1:
            if step + 1 < steps:
                other = (step + 1) % STAGES
                next_row = first_row + (step + 1) // tiles * ROWS
                forward_copies(
                    q, k, v, q_tiles.index(other), k_tiles.index(other), h_tiles.index(other),
                    v_tiles.index(other), (step + 1) % tiles, next_row, channel,
                    q_row, q_channel, k_row, k_channel, v_row, v_channel,
                    B, L, total, segments, row_in_tile, inner, ROWS, EVEN, SEGMENTED,
                )  # fmt: skip

        s = warpgroup_mma(F0, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma(F1, h_tile.permute((1, 0)), s, is_async=True)
        v_values = v_tile.permute((1, 0)).load(mma)
        s = warpgroup_mma_wait(0, deps=[s])
        if carry is not None:
            if (tile + begin == 0) & (tile_row < B):
                s += load_carry(carry, source, channel, B, D, ROWS, mma)
        v_tile.permute((1, 0)).store((s * v_values.to(gl.float32)).to(dtype))
        publish()
        w = v_tile

        z = warpgroup_mma(K_c, w.permute((1, 0)), zero, use_acc=False, is_async=True)
        if o is not None and STAGES > 1:
            y = warpgroup_mma(M_c, w.permute((1, 0)), zero, use_acc=False, is_async=True)
            z = warpgroup_mma_wait(1, deps=[z])
        else:
            if o is not None:  # all have read F_0 and F_1
                load_operator(M_c, M + channel * T * T, lower_at, lower)
                load_operator(P_c, P + channel * N * T, out_of, None)
            z = warpgroup_mma_wait(0, deps=[z])
        z_re, z_im = split_states(z, N, C, MODES_4)
        total_re, total_im = group_totals(z_re, z_im, chunk_re, chunk_im, False)
        if ROWS == 1:
            if tile == 0:
                given_re, given_im = load_row_states(start, tile_row, channel, B, D, modes, 1)
                x_re = given_re[0]
                x_im = given_im[0]
            first_re = (x_re,)
            first_im = (x_im,)
            if tile_states is not None:
                saved_at = ((tile_row.to(gl.int64) * D + channel) * tiles + tile) * N
                store_complex(tile_states + saved_at, modes, x_re, x_im, tile_row < B)
        else:
            first_re, first_im = load_row_states(start, tile_row, channel, B, D, modes, ROWS)
        start_re, start_im, last_re, last_im = group_starts(
            all_groups_4(total_re), all_groups_4(total_im), first_re, first_im,
            group_re, group_im, group, zero_modes, 8, ROWS, False,
        )  # fmt: skip
        x_re = last_re[0]
        x_im = last_im[0]
        states_re, states_im = group_states(start_re, start_im, z_re, z_im, chunk_re, chunk_im)
        x = join_states(states_re, states_im, N, C, mma)

        if end is not None:
            if tile == last_tile:
                if full_chunks == (last_tile + 1) * CHUNKS:
                    for r in gl.static_range(ROWS):
                        row_at = ((tile_row + r).to(gl.int64) * D + channel) * N
                        given = tile_row + r < B
                        store_complex(end + row_at, modes, last_re[r], last_im[r], given)
                else:
                    end_at, here = end_addresses(
                        tile, tile_row, full_chunks, channel, B, D, ROWS, mma
                    )
                    gl.store(end + end_at, x, here)
        if o is not None:
            k_tile.permute((1, 0)).store(x.to(dtype))
            gate = q_tile.permute((1, 0)).load(mma)
            if STAGES == 1:
                async_copy.wait_group(0)
            publish()
            if STAGES == 1:
                y = warpgroup_mma(M_c, w.permute((1, 0)), zero, use_acc=False, is_async=True)
            y = warpgroup_mma(P_c, k_tile.permute((1, 0)), y, is_async=True)
            y = warpgroup_mma_wait(0, deps=[y])
            q_tile.permute((1, 0)).store((y * gate.to(gl.float32)).to(dtype))
            gl.thread_barrier()
            position = tile * (CHUNKS * T)
            mask, _ = tile_masks(
                tile_row, position, begin, B, length, row_in_tile, inner, ROWS, EVEN
            )
            o_base = tile_base(o, source, channel, begin + position, o_row, o_channel)
            o_at = in_tile_offsets(row_in_tile, inner, o_row, ROWS)
            store_tile(q_tile, o_base + o_at, mask, COPY_4, EVEN)


@gluon.jit
def load_carry(carry, tile_row, channel, B, D, ROWS: gl.constexpr, mma: gl.constexpr):
    """What the short filter brings into the first chunk of each row, as a tile [T, C]."""
    time = gl.arange(0, T, gl.SliceLayout(1, mma))
    in_tile = chunk_of_column(gl.arange(0, C, gl.SliceLayout(0, mma)))
    row = tile_row + in_tile // (C // ROWS)
    here = (in_tile % (C // ROWS) == 0) & (row < B)
    at = (row.to(gl.int64) * D + channel)[None, :] * T + time[:, None]
    return gl.load(carry + at, here[None, :], 0.0)


@gluon.jit
def store_dcarry(dcarry, ds, tile_row, channel, B, D, ROWS: gl.constexpr, mma: gl.constexpr):
    """The gradient of what `load_carry` loads."""
    time = gl.arange(0, T, gl.SliceLayout(1, mma))
    in_tile = chunk_of_column(gl.arange(0, C, gl.SliceLayout(0, mma)))
    row = tile_row + in_tile // (C // ROWS)
    here = (in_tile % (C // ROWS) == 0) & (row < B)
    at = (row.to(gl.int64) * D + channel)[None, :] * T + time[:, None]
    gl.store(dcarry + at, ds, here[None, :])


@gluon.jit
def end_addresses(
    tile, tile_row, full_chunks, channel, B, D, ROWS: gl.constexpr, mma: gl.constexpr
):
    """Offsets of the end states in a tile of states, and where they are: before the last chunk."""
    state = gl.arange(0, N, gl.SliceLayout(1, mma))
    in_tile = chunk_of_column(gl.arange(0, C, gl.SliceLayout(0, mma)))
    row = tile_row + in_tile // (C // ROWS)
    here = (tile * (C // ROWS) + in_tile % (C // ROWS) == full_chunks) & (row < B)
    offset = 2 * mode_of_row(state) + part_of_row(state)
    return (row.to(gl.int64) * D + channel)[None, :] * N + offset[:, None], here[None, :]


@gluon.jit
def all_groups_8(buffer):
    """Totals of both warpgroups, [32, 8, 2] in shared memory, as 8 + 8 vectors of all threads."""
    total_re, total_im = gl.split(buffer.load(ALL_GROUPS_8))
    re = split_groups(total_re, C)
    im = split_groups(total_im, C)
    return place_all(re, gl.SliceLayout(1, MODES_8)), place_all(im, gl.SliceLayout(1, MODES_8))


@gluon.jit
def backward_copies(
    q, k, v, do, q_tile, k_tile, h_tile, v_tile, do_tile, tile, row, channel,
    q_row, q_channel, k_row, k_channel, v_row, v_channel, do_row, do_channel, d_row, d_channel,
    B, L, total, segments, row_in_tile, inner,
    ROWS: gl.constexpr, EVEN: gl.constexpr, SEGMENTED: gl.constexpr, ALIKE: gl.constexpr,
):  # fmt: skip
    """Start the copies of a tile: do, and what `forward_copies` copies."""
    source, begin, length = segment_of(row, L, total, segments, SEGMENTED)
    position = tile * (C // ROWS * T)
    mask, mask_back = tile_masks(row, position, begin, B, length, row_in_tile, inner, ROWS, EVEN)
    if ALIKE:
        at = in_tile_offsets(row_in_tile, inner, d_row * total, ROWS)
        base = whole_rows(source, channel, d_row, d_channel, total) + (begin + position)
        copy(do_tile, do + base + at, mask, EVEN)
        copy(k_tile, k + base + at, mask, EVEN)
        copy(h_tile, k + base - T + at, mask_back, False)
        copy(v_tile, v + base + at, mask, EVEN)
        copy(q_tile, q + base + at, mask, EVEN)
        async_copy.commit_group()
    else:
        do_base = tile_base(do, source, channel, begin + position, do_row, do_channel)
        copy(do_tile, do_base + in_tile_offsets(row_in_tile, inner, do_row, ROWS), mask, EVEN)
        forward_copies(
            q, k, v, q_tile, k_tile, h_tile, v_tile, tile, row, channel,
            q_row, q_channel, k_row, k_channel, v_row, v_channel,
            B, L, total, segments, row_in_tile, inner, ROWS, EVEN, SEGMENTED,
        )  # fmt: skip


@gluon.jit
def unknown(index):
    """The same numbers, which the compiler may not make ahead and carry in registers."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [index], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_operators(F0, F1, K_c, M_c, P_c, F, K, M, P, channel):
    """Operators of a channel: of the right dtype they are copied, and there when tiles are."""
    column = unknown(gl.arange(0, C, gl.SliceLayout(1, COPY_8)))
    time = gl.arange(0, T, gl.SliceLayout(0, COPY_8))
    state_row = part_of_row(column) * (N // 2) + mode_of_row(column)
    state_column = part_of_row(time) * (N // 2) + mode_of_row(time)
    lower_at, lower = lower_toeplitz(column, time)
    upper_at, upper = upper_toeplitz(column, time)
    load_operator(F0, F + channel * 2 * T * T, lower_at, lower)
    load_operator(F1, F + channel * 2 * T * T + T * T, upper_at, upper)
    load_operator(K_c, K + channel * N * T, state_row[:, None] * T + time[None, :], None)
    load_operator(M_c, M + channel * T * T, lower_at, lower)
    load_operator(P_c, P + channel * N * T, column[:, None] * N + state_column[None, :], None)


@gluon.jit
def filtered(F0, F1, k_tile, h_tile, zero):
    """The products of the short filter, s = F_0 k_c + F_1 k_{c-1}, on their way."""
    s = warpgroup_mma(F0, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(F1, h_tile.permute((1, 0)), s, is_async=True)


@gluon.jit(do_not_specialize=["B", "rows_per_program", "tiles", "segments"])
def backward_kernel(
    q, k, v, do, dq, dk, dv, F, M, K, P, decay, carry, start, tile_states, dend,
    dF, dM, dK, dP, ddecay, dcarry, dstart,
    q_row, q_channel, k_row, k_channel, v_row, v_channel, do_row, do_channel, d_row, d_channel,
    B, D, L, rows_per_program, tiles, total, segments,
    ROWS: gl.constexpr, EVEN: gl.constexpr, SEGMENTED: gl.constexpr, ALIKE: gl.constexpr,
    ONE_TILE: gl.constexpr,
):  # fmt: skip
    """Every gradient in one launch, tiles from last to first; arguments as in plain Triton.

    But strides of dq, dk and dv count rows of L: as wide numbers they would spill. ALIKE: all
    tensors of positions have these strides, and a tile's offset in them is one number.
    ONE_TILE: a program has one tile of a channel, and takes channels as far apart as there are
    programs: while it ends one, the tile of the next is on its way.
    """
    STAGES: gl.constexpr = 2
    CHUNKS: gl.constexpr = C // ROWS
    dtype: gl.constexpr = k.dtype.element_ty
    mma: gl.constexpr = PRODUCT_8
    vector: gl.constexpr = gl.SliceLayout(1, MODES_8)
    walk = gl.program_id(0)
    channel = walk % D
    time = gl.arange(0, T, gl.SliceLayout(0, COPY_8))
    column = gl.arange(0, C, gl.SliceLayout(1, COPY_8))
    in_tile = chunk_of_column(column)
    row_in_tile = in_tile // CHUNKS
    inner = (in_tile % CHUNKS * T)[:, None] + time[None, :]
    modes = gl.arange(0, N // 2, vector)
    group = gl.arange(0, 8, gl.SliceLayout(0, MODES_8))[None, :]
    group_of_times = (
        gl.zeros([T, 8], gl.int32, TIMES_8) + gl.arange(0, 8, gl.SliceLayout(0, TIMES_8))[None, :]
    )
    zero_modes = gl.zeros([N // 2, 8], gl.float32, MODES_8)
    zero = gl.zeros([T, C], gl.float32, mma)

    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, T], SQUARE)
    h_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, T], SQUARE)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, T], SQUARE)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, T], SQUARE)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, T], SQUARE)
    tile = tiles - 1
    tile_row = walk // D * rows_per_program
    backward_copies(
        q, k, v, do, q_tiles.index(0), k_tiles.index(0), h_tiles.index(0), v_tiles.index(0),
        do_tiles.index(0), tile, tile_row, channel,
        q_row, q_channel, k_row, k_channel, v_row, v_channel, do_row, do_channel,
        d_row, d_channel, B, L, total, segments, row_in_tile, inner, ROWS, EVEN, SEGMENTED, ALIKE,
    )  # fmt: skip
    F0 = gl.allocate_shared_memory(dtype, [T, T], SQUARE)
    F1 = gl.allocate_shared_memory(dtype, [T, T], SQUARE)
    K_c = gl.allocate_shared_memory(dtype, [N, T], SQUARE)
    M_c = gl.allocate_shared_memory(dtype, [T, T], SQUARE)
    P_c = gl.allocate_shared_memory(dtype, [T, N], SQUARE)
    load_operators(F0, F1, K_c, M_c, P_c, F, K, M, P, channel)
    w_tile = gl.allocate_shared_memory(dtype, [C, T], SQUARE)
    dy_tile = gl.allocate_shared_memory(dtype, [C, T], SQUARE)
    x_tile = gl.allocate_shared_memory(dtype, [C, N], SQUARE)
    g_tile = gl.allocate_shared_memory(dtype, [C, N], SQUARE)
    ds_tile = gl.allocate_shared_memory(dtype, [C, T], SQUARE)
    next_ds_tile = gl.allocate_shared_memory(dtype, [C, T], SQUARE)  # ds one chunk on
    dq_tile = gl.allocate_shared_memory(dtype, [C, T], SQUARE)
    dk_tile = gl.allocate_shared_memory(dtype, [C, T], SQUARE)
    dv_tile = gl.allocate_shared_memory(dtype, [C, T], SQUARE)
    x_totals = gl.allocate_shared_memory(gl.float32, [N // 2, 8, 2], TOTALS)
    g_totals = gl.allocate_shared_memory(gl.float32, [N // 2, 8, 2], TOTALS)
    lower = (
        gl.arange(0, T, gl.SliceLayout(1, mma))[:, None]
        >= gl.arange(0, T, gl.SliceLayout(0, mma))[None, :]
    )

    steps = 1 if ONE_TILE else rows_per_program // ROWS * tiles
    stage = 0
    if ROWS == 1:  # states are loaded one tile ahead: behind the copies a load would wait for them
        saved_at = ((tile_row * D + channel) * tiles + tile).to(gl.int64) * N
        next_re, next_im = load_complex(tile_states + saved_at, modes, tile_row < B)
    # only programs of one tile go on to other channels: longer loops have no registers left for it
    channels = (D - channel + gl.num_programs(0) - 1) // gl.num_programs(0) if ONE_TILE else 1
    for turn in range(channels):  # noqa: B007
        decay_re, decay_im = load_complex(decay + channel * N, modes, None)
        group_re, group_im = power8(decay_re, decay_im)
        chunk_re = decay_re[:, None]
        chunk_im = decay_im[:, None]
        g_re = gl.zeros([N // 2], gl.float32, vector)
        g_im = g_re
        ds_carry = gl.zeros([T, 8], gl.float32, TIMES_8)
        sum_F = zero  # F_0 needs t >= u and F_1 t < u: one sum for both
        sum_M = zero
        sum_K = zero
        sum_P = zero
        sum_re = zero_modes
        sum_im = zero_modes
        if not ONE_TILE:
            async_copy.wait_group(0)
            publish()
            s = zero
            # in a branch, or the loop's addresses would be made here and carried in registers
            if steps > 0:
                s = filtered(F0, F1, k_tiles.index(stage), h_tiles.index(stage), zero)
                s = warpgroup_mma_wait(0, deps=[s])
        for step in range(steps):
            source, begin, length = segment_of(tile_row, L, total, segments, SEGMENTED)
            full_chunks = length // T
            last_tile = (length - 1) // (CHUNKS * T) if SEGMENTED else tiles - 1
            k_tile = k_tiles.index(stage)
            h_tile = h_tiles.index(stage)
            v_tile = v_tiles.index(stage)
            q_tile = q_tiles.index(stage)
            do_tile = do_tiles.index(stage)
            if ROWS == 1:
                first_re = (next_re,)
                first_im = (next_im,)
                # empty tiles may lie behind the last one of a segment
                behind_last = tile == tiles - 1
                if SEGMENTED:
                    behind_last = behind_last | (tile == last_tile)
                keep = gl.where(behind_last, 0.0, 1.0)
                g_re = g_re * keep
                g_im = g_im * keep
                ds_carry = ds_carry * keep
                if dend is not None:
                    if (tile == last_tile) & (full_chunks == (last_tile + 1) * CHUNKS):
                        row_at = (tile_row.to(gl.int64) * D + channel) * N
                        g_re, g_im = load_complex(dend + row_at, modes, tile_row < B)
                behind_re = (g_re,)
                behind_im = (g_im,)
            else:
                first_re, first_im = load_row_states(start, tile_row, channel, B, D, modes, ROWS)
                behind = gl.where(full_chunks == CHUNKS, B, 0)  # rows that end with the tile
                behind_re, behind_im = load_row_states(
                    dend, tile_row, channel, behind, D, modes, ROWS
                )
            if ONE_TILE:
                async_copy.wait_group(0)
                publish()
                s = filtered(F0, F1, k_tile, h_tile, zero)
            d_out = do_tile.permute((1, 0)).load(mma).to(gl.float32)
            gate = q_tile.permute((1, 0)).load(mma).to(gl.float32)
            dy_tile.permute((1, 0)).store((gate * d_out).to(dtype))
            v_values = v_tile.permute((1, 0)).load(mma)
            if ONE_TILE:
                s = warpgroup_mma_wait(0, deps=[s])
            if carry is not None:
                if (tile + begin == 0) & (tile_row < B):
                    s += load_carry(carry, source, channel, B, D, ROWS, mma)
            w_tile.permute((1, 0)).store((s * v_values.to(gl.float32)).to(dtype))
            s_half = s.to(dtype)
            publish()

            # the states before, and the gradients behind, each chunk
            z = warpgroup_mma(K_c, w_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            p = warpgroup_mma(
                P_c.permute((1, 0)), dy_tile.permute((1, 0)), zero, use_acc=False, is_async=True
            )
            other = 1 - stage
            if ONE_TILE:
                next_channel = channel + gl.num_programs(0)
                following = next_channel < D
                next_row = tile_row
                next_tile = tile
            else:
                following = step + 1 < steps
                next_channel = channel
                next_row = gl.where(tile > 0, tile_row, tile_row + ROWS)
                next_tile = gl.where(tile > 0, tile, tiles) - 1
            if following:  # behind the last reader of that stage
                backward_copies(
                    q, k, v, do, q_tiles.index(other), k_tiles.index(other), h_tiles.index(other),
                    v_tiles.index(other), do_tiles.index(other), next_tile, next_row, next_channel,
                    q_row, q_channel, k_row, k_channel, v_row, v_channel, do_row, do_channel,
                    d_row, d_channel, B, L, total, segments, row_in_tile, inner,
                    ROWS, EVEN, SEGMENTED, ALIKE,
                )  # fmt: skip
                if ROWS == 1:
                    saved_at = ((next_row * D + next_channel) * tiles + next_tile).to(gl.int64) * N
                    next_re, next_im = load_complex(tile_states + saved_at, modes, next_row < B)
            z, p = warpgroup_mma_wait(0, deps=[z, p])
            if dend is not None:
                if tile == last_tile:
                    end_at, here = end_addresses(
                        tile, tile_row, full_chunks, channel, B, D, ROWS, mma
                    )
                    p += gl.load(dend + end_at, here, 0.0)
            z_re, z_im = split_states(z, N, C, MODES_8)
            total_re, total_im = group_totals(z_re, z_im, chunk_re, chunk_im, False)
            x_totals.store(gl.join(total_re, total_im))
            p_re, p_im = split_states(p, N, C, MODES_8)
            total_re, total_im = group_totals(p_re, p_im, chunk_re, -chunk_im, True)
            g_totals.store(gl.join(total_re, total_im))
            gl.thread_barrier()
            totals_re, totals_im = all_groups_8(x_totals)
            start_re, start_im, _, _ = group_starts(
                totals_re, totals_im, first_re, first_im,
                group_re, group_im, group, zero_modes, 8, ROWS, False,
            )  # fmt: skip
            x_re, x_im = group_states(start_re, start_im, z_re, z_im, chunk_re, chunk_im)
            x_tile.permute((1, 0)).store(join_states(x_re, x_im, N, C, mma).to(dtype))
            totals_re, totals_im = all_groups_8(g_totals)
            start_re, start_im, last_re, last_im = group_starts(
                totals_re, totals_im, behind_re, behind_im,
                group_re, -group_im, group, zero_modes, 8, ROWS, True,
            )  # fmt: skip
            g_re = last_re[0]
            g_im = last_im[0]
            grads_re, grads_im = group_states_reversed(
                start_re, start_im, p_re, p_im, chunk_re, -chunk_im
            )
            g_tile.permute((1, 0)).store(join_states(grads_re, grads_im, N, C, mma).to(dtype))
            sum_re, sum_im = add_conjugate_products(sum_re, sum_im, x_re, x_im, grads_re, grads_im)
            if dstart is not None:
                if tile == 0:
                    for r in gl.static_range(ROWS):
                        row_at = ((tile_row + r).to(gl.int64) * D + channel) * N
                        store_complex(
                            dstart + row_at, modes, last_re[r], last_im[r], tile_row + r < B
                        )
            publish()

            dw = warpgroup_mma(
                M_c.permute((1, 0)), dy_tile.permute((1, 0)), zero, use_acc=False, is_async=True
            )
            dw = warpgroup_mma(K_c.permute((1, 0)), g_tile.permute((1, 0)), dw, is_async=True)
            y = warpgroup_mma(M_c, w_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            y = warpgroup_mma(P_c, x_tile.permute((1, 0)), y, is_async=True)
            sum_M = warpgroup_mma(dy_tile.permute((1, 0)), w_tile, sum_M, is_async=True)
            sum_P = warpgroup_mma(dy_tile.permute((1, 0)), x_tile, sum_P, is_async=True)
            sum_K = warpgroup_mma(g_tile.permute((1, 0)), w_tile, sum_K, is_async=True)
            y, dw = warpgroup_mma_wait(3, deps=[y, dw])
            # v and do are read again: kept in registers they spill
            ds = dw * v_tile.permute((1, 0)).load(mma).to(gl.float32)
            ds_tile.permute((1, 0)).store(ds.to(dtype))
            next_ds, ds_carry = shift_left(ds, ds_carry, group_of_times, C, ROWS, TIMES_8, mma)
            next_ds_tile.permute((1, 0)).store(next_ds.to(dtype))
            dv_tile.permute((1, 0)).store((dw * s_half.to(gl.float32)).to(dtype))
            d_out = do_tile.permute((1, 0)).load(mma).to(gl.float32)
            dq_tile.permute((1, 0)).store((y * d_out).to(dtype))
            if dcarry is not None:
                if tile == 0:
                    store_dcarry(dcarry, ds, tile_row, channel, B, D, ROWS, mma)
            if not ONE_TILE:
                async_copy.wait_group(0)
            publish()

            d_k = warpgroup_mma(
                F0.permute((1, 0)), ds_tile.permute((1, 0)), zero, use_acc=False, is_async=True
            )
            d_k = warpgroup_mma(
                F1.permute((1, 0)), next_ds_tile.permute((1, 0)), d_k, is_async=True
            )
            at_zero = warpgroup_mma(
                ds_tile.permute((1, 0)), k_tile, zero, use_acc=False, is_async=True
            )
            at_last = warpgroup_mma(
                ds_tile.permute((1, 0)), h_tile, zero, use_acc=False, is_async=True
            )
            if not ONE_TILE:  # the next tile's short filter; behind a walk it is made anew
                s = filtered(F0, F1, k_tiles.index(other), h_tiles.index(other), zero)
            position = tile * (CHUNKS * T)
            mask, _ = tile_masks(
                tile_row, position, begin, B, length, row_in_tile, inner, ROWS, EVEN
            )
            out_at = in_tile_offsets(row_in_tile, inner, d_row * total, ROWS)
            out_base = whole_rows(source, channel, d_row, d_channel, total) + (begin + position)
            store_tile(dq_tile, dq + out_base + out_at, mask, COPY_8, EVEN)
            store_tile(dv_tile, dv + out_base + out_at, mask, COPY_8, EVEN)
            d_k = warpgroup_mma_wait(2 if ONE_TILE else 4, deps=[d_k])
            dk_tile.permute((1, 0)).store(d_k.to(dtype))
            gl.thread_barrier()
            store_tile(dk_tile, dk + out_base + out_at, mask, COPY_8, EVEN)
            if ONE_TILE:
                at_zero, at_last, sum_M, sum_P, sum_K = warpgroup_mma_wait(
                    0, deps=[at_zero, at_last, sum_M, sum_P, sum_K]
                )
            else:
                s, at_zero, at_last, sum_M, sum_P, sum_K = warpgroup_mma_wait(
                    0, deps=[s, at_zero, at_last, sum_M, sum_P, sum_K]
                )
            sum_F += gl.where(lower, at_zero, at_last)
            tile = next_tile
            tile_row = next_row
            stage = other

        next_channel = channel + gl.num_programs(0)
        if ONE_TILE:
            if next_channel < D:
                gl.thread_barrier()  # all have read the operators
                load_operators(F0, F1, K_c, M_c, P_c, F, K, M, P, next_channel)

        i = unknown(gl.arange(0, T, gl.SliceLayout(1, mma)))[:, None]
        j = gl.arange(0, T, gl.SliceLayout(0, mma))[None, :]
        state_i = part_of_row(i) * (N // 2) + mode_of_row(i)
        state_j = part_of_row(j) * (N // 2) + mode_of_row(j)
        wide = walk.to(gl.int64) * (T * T)
        gl.store(dF + 2 * wide + i * T + j, gl.where(i >= j, sum_F, 0.0))
        gl.store(dF + 2 * wide + T * T + i * T + j, gl.where(i >= j, 0.0, sum_F))
        gl.store(dM + wide + i * T + j, sum_M)
        gl.store(dK + wide + state_i * T + j, sum_K)
        gl.store(dP + wide + i * N + state_j, sum_P)
        store_complex(ddecay + walk * N, modes, gl.sum(sum_re, 1), gl.sum(sum_im, 1), None)
        if ONE_TILE:
            channel = next_channel
            walk += gl.num_programs(0)


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
    """Launch the forward pass: arguments and results as in `chunk_triton.forward`."""
    assert filter_blocks(operators) == 2, "up to 64 taps"
    D, total = k.shape[1:]
    B, L = k.shape[0] * segments, segment_length(total, segments)
    walk = plan(B, D, L, C.value, slots=2 * multiprocessors(k.device))
    o = empty_rows(k) if with_output else k.new_empty(0)
    end = k.new_empty((B, D, N.value // 2, 2) if with_end else (0,), dtype=torch.float32)
    shape = saved_states_shape(k, D, N.value // 2, segments) if save_states else (0,)
    states = k.new_empty(shape, dtype=torch.float32)
    forward_kernel[(D * walk.programs_per_channel,)](
        q, k, v, o if with_output else None, *operators, carry, start, end if with_end else None,
        states if states.numel() else None,
        *strides(q), *strides(k), *strides(v), *strides(o if with_output else None),
        B, D, L, walk.rows_per_program, walk.tiles, total, segments, ROWS=walk.rows_per_tile,
        EVEN=walk.is_even(B, L, C.value) and total == segments * L, SEGMENTED=segments > 1,
        STAGES=1 if walk.rows_per_program == walk.rows_per_tile and walk.tiles == 1 else 2,
        num_warps=4,
    )  # fmt: skip
    return o, end, states


def backward(
    do: Tensor,
    dend: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operators: Operators,
    carry: Tensor | None,
    start: Tensor | None,
    states: Tensor,
    *,
    segments: int = 1,
    into: tuple[Tensor, ...] | None = None,
) -> Gradients:
    """Launch the backward pass: arguments and results as in `chunk_triton.backward`."""
    assert filter_blocks(operators) == 2, "up to 64 taps"
    D, total = k.shape[1:]
    B, L = k.shape[0] * segments, segment_length(total, segments)
    walk = plan(B, D, L, C.value, slots=multiprocessors(k.device))
    grads = Gradients.empty(q, k, v, operators, carry, start, walk, segments, into)
    one_tile = walk.rows_per_program == walk.rows_per_tile and walk.tiles == 1
    programs = D * walk.programs_per_channel
    if one_tile and walk.programs_per_channel == 1:
        programs = min(D, multiprocessors(k.device))
    backward_kernel[(programs,)](
        q, k, v, do, grads.q, grads.k, grads.v, *operators, carry, start,
        states if states.numel() else None, dend,
        grads.F, grads.M, grads.K, grads.P, grads.decay, grads.carry, grads.start,
        *strides(q), *strides(k), *strides(v), *strides(do),
        *(stride // total for stride in strides(grads.k)),
        B, D, L, walk.rows_per_program, walk.tiles,
        total, segments, ROWS=walk.rows_per_tile,
        EVEN=walk.is_even(B, L, C.value) and total == segments * L, SEGMENTED=segments > 1,
        ALIKE=len({strides(x) for x in (q, k, v, do, grads.k)}) == 1,
        ONE_TILE=one_tile, num_warps=8,
    )  # fmt: skip
    return grads.summed()
