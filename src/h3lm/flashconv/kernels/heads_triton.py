# ruff: noqa: SIM102, SIM108  (compile-time branches are kept apart from run-time ones)
"""State passing for heads of several channels, in plain Triton: any GPU from sm_80 on.

Within a head of d channels every pair (i, j) has a state of its own, with the operators of the
head. For chunk c, with s = taps * k from `filter_triton` and operators M, K, P of `ssm.operators`:

    w_ij = s_i v_j;   y_ij = M w_ij + P x_ij;   o_j = sum_i q_i y_ij;   x_ij <- decay x_ij + K w_ij

Here the pairs are the columns of a matrix product, [time or state, 64 pairs]: one head of 8
channels, or heads of 4 or 2 of as many rows of the batch as fill it. The state is an accumulator
that never leaves the registers; the decay multiplies it between two products. It is in the dtype
of the decay, float64 for float32 inputs: every chunk rounds it. States lie in the order of `tile`.

Backwards there are two sweeps, and no state is kept for them. From left to right, with states made
again, what the read-out needs, dy_ij = q_i do_j being the gradient of y:

    dq_i = sum_j do_j y_ij;   dP = sum dy^T x;   ddecay = sum (P^T dy) conj(x'),
    x' <- decay x' + x    (the derivative of the state by the decay, from zero)

and from right to left, with g the gradient of the state behind the chunk:

    dw_ij = M^T dy_ij + K^T g_ij;   ds_i = sum_j dw_ij v_j;   dv_j = sum_i dw_ij s_i
    dM = sum dy^T w;   dK = sum g^T w;   g <- conj(decay) g + P^T dy

Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 1, with heads as in appendix D.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.kernels import filter_triton
from h3lm.flashconv.kernels.chunk_triton import load_square, load_state_operators
from h3lm.flashconv.kernels.launch import (
    Gradients,
    Operators,
    multiprocessors,
    product_precision,
    rows_of_walk,
    saved_states_shape,
    segment_length,
    strides,
)
from h3lm.flashconv.kernels.tile import T, add_product, mode_of_row, part_of_row, span_of

PAIRS = tl.constexpr(64)  # rows of a product
# of a launch, the best on an H200
FORWARD = {"num_warps": 4, "STAGES": 3}
BACKWARD = {"num_warps": 4, "STAGES": 3}


@triton.jit
def spans_of(row, B, L, total, segments, bounds, SEGMENTED: tl.constexpr):
    """`span_of` for a vector of rows: row of the tensors, begin, and length, 0 behind B."""
    source, _, begin, _, length = span_of(row, B, L, total, segments, bounds, SEGMENTED)
    inside = row < B
    source = tl.where(inside, source, 0).to(tl.int64)
    return source, tl.where(inside, begin, 0), tl.where(inside, length, 0)


@triton.jit
def where_inside(position, length, WHOLE: tl.constexpr):
    """Which positions of rows exist. WHOLE: all chunks of a row do; then copies are wide."""
    if WHOLE:
        return length > 0
    else:
        return (position >= 0) & (position < length)


@triton.jit
def products(keys, values, HEAD_DIM: tl.constexpr):
    """[T, pairs], what channels i and j of a head give, from [rows i, T] and [rows j, T]."""
    ROWS: tl.constexpr = PAIRS // (HEAD_DIM * HEAD_DIM)
    keys = tl.reshape(keys, [ROWS, HEAD_DIM, 1, T]).to(tl.float32)
    values = tl.reshape(values, [ROWS, 1, HEAD_DIM, T])
    return tl.trans(tl.reshape((keys * values).to(values.dtype), [PAIRS, T]))


@triton.jit
def sum_over_keys(y, keys, HEAD_DIM: tl.constexpr):
    """The sum over i of y_ij times keys, [T, pairs] and [rows i, T] to [rows j, T].

    The columns of a product that differ in i lie in one thread, or nearly so.
    """
    ROWS: tl.constexpr = PAIRS // (HEAD_DIM * HEAD_DIM)
    keys = tl.reshape(tl.trans(keys), [T, ROWS, HEAD_DIM, 1]).to(tl.float32)
    y = tl.reshape(y, [T, ROWS, HEAD_DIM, HEAD_DIM]) * keys
    return tl.trans(tl.reshape(tl.sum(y, 2), [T, ROWS * HEAD_DIM]))


@triton.jit
def sum_over_values(y, values, HEAD_DIM: tl.constexpr):
    """The sum over j of y_ij times values, [T, pairs] and [rows j, T] to [rows i, T]."""
    ROWS: tl.constexpr = PAIRS // (HEAD_DIM * HEAD_DIM)
    values = tl.reshape(tl.trans(values), [T, ROWS, 1, HEAD_DIM]).to(tl.float32)
    y = tl.reshape(y, [T, ROWS, HEAD_DIM, HEAD_DIM]) * values
    return tl.trans(tl.reshape(tl.sum(y, 3), [T, ROWS * HEAD_DIM]))


@triton.jit
def parts(x, N: tl.constexpr):
    """States [N, pairs] in the order of `tile` as real and imaginary parts [N/16, 8, pairs]."""
    return tl.split(tl.permute(tl.reshape(x, [N // 16, 2, 8, PAIRS]), (0, 2, 3, 1)))


@triton.jit
def times(x, re, im, N: tl.constexpr):
    """States [N, pairs] times a complex number for each mode."""
    x_re, x_im = parts(x, N)
    y = tl.join(re * x_re - im * x_im, re * x_im + im * x_re)
    return tl.reshape(tl.permute(y, (0, 3, 1, 2)), [N, PAIRS])


@triton.jit
def conjugate_products(g, x, N: tl.constexpr):
    """The sum over pairs of g conj(x), real and imaginary, [N/16, 8] each."""
    g_re, g_im = parts(g, N)
    x_re, x_im = parts(x, N)
    return tl.sum(g_re * x_re + g_im * x_im, 2), tl.sum(g_im * x_re - g_re * x_im, 2)


@triton.jit
def state_offsets(first, head, H, B, N: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Offsets of the states of a program's pairs in (B, H pairs, N/2, 2), and which exist."""
    pair = tl.arange(0, PAIRS)
    row = first + pair // (HEAD_DIM * HEAD_DIM)
    at = row.to(tl.int64) * H + head
    at = at * (HEAD_DIM * HEAD_DIM) + pair % (HEAD_DIM * HEAD_DIM)
    n = tl.arange(0, N)
    return at[None, :] * N + (2 * mode_of_row(n) + part_of_row(n))[:, None], (row < B)[None, :]


@triton.jit
def load_decay(decay, head, N: tl.constexpr):
    """Decay of a head, [N/16, 8, 1] each part."""
    at = decay + head * N + 2 * tl.arange(0, N // 2)
    return tl.reshape(tl.load(at), [N // 16, 8, 1]), tl.reshape(tl.load(at + 1), [N // 16, 8, 1])


@triton.jit(do_not_specialize=["B", "H", "groups", "segments"])
def forward_kernel(
    q, s, v, o, M, K, P, decay, start, end, bounds,
    q_row, q_channel, s_row, s_channel, v_row, v_channel,
    B, H, L, groups, total, segments,
    N: tl.constexpr, HEAD_DIM: tl.constexpr, WHOLE: tl.constexpr, SEGMENTED: tl.constexpr,
    REVERSED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs, without `o` only end states: those after the last full chunk of each row.

    Matrices lie [time or state, pair], so that operators are left operands and stay where they
    are, and the sum over i stays within a thread.

    REVERSED: chunks are walked from last to first, to add up what they leave to the left.
    """
    ROWS: tl.constexpr = PAIRS // (HEAD_DIM * HEAD_DIM)
    dtype: tl.constexpr = s.dtype.element_ty
    state_type: tl.constexpr = decay.dtype.element_ty
    head = tl.program_id(0) % H
    i = tl.arange(0, T)[None, :]
    member = tl.arange(0, ROWS * HEAD_DIM)
    channel = (head * HEAD_DIM + member % HEAD_DIM).to(tl.int64)
    K_h, P_h = load_state_operators(K, P, head, N)
    if o is not None:
        M_h = load_square(M, head)
    decay_re, decay_im = load_decay(decay, head, N)

    for group in range(groups):
        first = (tl.program_id(0) // H * groups + group) * ROWS
        source, begin, length = spans_of(
            first + member // HEAD_DIM, B, L, total, segments, bounds, SEGMENTED
        )
        s_base = (s + source * s_row + channel * s_channel + begin)[:, None]
        v_base = (v + source * v_row + channel * v_channel + begin)[:, None]
        if o is not None:
            q_base = (q + source * q_row + channel * q_channel + begin)[:, None]
            o_base = (o + (source * H * HEAD_DIM + channel) * total + begin)[:, None]
        inside = length[:, None]
        chunks = (length + T - 1) // T if REVERSED else length // T  # that an end state covers
        last = (tl.max(length, 0) + T - 1) // T
        if not WHOLE:
            of_pair = first + tl.arange(0, PAIRS) // (HEAD_DIM * HEAD_DIM)
            _, _, pair_length = spans_of(of_pair, B, L, total, segments, bounds, SEGMENTED)
            covered = (pair_length + T - 1) // T if REVERSED else pair_length // T
        state_at, here = state_offsets(first, head, H, B, N, HEAD_DIM)
        if start is not None:
            x = tl.load(start + state_at, here, 0.0).to(state_type)
        else:
            x = tl.zeros([N, PAIRS], state_type)
        for c in tl.range(0, last, num_stages=STAGES):
            if REVERSED:
                position = (chunks - 1 - c)[:, None] * T + i
            else:
                position = c * T + i
            mask = where_inside(position, inside, WHOLE)
            s_tile = tl.load(s_base + position, mask, 0.0)
            v_tile = tl.load(v_base + position, mask, 0.0)
            w = products(s_tile, v_tile, HEAD_DIM)
            if o is not None:
                y = tl.dot(M_h, w, input_precision=PRECISION)
                y = add_product(y, P_h, x.to(dtype), PRECISION)
                q_tile = tl.load(q_base + position, mask, 0.0)
                tl.store(o_base + position, sum_over_keys(y, q_tile, HEAD_DIM).to(dtype), mask)
            after = times(x, decay_re, decay_im, N)
            after = add_product(after, K_h, w, PRECISION)
            if WHOLE:
                x = after
            else:
                x = tl.where((c < covered)[None, :], after, x)
        if end is not None:
            tl.store(end + state_at, x, here)


@triton.jit(do_not_specialize=["B", "H", "groups", "segments"])
def left_to_right_kernel(
    q, s, v, do, dq, M, K, P, decay, start, dend, dP, ddecay, bounds,
    q_row, q_channel, s_row, s_channel, v_row, v_channel, do_row, do_channel,
    B, H, L, groups, total, segments,
    N: tl.constexpr, HEAD_DIM: tl.constexpr, WHOLE: tl.constexpr, SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of q, P and the decay; each program writes its own sums of the latter two."""
    ROWS: tl.constexpr = PAIRS // (HEAD_DIM * HEAD_DIM)
    dtype: tl.constexpr = s.dtype.element_ty
    state_type: tl.constexpr = decay.dtype.element_ty
    program = tl.program_id(0)
    head = program % H
    i = tl.arange(0, T)[None, :]
    member = tl.arange(0, ROWS * HEAD_DIM)
    channel = (head * HEAD_DIM + member % HEAD_DIM).to(tl.int64)
    M_h = load_square(M, head)
    K_h, P_h = load_state_operators(K, P, head, N)
    decay_re, decay_im = load_decay(decay, head, N)
    sum_P = tl.zeros([T, N], tl.float32)
    sum_re = tl.zeros([N // 16, 8], state_type)
    sum_im = tl.zeros([N // 16, 8], state_type)

    for group in range(groups):
        first = (program // H * groups + group) * ROWS
        source, begin, length = spans_of(
            first + member // HEAD_DIM, B, L, total, segments, bounds, SEGMENTED
        )
        s_base = (s + source * s_row + channel * s_channel + begin)[:, None]
        v_base = (v + source * v_row + channel * v_channel + begin)[:, None]
        q_base = (q + source * q_row + channel * q_channel + begin)[:, None]
        do_base = (do + source * do_row + channel * do_channel + begin)[:, None]
        dq_base = (dq + (source * H * HEAD_DIM + channel) * total + begin)[:, None]
        inside = length[:, None]
        last = (tl.max(length, 0) + T - 1) // T
        if not WHOLE:
            of_pair = first + tl.arange(0, PAIRS) // (HEAD_DIM * HEAD_DIM)
            _, _, pair_length = spans_of(of_pair, B, L, total, segments, bounds, SEGMENTED)
            covered = pair_length // T
        state_at, here = state_offsets(first, head, H, B, N, HEAD_DIM)
        if start is not None:
            x = tl.load(start + state_at, here, 0.0).to(state_type)
        else:
            x = tl.zeros([N, PAIRS], state_type)
        tangent = tl.zeros([N, PAIRS], state_type)
        for c in tl.range(0, last, num_stages=STAGES):
            position = c * T + i
            mask = where_inside(position, inside, WHOLE)
            do_tile = tl.load(do_base + position, mask, 0.0)  # not copied ahead: asked for first
            s_tile = tl.load(s_base + position, mask, 0.0)
            v_tile = tl.load(v_base + position, mask, 0.0)
            q_tile = tl.load(q_base + position, mask, 0.0)
            w = products(s_tile, v_tile, HEAD_DIM)
            dy = products(q_tile, do_tile, HEAD_DIM)
            half = x.to(dtype)
            y = tl.dot(M_h, w, input_precision=PRECISION)
            y = add_product(y, P_h, half, PRECISION)
            d_q = sum_over_values(y, do_tile, HEAD_DIM).to(dtype)
            tl.store(dq_base + position, d_q, mask)
            sum_P = add_product(sum_P, dy, tl.trans(half), PRECISION)
            p = tl.dot(tl.trans(P_h), dy, input_precision=PRECISION)
            p_re, p_im = conjugate_products(p, tangent, N)
            sum_re += p_re
            sum_im += p_im
            next_tangent = times(tangent, decay_re, decay_im, N) + x
            after = times(x, decay_re, decay_im, N)
            after = add_product(after, K_h, w, PRECISION)
            if WHOLE:
                x = after
                tangent = next_tangent
            else:
                x = tl.where((c < covered)[None, :], after, x)
                tangent = tl.where((c < covered)[None, :], next_tangent, tangent)
        if dend is not None:
            behind = tl.load(dend + state_at, here, 0.0)
            p_re, p_im = conjugate_products(behind, tangent, N)
            sum_re += p_re
            sum_im += p_im
    n = tl.arange(0, N)
    state = (part_of_row(n) * (N // 2) + mode_of_row(n))[None, :]
    wide = program.to(tl.int64) * N
    tl.store(dP + wide * T + tl.arange(0, T)[:, None] * N + state, sum_P)
    at = ddecay + wide + 2 * tl.arange(0, N // 2)
    tl.store(at, tl.reshape(sum_re, [N // 2]))
    tl.store(at + 1, tl.reshape(sum_im, [N // 2]))


@triton.jit(do_not_specialize=["B", "H", "groups", "segments"])
def right_to_left_kernel(
    q, s, v, do, ds, dv, M, K, P, decay, dend, dstart, dM, dK, bounds,
    q_row, q_channel, s_row, s_channel, v_row, v_channel, do_row, do_channel,
    B, H, L, groups, total, segments,
    N: tl.constexpr, HEAD_DIM: tl.constexpr, WHOLE: tl.constexpr, SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of s, v, M, K and the start; each program writes its own sums of dM and dK."""
    ROWS: tl.constexpr = PAIRS // (HEAD_DIM * HEAD_DIM)
    dtype: tl.constexpr = s.dtype.element_ty
    state_type: tl.constexpr = decay.dtype.element_ty
    program = tl.program_id(0)
    head = program % H
    i = tl.arange(0, T)[None, :]
    member = tl.arange(0, ROWS * HEAD_DIM)
    channel = (head * HEAD_DIM + member % HEAD_DIM).to(tl.int64)
    M_h = load_square(M, head)
    K_h, P_h = load_state_operators(K, P, head, N)
    decay_re, decay_im = load_decay(decay, head, N)
    sum_M = tl.zeros([T, T], tl.float32)
    sum_K = tl.zeros([N, T], tl.float32)

    for group in range(groups):
        first = (program // H * groups + group) * ROWS
        source, begin, length = spans_of(
            first + member // HEAD_DIM, B, L, total, segments, bounds, SEGMENTED
        )
        s_base = (s + source * s_row + channel * s_channel + begin)[:, None]
        v_base = (v + source * v_row + channel * v_channel + begin)[:, None]
        q_base = (q + source * q_row + channel * q_channel + begin)[:, None]
        do_base = (do + source * do_row + channel * do_channel + begin)[:, None]
        out = (source * H * HEAD_DIM + channel) * total + begin
        inside = length[:, None]
        last = (tl.max(length, 0) + T - 1) // T
        state_at, here = state_offsets(first, head, H, B, N, HEAD_DIM)
        of_pair = first + tl.arange(0, PAIRS) // (HEAD_DIM * HEAD_DIM)
        _, _, pair_length = spans_of(of_pair, B, L, total, segments, bounds, SEGMENTED)
        covered = (pair_length // T)[None, :]
        # a row's end state lies behind its last full chunk: there its gradient comes in
        g = tl.zeros([N, PAIRS], state_type)
        if dend is not None:
            g = tl.load(dend + state_at, here & (covered == last), 0.0).to(state_type)
        for step in tl.range(0, last, num_stages=STAGES):
            c = last - 1 - step
            position = c * T + i
            mask = where_inside(position, inside, WHOLE)
            do_tile = tl.load(do_base + position, mask, 0.0)  # not copied ahead: asked for first
            s_tile = tl.load(s_base + position, mask, 0.0)
            v_tile = tl.load(v_base + position, mask, 0.0)
            q_tile = tl.load(q_base + position, mask, 0.0)
            w = products(s_tile, v_tile, HEAD_DIM)
            dy = products(q_tile, do_tile, HEAD_DIM)
            half = g.to(dtype)
            dw = tl.dot(tl.trans(M_h), dy, input_precision=PRECISION)
            dw = add_product(dw, tl.trans(K_h), half, PRECISION)
            sum_M = add_product(sum_M, dy, tl.trans(w), PRECISION)
            sum_K = add_product(sum_K, half, tl.trans(w), PRECISION)
            d_s = sum_over_values(dw, v_tile, HEAD_DIM).to(dtype)
            tl.store((ds + out)[:, None] + position, d_s, mask)
            d_v = sum_over_keys(dw, s_tile, HEAD_DIM).to(dtype)
            tl.store((dv + out)[:, None] + position, d_v, mask)
            g = times(g, decay_re, -decay_im, N)
            g = add_product(g, tl.trans(P_h), dy, PRECISION)
            if dend is not None:
                if not WHOLE:
                    g += tl.load(dend + state_at, here & (covered == c), 0.0)
        if dstart is not None:
            tl.store(dstart + state_at, g, here)
    n = tl.arange(0, N)
    state = (part_of_row(n) * (N // 2) + mode_of_row(n))[:, None]
    t = tl.arange(0, T)
    wide = program.to(tl.int64) * T
    tl.store(dM + wide * T + t[:, None] * T + t[None, :], sum_M)
    tl.store(dK + wide * N + state * T + t[None, :], sum_K)


def wide_warps(dtype: torch.dtype) -> dict[str, int]:
    """Float32 products keep their operands in registers: they need those of twice the threads."""
    return {"num_warps": 8} if dtype == torch.float32 else {}


def is_whole(L: int, total: int, segments: int, bounds: Tensor | None) -> bool:
    """Whether no row, segment or sequence ends within a chunk."""
    return L % T.value == 0 and total == segments * L and bounds is None


def _walk(B: int, H: int, head_dim: int, slots: int) -> tuple[int, int]:
    """Groups of rows of a program, and programs of a head, with equal work if that can be."""
    rows = PAIRS.value // head_dim**2
    groups = -(-B // rows)
    least = -(-groups // min(groups, -(-slots // H)))
    each = next((n for n in range(least, 2 * least) if groups % n == 0), least)
    return each, -(-groups // each)


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
    leftwards: bool = False,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward pass: as `chunk_triton.forward`, with states for pairs of channels.

    Of states, only those before segments are saved.
    """
    D, total = k.shape[1:]
    H, N, _ = operators.K.shape
    head_dim = D // H
    s = k if operators.F is None else filter_triton.forward(k, operators.F, carry, bounds)
    B, L = rows_of_walk(k, segments, bounds), segment_length(total, segments)
    groups, programs = _walk(B, H, head_dim, 8 * multiprocessors(k.device))
    o = k.new_empty(k.shape if with_output else (0,))
    end = k.new_empty((B, D * head_dim, N // 2, 2) if with_end else (0,), dtype=torch.float32)
    _, M, K, P, decay = operators._replace(F=None).rounded(k.dtype)
    forward_kernel[(H * programs,)](
        q, s, v, o if with_output else None, M, K, P, decay,
        start, end if with_end else None, bounds,
        *strides(q), *strides(s), *strides(v), B, H, L, groups, total, segments,
        N=N, HEAD_DIM=head_dim, WHOLE=is_whole(L, total, segments, bounds),
        SEGMENTED=segments > 1, REVERSED=leftwards,
        PRECISION=product_precision(k.dtype), **(FORWARD | wide_warps(k.dtype)),
    )  # fmt: skip
    shape = saved_states_shape(k, H, N // 2, segments) if save_states else (0,)
    states = k.new_empty(shape, dtype=torch.float32)
    if states.numel():
        states = states.zero_() if start is None else states.copy_(start[:, :, None])
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
    bounds: Tensor | None = None,
) -> Gradients:
    """Launch the backward pass, with the states before segments that the forward pass saved."""
    D, total = k.shape[1:]
    H, N, _ = operators.K.shape
    head_dim = D // H
    s = k if operators.F is None else filter_triton.forward(k, operators.F, carry, bounds)
    B, L = rows_of_walk(k, segments, bounds), segment_length(total, segments)
    groups, programs = _walk(B, H, head_dim, 2 * multiprocessors(k.device))
    _, M, K, P, decay = operators._replace(F=None).rounded(k.dtype)

    def partial(x: Tensor) -> Tensor:
        return k.new_empty((programs, *x.shape), dtype=torch.float32)

    dM, dK, dP, ddecay = partial(M), partial(K), partial(P), partial(decay)
    dq, ds, dv = (k.new_empty(k.shape) for _ in range(3))
    dstart = None if start is None else k.new_empty(
        (B, D * head_dim, N // 2, 2), dtype=torch.float32
    )  # fmt: skip
    sizes = (*strides(q), *strides(s), *strides(v), *strides(do), B, H, L, groups, total, segments)
    options = {
        "N": N, "HEAD_DIM": head_dim, "SEGMENTED": segments > 1,
        "WHOLE": is_whole(L, total, segments, bounds),
        "PRECISION": product_precision(k.dtype), **BACKWARD, **wide_warps(k.dtype),
    }  # fmt: skip
    before = states[:, :, 0].contiguous() if states.numel() else start
    left_to_right_kernel[(H * programs,)](
        q, s, v, do, dq, M, K, P, decay, before, dend, dP, ddecay, bounds, *sizes, **options
    )
    right_to_left_kernel[(H * programs,)](
        q, s, v, do, ds, dv, M, K, P, decay, dend, dstart, dM, dK, bounds, *sizes, **options
    )
    dk, dF, dcarry = ds, None, None
    if operators.F is not None:
        dk, dF, dcarry = filter_triton.backward(ds, k, operators.F, carry, bounds)
    grads = Gradients(dq, dk, dv, None, dM, dK, dP, ddecay, dcarry, dstart)
    return replace(grads.summed(), F=dF)
