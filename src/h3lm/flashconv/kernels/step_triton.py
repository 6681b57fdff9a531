"""One token of the H3 core in Triton: everything between the projections, states in place.

    s_i = sum_j taps_j k_i[t-j];   w_ij = s_i v_j;   x_ij = a x_ij + b w_ij
    y_ij = 2 Re(sum_n c_n x_ij,n) + skip w_ij;   o_j = sum_i q_i y_ij

A program owns some heads of some rows. It moves their diagonal states in and out, reads the shift
ring and writes one value of it: memory traffic is nearly all that a step costs. So everything that
does not depend on q, k and v is asked for at once, first the states, and programs are small and
many: a multiprocessor has about 100 KB on the way. Operators come from the L2 cache, once for all
rows of a program.

Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 1, as a recurrence.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.kernels.overlap import fetch, launch_options, wait_for_inputs
from h3lm.flashconv.step import rows_class


@dataclass(frozen=True)
class StepSize:
    """Sizes of the kernel; `h3lm.bench.generate_tune` times them.

    Attributes:
        columns: Channels of a program: 256 bytes of state for each row with 32 modes.
        rows: Rows of a program.
        warps: Warps of a program; a single one needs no barrier.
        groups: Groups of so many rows that a program walks over, for heads of one channel.
        stages: How many of these groups are on their way through shared memory.
        lean: Whether it is the kernel of `step_gluon`, for the shapes that it takes: `columns` are
            4 for each warp, a program walks over `rows`, `stages` of them on their way.
    """

    columns: int = 4
    rows: int = 2
    warps: int = 1
    groups: int = 1
    stages: int = 1
    lean: bool = False


SIZES = {1: StepSize(), 16: StepSize(), 64: StepSize()}  # by rows at most; the last for more


@triton.jit
def split_pairs(x, A: tl.constexpr, B: tl.constexpr, MODES: tl.constexpr):
    """Real and imaginary parts of interleaved pairs [A, B, 2 MODES]."""
    return tl.split(tl.reshape(x, (A, B, MODES, 2)))


@triton.jit
def per_column(x, ROWS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A value of each head [ROWS, HEADS] for each of the head's columns [ROWS, HEADS HEAD_DIM]."""
    wide = tl.broadcast_to(x[:, :, None], (ROWS, HEADS, HEAD_DIM))
    return tl.reshape(wide, (ROWS, HEADS * HEAD_DIM))


@triton.jit
def load_operator(pointer, offset, mask, COLUMNS: tl.constexpr, MODES: tl.constexpr):
    """Complex numbers of each column as two tiles [1, COLUMNS, MODES]."""
    pairs = tl.load(pointer + offset, mask=mask, other=0.0)
    return split_pairs(pairs, 1, COLUMNS, MODES)


@triton.jit
def taps_by_slot(
    taps,
    channel,
    write,
    mask,
    N_TAPS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Taps [rows, channels, SLOTS] in the order of rings that go on at slots `write` [rows]."""
    age = write[:, None] - tl.arange(0, SLOTS)[None, :]
    age = tl.where(age < 0, age + N_TAPS, age)
    return tl.load(taps + channel[None, :, None] * N_TAPS + age[:, None, :], mask=mask, other=0.0)


@triton.jit
def load_inputs(
    group, q, k, v, B, D, q_stride, k_stride, v_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """q, k and v of a program's channels in a group of rows, [ROWS, COLUMNS] each."""
    row = (group * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < B) & (channel < D)
    far_row = row.to(tl.int64)
    gate = tl.load(q + far_row * q_stride + channel, mask=mask, other=0.0)
    new = tl.load(k + far_row * k_stride + channel, mask=mask, other=0.0)
    value = tl.load(v + far_row * v_stride + channel, mask=mask, other=0.0)
    return gate, new, value


@triton.jit
def advance_rows(
    group,
    gate,
    new,
    value,
    q,
    k,
    v,
    o,
    ring,
    position,
    diagonal,
    taps,
    a_re,
    a_im,
    b_re,
    b_im,
    c_re,
    c_im,
    direct,
    kept,
    kept_write,
    B,
    H,
    q_stride,
    k_stride,
    v_stride,
    HEAD_DIM: tl.constexpr,
    N_TAPS: tl.constexpr,
    MODES: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Advance HEADS heads of a group of ROWS rows by a token.

    KEPT: `gate`, `new` and `value` are q, k and v, and `kept` the taps [1, HEADS, SLOTS] for rings
    that go on at `kept_write`, as all of these do. WAIT: states are asked for before the wait for
    q, k and v.
    """
    COLUMNS: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    head_of_column = tl.program_id(0) * HEADS + column // HEAD_DIM
    channel = tl.program_id(0) * COLUMNS + column
    slot = tl.arange(0, SLOTS)
    pair = tl.arange(0, 2 * WIDTH)
    D = H * HEAD_DIM
    row = group * ROWS + tl.arange(0, ROWS)
    live = row < B
    far_row = row.to(tl.int64)  # states pass 2^31 elements
    column_mask = live[:, None] & (head_of_column < H)[None, :]
    head_mask = live[:, None] & (head < H)[None, :]
    slot_mask = head_mask[:, :, None]
    if SLOTS != N_TAPS:
        slot_mask = slot_mask & (slot < N_TAPS)[None, None, :]
    state_mask = column_mask[:, :, None]
    if WIDTH != MODES:
        state_mask = state_mask & (pair < 2 * MODES)[None, None, :]

    if KEPT:
        write = tl.zeros((ROWS,), tl.int32) + kept_write
    else:
        write = (tl.load(position + row, mask=live, other=0) % N_TAPS).to(tl.int32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(HEAD_DIM):
        of_pair = (head_of_column * HEAD_DIM + i) * HEAD_DIM + column % HEAD_DIM
        state_at = (far_row[:, None] * (D * HEAD_DIM) + of_pair[None, :]) * (2 * MODES)
        state = diagonal + state_at[:, :, None] + pair[None, None, :]
        old = tl.load(state, mask=state_mask, other=0.0)
        source = head * HEAD_DIM + i
        ring_at = (far_row[:, None] * D + source[None, :]) * N_TAPS
        window = tl.load(
            ring + ring_at[:, :, None] + slot[None, None, :], mask=slot_mask, other=0.0
        )
        weight = kept if KEPT else taps_by_slot(taps, source, write, slot_mask, N_TAPS, SLOTS)
        if not KEPT:
            if i == 0:
                wait_for_inputs(WAIT)
                v_at = far_row[:, None] * v_stride + channel[None, :]
                value = tl.load(v + v_at, mask=column_mask, other=0.0)
            k_at = far_row[:, None] * k_stride + source[None, :]
            new = tl.load(k + k_at, mask=head_mask, other=0.0)
            q_at = far_row[:, None] * q_stride + source[None, :]
            gate = tl.load(q + q_at, mask=head_mask, other=0.0)
        # the oldest value makes room for the new one; other threads may or may not see it yet
        here = slot[None, None, :] == write[:, None, None]
        window = tl.where(here, new[:, :, None], window)
        tl.store(ring + ring_at + write[:, None], new, mask=head_mask)
        s = tl.sum(window.to(tl.float32) * weight, 2)

        w = per_column(s, ROWS, HEADS, HEAD_DIM) * value.to(tl.float32)
        re, im = split_pairs(old, ROWS, COLUMNS, WIDTH)
        new_re = a_re * re - a_im * im + b_re * w[:, :, None]
        new_im = a_re * im + a_im * re + b_im * w[:, :, None]
        joined = tl.reshape(tl.join(new_re, new_im), (ROWS, COLUMNS, 2 * WIDTH))
        tl.store(state, joined, mask=state_mask)
        y = 2 * tl.sum(c_re * new_re - c_im * new_im, 2) + direct[None, :] * w
        total += per_column(gate.to(tl.float32), ROWS, HEADS, HEAD_DIM) * y
    o_at = far_row[:, None] * D + channel[None, :]
    tl.store(o + o_at, total.to(o.dtype.element_ty), mask=column_mask)


@triton.jit
def fetch_states(
    first_row,
    ring,
    diagonal,
    B,
    D,
    N_TAPS: tl.constexpr,
    MODES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Ask for the states of a program's channels in ROWS rows, a line of 128 bytes a thread."""
    row = tl.minimum(first_row + tl.arange(0, ROWS), B - 1).to(tl.int64)[:, None]
    VALUES: tl.constexpr = COLUMNS * 2 * MODES
    LINES: tl.constexpr = triton.next_power_of_2(max(1, VALUES // 32))
    at = tl.program_id(0) * VALUES + tl.arange(0, LINES)[None, :] * 32
    fetch(diagonal + row * (D * 2 * MODES) + tl.minimum(at, D * 2 * MODES - 1), True)
    IN_LINE: tl.constexpr = 1024 // ring.dtype.element_ty.primitive_bitwidth
    RING: tl.constexpr = COLUMNS * N_TAPS
    RING_LINES: tl.constexpr = triton.next_power_of_2(max(1, RING // IN_LINE))
    at = tl.program_id(0) * RING + tl.arange(0, RING_LINES)[None, :] * IN_LINE
    fetch(ring + row * (D * N_TAPS) + tl.minimum(at, D * N_TAPS - 1), True)


@triton.jit
def h3_step_kernel(
    q,
    k,
    v,
    o,
    ring,
    position,
    diagonal,
    taps,
    a,
    b,
    c,
    skip,
    B,
    H,
    q_stride,
    k_stride,
    v_stride,
    HEAD_DIM: tl.constexpr,
    N_TAPS: tl.constexpr,
    MODES: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Advance HEADS heads of GROUPS groups of ROWS rows; SLOTS and WIDTH pad taps and modes.

    Operators stay in registers; with more than one group, states come through shared memory, some
    groups ahead. EARLY: no kernel of this chain writes anything but q, k and v (see `overlap`).
    """
    COLUMNS: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    head_of_column = tl.program_id(0) * HEADS + tl.arange(0, COLUMNS) // HEAD_DIM
    pair = tl.arange(0, 2 * WIDTH)
    mask = (head_of_column < H)[None, :, None]
    if WIDTH != MODES:
        mask = mask & (pair < 2 * MODES)[None, None, :]
    at = head_of_column[None, :, None] * (2 * MODES) + pair[None, None, :]
    first = tl.program_id(1) * GROUPS
    if GROUPS > 1 and EARLY:
        fetch_states(
            first * ROWS, ring, diagonal, B, H, N_TAPS, MODES,
            ROWS * triton.next_power_of_2(STAGES), COLUMNS,
        )  # fmt: skip
    a_re, a_im = load_operator(a, at, mask, COLUMNS, WIDTH)
    b_re, b_im = load_operator(b, at, mask, COLUMNS, WIDTH)
    c_re, c_im = load_operator(c, at, mask, COLUMNS, WIDTH)
    direct = tl.load(skip + head_of_column, mask=head_of_column < H, other=0.0)
    if GROUPS == 1:
        advance_rows(
            first, None, None, None, q, k, v, o, ring, position, diagonal, taps,
            a_re, a_im, b_re, b_im, c_re, c_im, direct, None, None,
            B, H, q_stride, k_stride, v_stride,
            HEAD_DIM, N_TAPS, MODES, ROWS, HEADS, SLOTS, WIDTH, False, EARLY,
        )  # fmt: skip
    else:
        last = tl.minimum(first + GROUPS, tl.cdiv(B, ROWS))
        row = first * ROWS + tl.arange(0, GROUPS * ROWS)
        write = tl.load(position + tl.minimum(row, B - 1)) % N_TAPS
        low = tl.min(write, 0).to(tl.int32)
        alike = low == tl.max(write, 0).to(tl.int32)
        tap_mask = (head < H)[None, :, None] & (tl.arange(0, SLOTS) < N_TAPS)[None, None, :]
        kept = taps_by_slot(
            taps, head, tl.zeros((1,), tl.int32) + low, tap_mask, N_TAPS, SLOTS
        )  # fmt: skip
        wait_for_inputs(EARLY)
        if alike:
            gate, new, value = load_inputs(
                first, q, k, v, B, H, q_stride, k_stride, v_stride, ROWS, HEADS
            )
            for group in tl.range(first, last, num_stages=STAGES):
                next_gate, next_new, next_value = load_inputs(
                    group + 1, q, k, v, B, H, q_stride, k_stride, v_stride, ROWS, HEADS
                )
                advance_rows(
                    group, gate, new, value, q, k, v, o, ring, position, diagonal, taps,
                    a_re, a_im, b_re, b_im, c_re, c_im, direct, kept, low,
                    B, H, q_stride, k_stride, v_stride,
                    HEAD_DIM, N_TAPS, MODES, ROWS, HEADS, SLOTS, WIDTH, True, False,
                )  # fmt: skip
                gate, new, value = next_gate, next_new, next_value
        else:
            for group in tl.range(first, last, num_stages=1):
                advance_rows(
                    group, None, None, None, q, k, v, o, ring, position, diagonal, taps,
                    a_re, a_im, b_re, b_im, c_re, c_im, direct, None, None,
                    B, H, q_stride, k_stride, v_stride,
                    HEAD_DIM, N_TAPS, MODES, ROWS, HEADS, SLOTS, WIDTH, False, False,
                )  # fmt: skip


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    ring: Tensor,
    position: Tensor,
    diagonal: Tensor,
    head_dim: int,
    early: bool = False,
    size: StepSize | None = None,
) -> Tensor:
    """Launch the kernel; see `flashconv.h3_step_in_place` for shapes; one of `SIZES` if None.

    Everything but q, k and v is contiguous; these have contiguous channels and any row stride.
    """
    B, D = q.shape
    n_taps, modes = taps.shape[1], a.shape[1]
    size = size or SIZES[rows_class(B)]
    if size.lean:
        from h3lm.flashconv.kernels import step_gluon

        if step_gluon.takes(head_dim, D, modes, n_taps, size.warps):
            return step_gluon.step(
                q, k, v, taps, a, b, c, skip, ring, position, diagonal,
                min(size.rows, triton.next_power_of_2(B)), size.stages, size.warps, early,
            )  # fmt: skip
        size = StepSize()
    H = D // head_dim
    heads = max(1, size.columns // head_dim)
    rows = min(size.rows, triton.next_power_of_2(B))
    warps = size.warps * max(1, head_dim // size.columns)  # a head is not divided
    groups = min(size.groups, triton.next_power_of_2(triton.cdiv(B, rows)))
    groups = groups if head_dim == 1 else 1
    o = torch.empty((B, D), dtype=q.dtype, device=q.device)
    h3_step_kernel[(triton.cdiv(H, heads), triton.cdiv(B, rows * groups))](
        q, k, v, o, ring, position, diagonal, taps, a, b, c, skip,
        B, H, q.stride(0), k.stride(0), v.stride(0),
        HEAD_DIM=head_dim, N_TAPS=n_taps, MODES=modes, ROWS=rows, HEADS=heads,
        SLOTS=triton.next_power_of_2(n_taps), WIDTH=triton.next_power_of_2(modes),
        GROUPS=groups, STAGES=size.stages, EARLY=early, num_warps=warps, **launch_options(early),
    )  # fmt: skip
    return o
