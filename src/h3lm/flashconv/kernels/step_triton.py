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

from h3lm.flashconv.kernels.overlap import launch_options, wait_for_inputs
from h3lm.flashconv.step import rows_class


@dataclass(frozen=True)
class StepSize:
    """Sizes of the kernel; `h3lm.bench.generate_tune` times them.

    Attributes:
        columns: Channels of a program: 256 bytes of state for each row with 32 modes.
        rows: Rows of a program.
        warps: Warps of a program; a single one needs no barrier.
        lean: Whether it is the kernel of `step_gluon`, for the shapes that it takes: `columns` are
            4 for each warp, and a program walks over its rows.
        stages: How many of these are on their way then.
        first: Whether the next kernel may start before this one waits.
    """

    columns: int = 4
    rows: int = 2
    warps: int = 1
    lean: bool = False
    stages: int = 1
    first: bool = False


SIZES = {  # by `rows_class`; the last for more
    1: StepSize(rows=1, lean=True, first=True),
    16: StepSize(columns=16, rows=4, warps=4, lean=True, stages=2, first=True),
    64: StepSize(columns=16, rows=16, warps=4, lean=True, stages=2),
}


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


@triton.jit(do_not_specialize=["first"])
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
    first,
    HEAD_DIM: tl.constexpr,
    N_TAPS: tl.constexpr,
    MODES: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Advance HEADS heads of ROWS rows by a token; SLOTS and WIDTH pad taps and modes.

    EARLY: no kernel of this chain writes anything but q, k and v (see `overlap`).
    """
    COLUMNS: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    head_of_column = tl.program_id(0) * HEADS + column // HEAD_DIM
    channel = tl.program_id(0) * COLUMNS + column
    slot = tl.arange(0, SLOTS)
    pair = tl.arange(0, 2 * WIDTH)
    D = H * HEAD_DIM
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = row < B
    far_row = row.to(tl.int64)  # states pass 2^31 elements
    column_mask = live[:, None] & (head_of_column < H)[None, :]
    head_mask = live[:, None] & (head < H)[None, :]
    slot_mask = head_mask[:, :, None]
    if SLOTS != N_TAPS:
        slot_mask = slot_mask & (slot < N_TAPS)[None, None, :]
    state_mask = column_mask[:, :, None]
    operator_mask = (head_of_column < H)[None, :, None]
    if WIDTH != MODES:
        state_mask = state_mask & (pair < 2 * MODES)[None, None, :]
        operator_mask = operator_mask & (pair < 2 * MODES)[None, None, :]

    write = tl.load(position + row, mask=live, other=0)
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
        if i == 0:
            write = (write % N_TAPS).to(tl.int32)
            age = write[:, None] - slot[None, :]
            age = tl.where(age < 0, age + N_TAPS, age)
            at = head_of_column[None, :, None] * (2 * MODES) + pair[None, None, :]
            a_re, a_im = load_operator(a, at, operator_mask, COLUMNS, WIDTH)
            b_re, b_im = load_operator(b, at, operator_mask, COLUMNS, WIDTH)
            c_re, c_im = load_operator(c, at, operator_mask, COLUMNS, WIDTH)
            direct = tl.load(skip + head_of_column, mask=head_of_column < H, other=0.0)
        weight = tl.load(
            taps + source[None, :, None] * N_TAPS + age[:, None, :], mask=slot_mask, other=0.0
        )
        if i == 0:
            wait_for_inputs(first, EARLY)
            v_at = far_row[:, None] * v_stride + channel[None, :]
            value = tl.load(v + v_at, mask=column_mask, other=0.0).to(tl.float32)
        new = tl.load(k + far_row[:, None] * k_stride + source[None, :], mask=head_mask, other=0.0)
        gate = tl.load(q + far_row[:, None] * q_stride + source[None, :], mask=head_mask, other=0.0)
        # the oldest value makes room for the new one; other threads may or may not see it yet
        here = slot[None, None, :] == write[:, None, None]
        window = tl.where(here, new[:, :, None], window)
        tl.store(ring + ring_at + write[:, None], new, mask=head_mask)
        s = tl.sum(window.to(tl.float32) * weight, 2)

        w = per_column(s, ROWS, HEADS, HEAD_DIM) * value
        re, im = split_pairs(old, ROWS, COLUMNS, WIDTH)
        new_re = a_re * re - a_im * im + b_re * w[:, :, None]
        new_im = a_re * im + a_im * re + b_im * w[:, :, None]
        joined = tl.reshape(tl.join(new_re, new_im), (ROWS, COLUMNS, 2 * WIDTH))
        tl.store(state, joined, mask=state_mask)
        y = 2 * tl.sum(c_re * new_re - c_im * new_im, 2) + direct[None, :] * w
        total += per_column(gate.to(tl.float32), ROWS, HEADS, HEAD_DIM) * y
    o_at = far_row[:, None] * D + channel[None, :]
    tl.store(o + o_at, total.to(o.dtype.element_ty), mask=column_mask)


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
    modes, n_taps = a.shape[1], taps.shape[1]
    size = size or SIZES[rows_class(B)]
    if size.lean:
        from h3lm.flashconv.kernels import step_gluon

        if step_gluon.takes(head_dim, D, modes, n_taps, size.warps):
            return step_gluon.step(
                q, k, v, taps, a, b, c, skip, ring, position, diagonal,
                min(size.rows, triton.next_power_of_2(B)), size.stages, size.warps,
                launch_options(early, size.first),
            )  # fmt: skip
        size = StepSize()
    H = D // head_dim
    heads = max(1, size.columns // head_dim)
    rows = min(size.rows, triton.next_power_of_2(B))
    warps = size.warps * max(1, head_dim // size.columns)  # a head is not divided
    o = torch.empty((B, D), dtype=q.dtype, device=q.device)
    h3_step_kernel[(triton.cdiv(H, heads), triton.cdiv(B, rows))](
        q, k, v, o, ring, position, diagonal, taps, a, b, c, skip,
        B, H, q.stride(0), k.stride(0), v.stride(0),
        HEAD_DIM=head_dim, N_TAPS=n_taps, MODES=modes, ROWS=rows, HEADS=heads,
        SLOTS=triton.next_power_of_2(n_taps), WIDTH=triton.next_power_of_2(modes),
        num_warps=warps, **launch_options(early, size.first),
    )  # fmt: skip
    return o
