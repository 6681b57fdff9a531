# ruff: noqa: SIM102  (compile-time branches are kept apart from run-time ones)
"""State passing for the H3 core in plain Triton: any GPU from sm_80 on.

For chunk c of a row, with the operators F, M, K, P and decay of `ssm.operators`:

    s_c = F_0 k_c + F_1 k_{c-1} (+ F_2 k_{c-2});   w_c = s_c v_c;   o_c = q_c (M w_c + P x_c)
    x_{c+1} = decay x_c + K w_c

and backwards, with g_c the gradient of the state behind chunk c:

    dy_c = q_c do_c;   g_{c-1} = conj(decay) g_c + P^T dy_c;   dw_c = M^T dy_c + K^T g_c
    dq_c = do_c y_c;   dv_c = dw_c s_c;   ds_c = dw_c v_c;   dk_c = sum_m F_m^T ds_{c+m}
    dF_m = sum ds_c k_{c-m}^T;   dM = sum dy_c w_c^T;   dK = sum g_c w_c^T;   dP = sum dy_c x_c^T
    ddecay = sum g_c conj(x_c)

Without F, s = k; without v or q, that gate is 1; without o, only states are made.
Matrices lie [time or state, chunk], see `tile`. One program owns a channel and some rows of the
batch, walks their tiles in order, and carries the state in registers.

Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 2 and Proposition 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.kernels.launch import (
    Gradients,
    Operators,
    empty_rows,
    filter_blocks,
    multiprocessors,
    plan,
    product_precision,
    rows_of_walk,
    saved_slots,
    saved_states_shape,
    segment_length,
    strides,
    tile_chunks,
)
from h3lm.flashconv.kernels.tile import (
    T,
    add_conjugate_products,
    add_product,
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
    power8,
    shift_left,
    span_of,
    split_groups,
    split_states,
    store_complex,
)

# of a launch, the best on an H200; three programs fit on a multiprocessor with so many registers
FORWARD = {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
BACKWARD = {"num_warps": 4, "num_stages": 1}  # and of a forward pass that needs more registers


@triton.jit
def load_square(pointer, index):
    """An operator [T, T] that lies contiguous, number `index`."""
    i = tl.arange(0, T)
    return tl.load(pointer + index * T * T + i[:, None] * T + i[None, :])


@triton.jit
def load_state_operators(K, P, index, N: tl.constexpr):
    """K [N, T] and P [T, N] with their states in the order of `tile`."""
    i = tl.arange(0, T)
    row = tl.arange(0, N)
    state = part_of_row(row) * (N // 2) + mode_of_row(row)
    into = tl.load(K + index * N * T + state[:, None] * T + i[None, :])
    out = tl.load(P + index * N * T + i[:, None] * N + state[None, :])
    return into, out


@triton.jit
def load_tile(pointers, mask, EVEN: tl.constexpr):
    """A tile of a tensor; 0 where masked. EVEN: nothing is."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask, 0.0)


@triton.jit
def store_tile(pointers, x, mask, EVEN: tl.constexpr):
    """The inverse of `load_tile`."""
    if EVEN:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask)


@triton.jit
def tile_at(pointer, row, channel, row_stride, channel_stride, first, inner, row_in_tile,
            ROWS: tl.constexpr):  # fmt: skip
    """Addresses [C, T] of a tile whose first row and position are given.

    One base and offsets that all tensors share take fewer registers than rows of addresses.
    """
    base = pointer + (row.to(tl.int64) * row_stride + channel.to(tl.int64) * channel_stride + first)
    if ROWS > 1:
        return base + (row_in_tile.to(tl.int64) * row_stride)[:, None] + inner
    else:
        return base + inner


@triton.jit
def load_before(k_at, ago: tl.constexpr, position, before, mask, length, EVEN: tl.constexpr):
    """The tile `ago` chunks back: 0 in front of a row with `before` more, and where masked."""
    here = position + before >= ago * T
    if not EVEN:
        here = here & mask & (position < length + ago * T)
    return tl.load(k_at - ago * T, here, 0.0)


@triton.jit
def filter_inputs(
    F0, F1, F2, k_at, k_tile, position, before, valid, length,
    BLOCKS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Short filter s = F_0 k_c + F_1 k_{c-1} + F_2 k_{c-2}, and k of the chunks before."""
    s = tl.dot(F0, tl.trans(k_tile), input_precision=PRECISION)
    last = load_before(k_at, 1, position, before, valid, length, EVEN)
    s = add_product(s, F1, tl.trans(last), PRECISION)
    if BLOCKS > 2:
        early = load_before(k_at, 2, position, before, valid, length, EVEN)
        s = add_product(s, F2, tl.trans(early), PRECISION)
    else:
        early = last
    return s, last, early


@triton.jit
def first_saved(tile_row, channel, begin, D, slots, bounds, C: tl.constexpr):
    """Number of the state before the first tile of a row, among those that are saved.

    A row has `slots` of them; the tiles of packed sequences share those of one row, each sequence
    from begin // (C T) + its number on.
    """
    if bounds is not None:
        return channel.to(tl.int64) * slots + begin // (C * T) + tile_row
    else:
        return (tile_row.to(tl.int64) * D + channel) * slots


@triton.jit(do_not_specialize=["B", "rows_per_program", "tiles", "slots", "segments"])
def forward_kernel(
    q, k, v, o, F, M, K, P, decay, carry, start, end, tile_states, bounds,
    q_row, q_channel, k_row, k_channel, v_row, v_channel, o_row, o_channel,
    B, D, L, rows_per_program, tiles, slots, total, segments,
    N: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, SEGMENTED: tl.constexpr,
    REVERSED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Forward pass; a tile holds ROWS rows of C / ROWS chunks.

    EARLY: v is asked for before the filter runs, and k of the next tile before outputs are made;
    for EVEN tiles.

    REVERSED: chunks are walked from last to first, to add up what they leave to the left.
    """
    CHUNKS: tl.constexpr = C // ROWS
    GROUPS: tl.constexpr = C // 8
    dtype: tl.constexpr = k.dtype.element_ty
    channel = tl.program_id(0) % D
    first_row = tl.program_id(0) // D * rows_per_program
    i = tl.arange(0, T)
    in_tile = chunk_of_column(tl.arange(0, C))
    row_in_tile = in_tile // CHUNKS
    in_row = in_tile % CHUNKS
    inner = (-in_row if REVERSED else in_row)[:, None] * T + i[None, :]  # as it lies in memory
    state = tl.arange(0, N)
    state_offset = 2 * mode_of_row(state) + part_of_row(state)
    group = tl.arange(0, GROUPS)[None, :]
    zero = tl.zeros([N // 2, GROUPS], tl.float32)

    K_c, P_c = load_state_operators(K, P, channel, N)
    if o is not None:
        M_c = load_square(M, channel)
    if F is not None:
        F0 = load_square(F, channel * BLOCKS)
        F1 = load_square(F, channel * BLOCKS + 1)
        F2 = load_square(F, channel * BLOCKS + BLOCKS - 1) if BLOCKS > 2 else F1
    modes = tl.arange(0, N // 2)
    decay_re, decay_im = load_complex(decay + channel * N, modes, None)
    group_re, group_im = power8(decay_re, decay_im)
    chunk_re = decay_re.to(tl.float32)[:, None]
    chunk_im = decay_im.to(tl.float32)[:, None]
    if EARLY:
        source, _, begin, _, _ = span_of(first_row, B, L, total, segments, bounds, SEGMENTED)
        k_tile = tl.load(
            tile_at(k, source, channel, k_row, k_channel, begin, inner, row_in_tile, ROWS)
        )
    for block in range(0, rows_per_program // ROWS):
        tile_row = first_row + block * ROWS
        source, owner, begin, before, length = span_of(
            tile_row, B, L, total, segments, bounds, SEGMENTED
        )
        if bounds is not None:
            tiles = (length + C * T - 1) // (C * T)
        chunks = (length + T - 1) // T if REVERSED else length // T  # that an end state covers
        last_tile = (length - 1) // (CHUNKS * T) if SEGMENTED else tiles - 1
        valid = (tile_row + row_in_tile < B)[:, None]
        saved_at = first_saved(tile_row, channel, begin, D, slots, bounds, C)
        given_re, given_im = load_row_states(start, tile_row, channel, B, D, modes, ROWS)
        x_re = given_re[0]
        x_im = given_im[0]
        for tile in range(0, tiles):
            first = (chunks - 1 - tile * CHUNKS if REVERSED else tile * CHUNKS) * T
            position = first + inner
            mask = valid & (position < length)
            if REVERSED:
                mask = mask & (position >= 0)

            first += begin
            k_at = tile_at(k, source, channel, k_row, k_channel, first, inner, row_in_tile, ROWS)
            if not EARLY:
                k_tile = load_tile(k_at, mask, EVEN)
            if v is not None:
                v_at = tile_at(
                    v, source, channel, v_row, v_channel, first, inner, row_in_tile, ROWS
                )
                if EARLY:
                    v_tile = tl.load(v_at)
            if F is not None:
                w, _, _ = filter_inputs(
                    F0,
                    F1,
                    F2,
                    k_at,
                    k_tile,
                    position,
                    before,
                    valid,
                    length,
                    BLOCKS,
                    EVEN,
                    PRECISION,
                )
                if carry is not None:
                    if tile + before == 0:
                        reach: tl.constexpr = (BLOCKS - 1) * T
                        carry_at = tile_at(
                            carry, owner, channel, D * reach, reach, 0, inner, row_in_tile, ROWS
                        )
                        early = mask & (in_row < BLOCKS - 1)[:, None]
                        w += tl.trans(tl.load(carry_at, early, 0.0))
            else:
                w = tl.trans(k_tile).to(tl.float32)
            if v is not None:
                if not EARLY:
                    v_tile = load_tile(v_at, mask, EVEN)
                w *= tl.trans(v_tile).to(tl.float32)
            w = w.to(dtype)

            z = tl.dot(K_c, w, input_precision=PRECISION)
            z_re, z_im = split_states(z, N, C, None)
            total_re, total_im = group_totals(z_re, z_im, chunk_re, chunk_im, False)
            if ROWS == 1:
                first_re = (x_re,)
                first_im = (x_im,)
                if tile_states is not None:
                    saved = tile_states + (saved_at + tile) * N
                    store_complex(saved, modes, x_re, x_im, tile_row < B)
            else:
                first_re = given_re
                first_im = given_im
            start_re, start_im, last_re, last_im = group_starts(
                split_groups(total_re, C), split_groups(total_im, C), first_re, first_im,
                group_re, group_im, group, zero, GROUPS, ROWS, False,
            )  # fmt: skip
            x_re = last_re[0]
            x_im = last_im[0]
            states_re, states_im = group_states(start_re, start_im, z_re, z_im, chunk_re, chunk_im)
            x = join_states(states_re, states_im, N, C, None)

            if end is not None:
                if tile == last_tile:
                    for r in tl.static_range(ROWS):
                        row_at = ((tile_row + r).to(tl.int64) * D + channel) * N
                        if chunks == (last_tile + 1) * CHUNKS:
                            store_complex(
                                end + row_at, modes, last_re[r], last_im[r], tile_row + r < B
                            )
                        else:
                            here = (tile * CHUNKS + in_row == chunks) & (row_in_tile == r)
                            end_state = tl.sum(tl.where(here[None, :], x, 0.0), 1)
                            tl.store(end + row_at + state_offset, end_state, tile_row + r < B)
            if EARLY:
                over = tile == tiles - 1
                next_row = tl.minimum(tile_row + tl.where(over, ROWS, 0), B - ROWS)
                next_source, _, next_begin, _, _ = span_of(
                    next_row, B, L, total, segments, bounds, SEGMENTED
                )
                next_first = next_begin + tl.where(over, 0, (tile + 1) * CHUNKS * T)
                k_at = tile_at(
                    k, next_source, channel, k_row, k_channel, next_first, inner, row_in_tile, ROWS
                )
                k_tile = tl.load(k_at)
            if o is not None:
                y = tl.dot(M_c, w, input_precision=PRECISION)
                y = add_product(y, P_c, x.to(dtype), PRECISION)
                if q is not None:
                    q_at = tile_at(
                        q, source, channel, q_row, q_channel, first, inner, row_in_tile, ROWS
                    )
                    y *= tl.trans(load_tile(q_at, mask, EVEN)).to(tl.float32)
                o_at = tile_at(
                    o, source, channel, o_row, o_channel, first, inner, row_in_tile, ROWS
                )
                store_tile(o_at, tl.trans(y.to(dtype)), mask, EVEN)


@triton.jit(do_not_specialize=["B", "rows_per_program", "tiles", "slots", "segments"])
def backward_kernel(
    q, k, v, do, dq, dk, dv, F, M, K, P, decay, carry, start, tile_states, bounds, dend,
    dF, dM, dK, dP, ddecay, dcarry, dstart,
    q_row, q_channel, k_row, k_channel, v_row, v_channel, do_row, do_channel, d_row, d_channel,
    B, D, L, rows_per_program, tiles, slots, total, segments,
    N: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, SEGMENTED: tl.constexpr,
    DATA: tl.constexpr, FILTER: tl.constexpr, SYSTEM: tl.constexpr,
):  # fmt: skip
    """Gradients of the tensors (DATA), of F (FILTER), of M, K, P and the decay (SYSTEM).

    Each launch makes what it is asked for; tiles are walked from last to first.
    States inside a tile are made again from the tile's start. dq, dk and dv have strides in
    common. Each program writes its own sum of the operators' gradients, (programs, ...).
    """
    CHUNKS: tl.constexpr = C // ROWS
    GROUPS: tl.constexpr = C // 8
    dtype: tl.constexpr = k.dtype.element_ty
    program = tl.program_id(0)
    channel = program % D
    first_row = program // D * rows_per_program
    i = tl.arange(0, T)
    in_tile = chunk_of_column(tl.arange(0, C))
    row_in_tile = in_tile // CHUNKS
    in_row = in_tile % CHUNKS
    inner = in_row[:, None] * T + i[None, :]
    state = tl.arange(0, N)
    state_offset = 2 * mode_of_row(state) + part_of_row(state)
    group = tl.arange(0, GROUPS)[None, :]
    group_of_rows = tl.zeros([T, GROUPS], tl.int32) + group
    zero = tl.zeros([N // 2, GROUPS], tl.float32)

    M_c = load_square(M, channel)
    K_c, P_c = load_state_operators(K, P, channel, N)
    if F is not None:
        F0 = load_square(F, channel * BLOCKS)
        F1 = load_square(F, channel * BLOCKS + 1)
        F2 = load_square(F, channel * BLOCKS + BLOCKS - 1) if BLOCKS > 2 else F1
        sum_F = tl.zeros([T, T], tl.float32)
        sum_F1 = sum_F
        lower = i[:, None] >= i[None, :]
        reach: tl.constexpr = (BLOCKS - 1) * T  # of a carry
    modes = tl.arange(0, N // 2)
    decay_re, decay_im = load_complex(decay + channel * N, modes, None)
    group_re, group_im = power8(decay_re, decay_im)
    chunk_re = decay_re.to(tl.float32)[:, None]
    chunk_im = decay_im.to(tl.float32)[:, None]
    sum_M = tl.zeros([T, T], tl.float32)
    sum_K = tl.zeros([N, T], tl.float32)
    sum_P = tl.zeros([T, N], tl.float32)
    sum_re = zero
    sum_im = zero

    for block in range(0, rows_per_program // ROWS):
        tile_row = first_row + block * ROWS
        source, owner, begin, before, length = span_of(
            tile_row, B, L, total, segments, bounds, SEGMENTED
        )
        if bounds is not None:
            tiles = (length + C * T - 1) // (C * T)
        full_chunks = length // T
        last_tile = (length - 1) // (CHUNKS * T) if SEGMENTED else tiles - 1
        valid = (tile_row + row_in_tile < B)[:, None]
        saved_at = first_saved(tile_row, channel, begin, D, slots, bounds, C)
        g_re = tl.zeros([N // 2], tl.float32)
        g_im = tl.zeros([N // 2], tl.float32)
        ds_carry = tl.zeros([T, GROUPS], tl.float32)
        ds_carry2 = tl.zeros([T, GROUPS], tl.float32)
        for step in range(0, tiles):
            tile = tiles - 1 - step
            position = tile * CHUNKS * T + inner
            mask = valid & (position < length)
            first = begin + tile * CHUNKS * T
            k_at = tile_at(k, source, channel, k_row, k_channel, first, inner, row_in_tile, ROWS)
            k_tile = load_tile(k_at, mask, EVEN)
            if F is not None:
                s, k_before, k_early = filter_inputs(
                    F0,
                    F1,
                    F2,
                    k_at,
                    k_tile,
                    position,
                    before,
                    valid,
                    length,
                    BLOCKS,
                    EVEN,
                    PRECISION,
                )
                if carry is not None:
                    if tile + before == 0:
                        carry_at = tile_at(
                            carry, owner, channel, D * reach, reach, 0, inner, row_in_tile, ROWS
                        )
                        early = valid & (in_row < BLOCKS - 1)[:, None]
                        s += tl.trans(tl.load(carry_at, early, 0.0))
            else:
                s = tl.trans(k_tile).to(tl.float32)
            if v is not None:
                v_at = tile_at(
                    v, source, channel, v_row, v_channel, first, inner, row_in_tile, ROWS
                )
                v_tile = tl.trans(load_tile(v_at, mask, EVEN))
                w = (s * v_tile.to(tl.float32)).to(dtype)
            else:
                w = s.to(dtype)
            do_at = tile_at(
                do, source, channel, do_row, do_channel, first, inner, row_in_tile, ROWS
            )
            do_tile = tl.trans(load_tile(do_at, mask, EVEN))
            if q is not None:
                q_at = tile_at(
                    q, source, channel, q_row, q_channel, first, inner, row_in_tile, ROWS
                )
                q_tile = tl.trans(load_tile(q_at, mask, EVEN))
                dy = (q_tile.to(tl.float32) * do_tile.to(tl.float32)).to(dtype)
            else:
                dy = do_tile

            z = tl.dot(K_c, w, input_precision=PRECISION)
            p = tl.dot(tl.trans(P_c), dy, input_precision=PRECISION)
            if dend is not None:
                if tile == last_tile:
                    row = tile_row + row_in_tile
                    here = (tile * CHUNKS + in_row == full_chunks) & (row < B)
                    end_at = ((row.to(tl.int64) * D + channel) * N)[None, :] + state_offset[:, None]
                    p += tl.load(dend + end_at, here[None, :], 0.0)
            if ROWS == 1:
                saved = tile_states + (saved_at + tile) * N
                x_re, x_im = load_complex(saved, modes, tile_row < B)
                first_re = (x_re,)
                first_im = (x_im,)
                if dend is not None:  # empty tiles may lie behind the last: they leave zeros
                    if (tile == last_tile) & (full_chunks == (last_tile + 1) * CHUNKS):
                        row_at = (tile_row.to(tl.int64) * D + channel) * N
                        g_re, g_im = load_complex(dend + row_at, modes, tile_row < B)
                behind_re = (g_re,)
                behind_im = (g_im,)
            else:
                first_re, first_im = load_row_states(start, tile_row, channel, B, D, modes, ROWS)
                behind = tl.where(full_chunks == CHUNKS, B, 0)  # rows that end with the tile
                behind_re, behind_im = load_row_states(
                    dend, tile_row, channel, behind, D, modes, ROWS
                )

            z_re, z_im = split_states(z, N, C, None)
            total_re, total_im = group_totals(z_re, z_im, chunk_re, chunk_im, False)
            start_re, start_im, _, _ = group_starts(
                split_groups(total_re, C), split_groups(total_im, C), first_re, first_im,
                group_re, group_im, group, zero, GROUPS, ROWS, False,
            )  # fmt: skip
            states_re, states_im = group_states(start_re, start_im, z_re, z_im, chunk_re, chunk_im)
            x = join_states(states_re, states_im, N, C, None).to(dtype)

            p_re, p_im = split_states(p, N, C, None)
            total_re, total_im = group_totals(p_re, p_im, chunk_re, -chunk_im, True)
            start_re, start_im, last_re, last_im = group_starts(
                split_groups(total_re, C), split_groups(total_im, C), behind_re, behind_im,
                group_re, -group_im, group, zero, GROUPS, ROWS, True,
            )  # fmt: skip
            g_re = last_re[0]
            g_im = last_im[0]
            grads_re, grads_im = group_states_reversed(
                start_re, start_im, p_re, p_im, chunk_re, -chunk_im
            )
            g = join_states(grads_re, grads_im, N, C, None).to(dtype)
            if SYSTEM:
                sum_re, sum_im = add_conjugate_products(
                    sum_re, sum_im, states_re, states_im, grads_re, grads_im
                )
            if DATA and dstart is not None:
                if tile == 0:
                    for r in tl.static_range(ROWS):
                        row_at = ((tile_row + r).to(tl.int64) * D + channel) * N
                        store_complex(
                            dstart + row_at, modes, last_re[r], last_im[r], tile_row + r < B
                        )

            if DATA and q is not None:
                y = tl.dot(M_c, w, input_precision=PRECISION)
                y = add_product(y, P_c, x, PRECISION)
                store_tile(
                    tile_at(dq, source, channel, d_row, d_channel, first, inner, row_in_tile, ROWS),
                    tl.trans((y * do_tile.to(tl.float32)).to(dtype)),
                    mask,
                    EVEN,
                )
            dw = tl.dot(tl.trans(M_c), dy, input_precision=PRECISION)
            dw = add_product(dw, tl.trans(K_c), g, PRECISION)
            if SYSTEM:
                sum_M = add_product(sum_M, dy, tl.trans(w), PRECISION)
                sum_K = add_product(sum_K, g, tl.trans(w), PRECISION)
                sum_P = add_product(sum_P, dy, tl.trans(x), PRECISION)
            if v is not None:
                if DATA:
                    store_tile(
                        tile_at(
                            dv, source, channel, d_row, d_channel, first, inner, row_in_tile, ROWS
                        ),
                        tl.trans((dw * s).to(dtype)),
                        mask,
                        EVEN,
                    )
                dw *= v_tile.to(tl.float32)
            if F is not None:
                if DATA and dcarry is not None:
                    if tile == 0:
                        dcarry_at = tile_at(
                            dcarry, tile_row, channel, D * reach, reach, 0, inner, row_in_tile, ROWS
                        )
                        early = valid & (in_row < BLOCKS - 1)[:, None]
                        tl.store(dcarry_at, tl.trans(dw), early)
                ds = dw.to(dtype)
                if FILTER:
                    last = k_early if BLOCKS > 2 else k_before
                    at_zero = tl.dot(ds, k_tile, input_precision=PRECISION)
                    at_last = tl.dot(ds, last, input_precision=PRECISION)
                    sum_F += tl.where(lower, at_zero, at_last)
                    if BLOCKS > 2:
                        sum_F1 = add_product(sum_F1, ds, k_before, PRECISION)
                if DATA:
                    next_ds, ds_carry = shift_left(dw, ds_carry, group_of_rows, C, ROWS, None, None)
                    d_k = tl.dot(tl.trans(F0), ds, input_precision=PRECISION)
                    d_k = add_product(d_k, tl.trans(F1), next_ds.to(dtype), PRECISION)
                    if BLOCKS > 2:
                        next_ds, ds_carry2 = shift_left(
                            next_ds, ds_carry2, group_of_rows, C, ROWS, None, None
                        )
                        d_k = add_product(d_k, tl.trans(F2), next_ds.to(dtype), PRECISION)
                    store_tile(
                        tile_at(
                            dk, source, channel, d_row, d_channel, first, inner, row_in_tile, ROWS
                        ),
                        tl.trans(d_k.to(dtype)),
                        mask,
                        EVEN,
                    )
            elif DATA:
                store_tile(
                    tile_at(dk, source, channel, d_row, d_channel, first, inner, row_in_tile, ROWS),
                    tl.trans(dw.to(dtype)),
                    mask,
                    EVEN,
                )

    wide_program = program.to(tl.int64)
    square = i[:, None] * T + i[None, :]
    row = part_of_row(state) * (N // 2) + mode_of_row(state)
    if SYSTEM:
        tl.store(dM + wide_program * T * T + square, sum_M)
        tl.store(dK + wide_program * N * T + row[:, None] * T + i[None, :], sum_K)
        tl.store(dP + wide_program * N * T + i[:, None] * N + row[None, :], sum_P)
        sums = ddecay + wide_program * N
        store_complex(sums, modes, tl.sum(sum_re, 1), tl.sum(sum_im, 1), None)
    if FILTER and F is not None:
        # F_0 needs t >= u; the last block, of which only t < u is used, shares its sum
        at = dF + wide_program * BLOCKS * T * T + square
        tl.store(at, tl.where(lower, sum_F, 0.0))
        tl.store(at + (BLOCKS - 1) * T * T, tl.where(lower, 0.0, sum_F))
        if BLOCKS > 2:
            tl.store(at + T * T, sum_F1)


def forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    operators: Operators,
    carry: Tensor | None,
    start: Tensor | None,
    *,
    with_output: bool,
    with_end: bool,
    save_states: bool,
    segments: int = 1,
    leftwards: bool = False,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward pass.

    With segments, each row of the tensors is that many rows of the walk, of which each has a
    carry, a start and an end of its own, (B segments, ...).
    Leftwards, only an end is made, by chunks from last to first.

    Returns:
        o (B, D, L) or empty; the state after the last full chunk, (B, D, N/2, 2), or empty; the
        state before each tile, (B, D, tiles, N/2, 2), empty unless it is to be saved and needed.
    """
    D, total = k.shape[1:]
    B, L = rows_of_walk(k, segments, bounds), segment_length(total, segments)
    N = operators.K.shape[1]
    C = tile_chunks(k.dtype)
    walk = plan(B, D, L, C, slots=8 * multiprocessors(k.device), packed=bounds is not None)
    slots = saved_slots(walk, total, C, bounds)
    o = empty_rows(k) if with_output else k.new_empty(0)
    end = k.new_empty((B, D, N // 2, 2) if with_end else (0,), dtype=torch.float32)
    shape = saved_states_shape(k, D, N // 2, segments, bounds) if save_states else (0,)
    states = k.new_empty(shape, dtype=torch.float32)
    even = walk.is_even(B, L, C) and total == segments * L and bounds is None
    slim = k.element_size() == 2 and N <= 64 and filter_blocks(operators) <= 2
    forward_kernel[(D * walk.programs_per_channel,)](
        q, k, v, o if with_output else None, *operators.rounded(k.dtype), carry, start,
        end if with_end else None,
        states if states.numel() else None, bounds,
        *strides(q), *strides(k), *strides(v), *strides(o if with_output else None),
        B, D, L, walk.rows_per_program, walk.tiles, slots, total, segments,
        N=N, C=C, ROWS=walk.rows_per_tile, BLOCKS=filter_blocks(operators),
        PRECISION=product_precision(k.dtype), EVEN=even, SEGMENTED=segments > 1,
        REVERSED=leftwards, EARLY=slim and even and not leftwards,
        **(FORWARD if slim else BACKWARD),
    )  # fmt: skip
    return o, end, states


def backward(
    do: Tensor,
    dend: Tensor | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    operators: Operators,
    carry: Tensor | None,
    start: Tensor | None,
    states: Tensor,
    *,
    segments: int = 1,
    bounds: Tensor | None = None,
    into: tuple[Tensor, ...] | None = None,
) -> Gradients:
    """Launch the backward pass, with the states that the forward pass saved.

    Gradients of q, k and v are made, or lie `into` tensors of common strides.
    """
    D, total = k.shape[1:]
    B, L = rows_of_walk(k, segments, bounds), segment_length(total, segments)
    N = operators.K.shape[1]
    C = tile_chunks(k.dtype)
    walk = plan(B, D, L, C, slots=2 * multiprocessors(k.device), packed=bounds is not None)
    slots = saved_slots(walk, total, C, bounds)
    grads = Gradients.empty(q, k, v, operators, carry, start, walk, segments, into)
    rounded = operators.rounded(k.dtype)
    # one launch for each kind of sum: together they do not fit in the registers
    for part in ("DATA", "FILTER", "SYSTEM"):
        if part == "FILTER" and operators.F is None:
            continue
        asked = {name: name == part for name in ("DATA", "FILTER", "SYSTEM")}
        backward_kernel[(D * walk.programs_per_channel,)](
            q, k, v, do, grads.q, grads.k, grads.v, *rounded, carry, start,
            states if states.numel() else None, bounds, dend,
            grads.F, grads.M, grads.K, grads.P, grads.decay, grads.carry, grads.start,
            *strides(q), *strides(k), *strides(v), *strides(do), *strides(grads.k),
            B, D, L, walk.rows_per_program, walk.tiles, slots, total, segments,
            N=N, C=C, ROWS=walk.rows_per_tile, BLOCKS=filter_blocks(operators),
            PRECISION=product_precision(k.dtype),
            EVEN=walk.is_even(B, L, C) and total == segments * L and bounds is None,
            SEGMENTED=segments > 1, **asked, **BACKWARD,
        )  # fmt: skip
    return grads.summed()
