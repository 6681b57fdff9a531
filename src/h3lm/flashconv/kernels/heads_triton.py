# ruff: noqa: SIM102, SIM108  (compile-time branches are kept apart from run-time ones)
"""State passing for heads of several channels, in plain Triton: any GPU from sm_80 on.

Within a head of d channels every pair (i, j) has a state of its own, with the operators of the
head. For chunk c, with s = taps * k from `filter_triton` and operators M, K, P of `ssm.operators`:

    w_ij = s_i v_j;   y_ij = M w_ij + P x_ij;   o_j = sum_i q_i y_ij;   x_ij <- decay x_ij + K w_ij

Here the pairs are the columns of a matrix product, [time or state, 64 pairs]: one head of 8
channels, or heads of 4 or 2 of as many rows of the batch as fill it. The state is an accumulator
that never leaves the registers; the decay multiplies it between two products. States lie in the
order of `tile`.

Backwards there are two sweeps, and no state is kept for them. From left to right, with states made
again, what the read-out needs, dy_ij = q_i do_j being the gradient of y:

    dq_i = sum_j do_j y_ij;   dP = sum dy^T x;   ddecay = sum (P^T dy) conj(x'),
    x' <- decay x' + x    (the derivative of the state by the decay, from zero)

and from right to left, with g the gradient of the state behind the chunk:

    dw_ij = M^T dy_ij + K^T g_ij;   ds_i = sum_j dw_ij v_j;   dv_j = sum_i dw_ij s_i
    dM = sum dy^T w;   dK = sum g^T w;   g <- conj(decay) g + P^T dy

With half inputs, what is made between products is kept in float16, times a power of two that never
grows along a program's walk; s has the dtype of the inputs, but float32 for float16 ones.

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
    splits,
    strides,
)
from h3lm.flashconv.kernels.tile import (
    T,
    change_of,
    exponent_of,
    halves,
    largest_element,
    load_complex,
    mode_of_row,
    multiply,
    part_of_row,
    scale_of,
    span_of,
    turned,
    unit_of_states,
    unscale_of,
    weights_into_states,
    weights_out_of_states,
)

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
def products(
    keys, values, scale, HEAD_DIM: tl.constexpr, dtype: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """[T, pairs], what channels i and j of a head give, from [rows i, T] and [rows j, T].

    Times a scale, as `halves` in a dtype.
    """
    ROWS: tl.constexpr = PAIRS // (HEAD_DIM * HEAD_DIM)
    keys = tl.reshape(keys.to(tl.float32) * scale, [ROWS, HEAD_DIM, 1, T])
    values = tl.reshape(values, [ROWS, 1, HEAD_DIM, T])
    return turned(halves(tl.reshape(keys * values, [PAIRS, T]), dtype, SPLIT))


@triton.jit
def largest_product(keys, values):
    """At most so large are `products`."""
    return largest_element(keys.to(tl.float32)) * largest_element(values.to(tl.float32))


@triton.jit
def bounds_of_chunk(K, P, decay, head, per_unit, N: tl.constexpr):
    """Of the decay of a chunk, and of what K and P^T make of the largest input, per unit."""
    n = tl.arange(0, N // 2)
    into = weights_into_states(K + head * (N * T), n, N) * per_unit
    out = weights_out_of_states(P + head * (N * T), n, N) / per_unit
    re, im = load_complex(decay + head * N, n, None)
    return tl.sqrt(tl.max(re * re + im * im, 0)), tl.max(into, 0) * T, tl.max(out, 0) * T


@triton.jit
def load_halves(
    K, P, head, N: tl.constexpr, INSIDE: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """K and P of a head as `halves`, per unit of states, and that unit and its inverse."""
    K_h, P_h = load_state_operators(K, P, head, N)
    unit = 1.0
    per_unit = 1.0
    if SCALED:
        weights = weights_into_states(K + head * (N * T), tl.arange(0, N // 2), N)
        unit, per_unit = unit_of_states(weights)
    K_h = halves(K_h.to(tl.float32) * per_unit, INSIDE, SPLIT)
    return K_h, halves(P_h.to(tl.float32) * unit, INSIDE, SPLIT), unit, per_unit


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
    REVERSED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs, without `o` only end states: those after the last full chunk of each row.

    Matrices lie [time or state, pair], so that operators are left operands and stay where they
    are, and the sum over i stays within a thread.

    REVERSED: chunks are walked from last to first, to add up what they leave to the left.
    """
    ROWS: tl.constexpr = PAIRS // (HEAD_DIM * HEAD_DIM)
    dtype: tl.constexpr = v.dtype.element_ty
    SCALED: tl.constexpr = dtype != tl.float32
    INSIDE: tl.constexpr = tl.float16 if SCALED else tl.float32
    head = tl.program_id(0) % H
    i = tl.arange(0, T)[None, :]
    member = tl.arange(0, ROWS * HEAD_DIM)
    channel = (head * HEAD_DIM + member % HEAD_DIM).to(tl.int64)
    K_h, P_h, unit, per_unit = load_halves(K, P, head, N, INSIDE, SCALED, SPLIT)
    if o is not None:
        M_h = halves(load_square(M, head), INSIDE, SPLIT)
    decay_re, decay_im = load_decay(decay, head, N)
    left, gain_x, _ = bounds_of_chunk(K, P, decay, head, per_unit, N)
    exponent_x = 0  # of the scales of w and x

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
            x = tl.load(start + state_at, here, 0.0) * per_unit
        else:
            x = tl.zeros([N, PAIRS], tl.float32)
        scale_x = 1.0
        unscale_x = 1.0
        bound_x = 0.0
        if SCALED:
            bound_x = largest_element(x)
            exponent_x = exponent_of(bound_x)
            x *= scale_of(exponent_x)
        for c in tl.range(0, last, num_stages=STAGES):
            if REVERSED:
                position = (chunks - 1 - c)[:, None] * T + i
            else:
                position = c * T + i
            mask = where_inside(position, inside, WHOLE)
            s_tile = tl.load(s_base + position, mask, 0.0)
            v_tile = tl.load(v_base + position, mask, 0.0)
            if SCALED:
                largest_w = largest_product(s_tile, v_tile)
                before = exponent_x
                exponent_x = tl.maximum(before, exponent_of(tl.maximum(bound_x, largest_w)))
                bound_x = left * bound_x + gain_x * largest_w
                x *= change_of(before, exponent_x)
                scale_x = scale_of(exponent_x)
                unscale_x = unscale_of(exponent_x)
            w = products(s_tile, v_tile, scale_x, HEAD_DIM, INSIDE, False)
            if o is not None:
                y = multiply(M_h, w, tl.zeros([T, PAIRS], tl.float32), PRECISION)
                y = multiply(P_h, halves(x, INSIDE, False), y, PRECISION)
                q_tile = tl.load(q_base + position, mask, 0.0).to(tl.float32) * unscale_x
                tl.store(o_base + position, sum_over_keys(y, q_tile, HEAD_DIM).to(dtype), mask)
            after = times(x, decay_re, decay_im, N)
            after = multiply(K_h, w, after, PRECISION)
            if WHOLE:
                x = after
            else:
                x = tl.where((c < covered)[None, :], after, x)
        if end is not None:
            tl.store(end + state_at, x * (unscale_x * unit), here)


@triton.jit(do_not_specialize=["B", "H", "groups", "segments"])
def left_to_right_kernel(
    q, s, v, do, dq, M, K, P, decay, start, dend, dP, ddecay, bounds, scales,
    q_row, q_channel, s_row, s_channel, v_row, v_channel, do_row, do_channel,
    B, H, L, groups, total, segments,
    N: tl.constexpr, HEAD_DIM: tl.constexpr, WHOLE: tl.constexpr, SEGMENTED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of q, P and the decay; each program writes its own sums of the latter two.

    And into `scales` the number of the scale of w, and how large dy is.
    """
    ROWS: tl.constexpr = PAIRS // (HEAD_DIM * HEAD_DIM)
    dtype: tl.constexpr = v.dtype.element_ty
    SCALED: tl.constexpr = dtype != tl.float32
    INSIDE: tl.constexpr = tl.float16 if SCALED else tl.float32
    program = tl.program_id(0)
    head = program % H
    i = tl.arange(0, T)[None, :]
    member = tl.arange(0, ROWS * HEAD_DIM)
    channel = (head * HEAD_DIM + member % HEAD_DIM).to(tl.int64)
    M_h = halves(load_square(M, head), INSIDE, SPLIT)
    K_h, P_h, unit, per_unit = load_halves(K, P, head, N, INSIDE, SCALED, SPLIT)
    decay_re, decay_im = load_decay(decay, head, N)
    left, gain_x, _ = bounds_of_chunk(K, P, decay, head, per_unit, N)
    exponent_x = 0  # of the scales of w and x
    exponent_g = 0  # of that of dy
    largest_dy = 0.0
    sum_P = tl.zeros([T, N], tl.float32)
    sum_re = tl.zeros([N // 16, 8], tl.float32)
    sum_im = tl.zeros([N // 16, 8], tl.float32)

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
            x = tl.load(start + state_at, here, 0.0) * per_unit
        else:
            x = tl.zeros([N, PAIRS], tl.float32)
        tangent = tl.zeros([N, PAIRS], tl.float32)
        scale_x = 1.0
        scale_g = 1.0
        unscale_x = 1.0
        bound_x = 0.0
        if SCALED:  # scales never grow, so that sums shrink where one changes
            bound_x = largest_element(x)
            before = exponent_x
            exponent_x = tl.maximum(before, exponent_of(bound_x))
            x *= scale_of(exponent_x)
            change = change_of(before, exponent_x)
            sum_P *= change
            sum_re *= change
            sum_im *= change
        for c in tl.range(0, last, num_stages=STAGES):
            position = c * T + i
            mask = where_inside(position, inside, WHOLE)
            do_tile = tl.load(do_base + position, mask, 0.0)  # not copied ahead: asked for first
            s_tile = tl.load(s_base + position, mask, 0.0)
            v_tile = tl.load(v_base + position, mask, 0.0)
            q_tile = tl.load(q_base + position, mask, 0.0)
            if SCALED:
                largest_w = largest_product(s_tile, v_tile)
                before = exponent_x
                exponent_x = tl.maximum(before, exponent_of(tl.maximum(bound_x, largest_w)))
                bound_x = left * bound_x + gain_x * largest_w
                change = change_of(before, exponent_x)
                x *= change
                tangent *= change
                before += exponent_g
                largest_dy = tl.maximum(largest_dy, largest_product(q_tile, do_tile))
                exponent_g = tl.maximum(exponent_g, exponent_of(largest_dy))
                change = change_of(before, exponent_x + exponent_g)
                sum_P *= change
                sum_re *= change
                sum_im *= change
                scale_x = scale_of(exponent_x)
                unscale_x = unscale_of(exponent_x)
                scale_g = scale_of(exponent_g)
            w = products(s_tile, v_tile, scale_x, HEAD_DIM, INSIDE, False)
            dy = products(q_tile, do_tile, scale_g, HEAD_DIM, INSIDE, SPLIT)
            half = halves(x, INSIDE, False)
            y = multiply(M_h, w, tl.zeros([T, PAIRS], tl.float32), PRECISION)
            y = multiply(P_h, half, y, PRECISION)
            values = do_tile.to(tl.float32) * unscale_x
            d_q = sum_over_values(y, values, HEAD_DIM).to(dtype)
            tl.store(dq_base + position, d_q, mask)
            sum_P = multiply(dy, turned(half), sum_P, PRECISION)
            p = multiply(turned(P_h), dy, tl.zeros([N, PAIRS], tl.float32), PRECISION)
            p_re, p_im = conjugate_products(p, tangent, N)
            sum_re += p_re
            sum_im += p_im
            next_tangent = times(tangent, decay_re, decay_im, N) + x
            after = times(x, decay_re, decay_im, N)
            after = multiply(K_h, w, after, PRECISION)
            if WHOLE:
                x = after
                tangent = next_tangent
            else:
                x = tl.where((c < covered)[None, :], after, x)
                tangent = tl.where((c < covered)[None, :], next_tangent, tangent)
        if dend is not None:
            behind = tl.load(dend + state_at, here, 0.0) * (scale_g * unit)
            p_re, p_im = conjugate_products(behind, tangent, N)
            sum_re += p_re
            sum_im += p_im
    if SCALED:
        tl.store(scales + 2 * program, exponent_x)
        tl.store(scales + 2 * program + 1, tl.maximum(largest_dy, 0.0).to(tl.int32, bitcast=True))
        sum_P = sum_P * unscale_of(exponent_x) * unscale_of(exponent_g) * unit
        sum_re = sum_re * unscale_of(exponent_x) * unscale_of(exponent_g)
        sum_im = sum_im * unscale_of(exponent_x) * unscale_of(exponent_g)
    n = tl.arange(0, N)
    state = (part_of_row(n) * (N // 2) + mode_of_row(n))[None, :]
    wide = program.to(tl.int64) * N
    tl.store(dP + wide * T + tl.arange(0, T)[:, None] * N + state, sum_P)
    at = ddecay + wide + 2 * tl.arange(0, N // 2)
    tl.store(at, tl.reshape(sum_re, [N // 2]))
    tl.store(at + 1, tl.reshape(sum_im, [N // 2]))


@triton.jit(do_not_specialize=["B", "H", "groups", "segments"])
def right_to_left_kernel(
    q, s, v, do, ds, dv, M, K, P, decay, dend, dstart, dM, dK, bounds, scales,
    q_row, q_channel, s_row, s_channel, v_row, v_channel, do_row, do_channel,
    B, H, L, groups, total, segments,
    N: tl.constexpr, HEAD_DIM: tl.constexpr, WHOLE: tl.constexpr, SEGMENTED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of s, v, M, K and the start; each program writes its own sums of dM and dK."""
    ROWS: tl.constexpr = PAIRS // (HEAD_DIM * HEAD_DIM)
    dtype: tl.constexpr = v.dtype.element_ty
    SCALED: tl.constexpr = dtype != tl.float32
    INSIDE: tl.constexpr = tl.float16 if SCALED else tl.float32
    program = tl.program_id(0)
    head = program % H
    i = tl.arange(0, T)[None, :]
    member = tl.arange(0, ROWS * HEAD_DIM)
    channel = (head * HEAD_DIM + member % HEAD_DIM).to(tl.int64)
    M_h = halves(load_square(M, head), INSIDE, SPLIT)
    K_h, P_h, unit, per_unit = load_halves(K, P, head, N, INSIDE, SCALED, SPLIT)
    decay_re, decay_im = load_decay(decay, head, N)
    left, _, gain_g = bounds_of_chunk(K, P, decay, head, per_unit, N)
    exponent_x = 0  # of the scales of w and x
    exponent_g = 0  # of those of dy and g
    bound_g = 0.0
    if SCALED:
        exponent_x = tl.load(scales + 2 * program)
        largest_dy = tl.load(scales + 2 * program + 1).to(tl.float32, bitcast=True)
        chunks = 1.0 / tl.maximum(1.0 - left, T / (total + T))
        bound_g = largest_dy * tl.maximum(gain_g * chunks, 1.0)
        exponent_g = exponent_of(bound_g)
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
        g = tl.zeros([N, PAIRS], tl.float32)
        if dend is not None:
            g = tl.load(dend + state_at, here & (covered == last), 0.0) * unit
        scale_x = 1.0
        scale_g = 1.0
        unscale_g = 1.0
        if SCALED:
            if dend is not None:
                largest_g = bound_g + largest_element(tl.load(dend + state_at, here, 0.0) * unit)
                before = exponent_g
                exponent_g = tl.maximum(before, exponent_of(largest_g))
                sum_M *= change_of(before, exponent_g)
                sum_K *= change_of(before, exponent_g)
            scale_x = scale_of(exponent_x)
            scale_g = scale_of(exponent_g)
            unscale_g = unscale_of(exponent_g)
            g *= scale_g
        for step in tl.range(0, last, num_stages=STAGES):
            c = last - 1 - step
            position = c * T + i
            mask = where_inside(position, inside, WHOLE)
            do_tile = tl.load(do_base + position, mask, 0.0)  # not copied ahead: asked for first
            s_tile = tl.load(s_base + position, mask, 0.0)
            v_tile = tl.load(v_base + position, mask, 0.0)
            q_tile = tl.load(q_base + position, mask, 0.0)
            w = products(s_tile, v_tile, scale_x, HEAD_DIM, INSIDE, False)
            dy = products(q_tile, do_tile, scale_g, HEAD_DIM, INSIDE, SPLIT)
            half = halves(g, INSIDE, False)
            dw = multiply(turned(M_h), dy, tl.zeros([T, PAIRS], tl.float32), PRECISION)
            dw = multiply(turned(K_h), half, dw, PRECISION)
            sum_M = multiply(dy, turned(w), sum_M, PRECISION)
            sum_K = multiply(half, turned(w), sum_K, PRECISION)
            d_s = sum_over_values(dw, v_tile.to(tl.float32) * unscale_g, HEAD_DIM)
            tl.store((ds + out)[:, None] + position, d_s.to(ds.dtype.element_ty), mask)
            d_v = sum_over_keys(dw, s_tile.to(tl.float32) * unscale_g, HEAD_DIM).to(dtype)
            tl.store((dv + out)[:, None] + position, d_v, mask)
            g = times(g, decay_re, -decay_im, N)
            g = multiply(turned(P_h), dy, g, PRECISION)
            if dend is not None:
                if not WHOLE:
                    g += tl.load(dend + state_at, here & (covered == c), 0.0) * (scale_g * unit)
        if dstart is not None:
            tl.store(dstart + state_at, g * (unscale_g * per_unit), here)
    if SCALED:
        sum_M = sum_M * unscale_of(exponent_x) * unscale_of(exponent_g)
        sum_K = sum_K * unscale_of(exponent_x) * unscale_of(exponent_g) * per_unit
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
    forward_kernel[(H * programs,)](
        q, s, v, o if with_output else None, *operators[1:],
        start, end if with_end else None, bounds,
        *strides(q), *strides(s), *strides(v), B, H, L, groups, total, segments,
        N=N, HEAD_DIM=head_dim, WHOLE=is_whole(L, total, segments, bounds),
        SEGMENTED=segments > 1, REVERSED=leftwards, SPLIT=splits(k, operators),
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
    _, M, K, P, decay = operators

    def partial(x: Tensor) -> Tensor:
        return k.new_empty((programs, *x.shape), dtype=torch.float32)

    dM, dK, dP, ddecay = partial(M), partial(K), partial(P), partial(decay)
    dq, dv = k.new_empty(k.shape), k.new_empty(k.shape)
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    dstart = None if start is None else k.new_empty(
        (B, D * head_dim, N // 2, 2), dtype=torch.float32
    )  # fmt: skip
    sizes = (*strides(q), *strides(s), *strides(v), *strides(do), B, H, L, groups, total, segments)
    options = {
        "N": N, "HEAD_DIM": head_dim, "SEGMENTED": segments > 1, "SPLIT": splits(k, operators),
        "WHOLE": is_whole(L, total, segments, bounds),
        "PRECISION": product_precision(k.dtype), **BACKWARD, **wide_warps(k.dtype),
    }  # fmt: skip
    scales = k.new_empty(H * programs, 2, dtype=torch.int32)
    before = states[:, :, 0].contiguous() if states.numel() else start
    left_to_right_kernel[(H * programs,)](
        q, s, v, do, dq, M, K, P, decay, before, dend, dP, ddecay, bounds, scales, *sizes, **options
    )
    right_to_left_kernel[(H * programs,)](
        q, s, v, do, ds, dv, M, K, P, decay, dend, dstart, dM, dK, bounds, scales, *sizes, **options
    )
    dk, dF, dcarry = ds, None, None
    if operators.F is not None:
        dk, dF, dcarry = filter_triton.backward(ds, k, operators.F, carry, bounds)
    grads = Gradients(dq, dk, dv, None, dM, dK, dP, ddecay, dcarry, dstart)
    return replace(grads.summed(), F=dF)
