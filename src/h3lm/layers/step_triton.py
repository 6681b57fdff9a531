"""What a decoding step of a whole layer needs beside matrix products, in Triton.

Attention of one new position against slots of keys and values, each row with a length of its own
that is read on the device, so that one captured graph serves every length; and the residual sum
with the norm behind it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 32  # keys in flight in a program
PROGRAMS_PER_SM = 8
LOG2_E = 1.4426950408889634


@triton.jit
def load_rotated(
    pointer, cos, sin, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr
):
    """A head [WIDTH] whose first 2 HALF features are rotated, in the input's dtype."""
    feature = tl.arange(0, WIDTH)
    inside = feature < HEAD_DIM
    x = tl.load(pointer + feature, mask=inside, other=0.0)
    if HALF == 0:
        return x
    turned = feature < 2 * HALF
    lower = feature < HALF
    partner = tl.where(lower, feature + HALF, feature - HALF)
    other = tl.load(pointer + partner, mask=turned, other=0.0).to(tl.float32)
    angle = tl.where(lower, feature, feature - HALF)
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    rotated = x.to(tl.float32) * c + tl.where(lower, -other, other) * s
    return tl.where(turned, rotated, x.to(tl.float32)).to(x.dtype)


@triton.jit
def attend_step_kernel(
    qkv,
    keys,
    values,
    lengths,
    cos,
    sin,
    o,
    sums,
    peaks,
    totals,
    row_stride,
    rotation_stride,
    capacity,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One head of one row against its part of the keys; the first part also stores the new one.

    Every lane of KEYS has a running maximum of its own: nothing crosses lanes before the end.
    """
    number = tl.program_id(0)
    part = tl.program_id(1)
    row = (number // HEADS).to(tl.int64)
    head = number % HEADS
    seen = tl.load(lengths + row).to(tl.int32)
    feature = tl.arange(0, WIDTH)
    inside = feature < HEAD_DIM
    base = qkv + row * row_stride + head * HEAD_DIM
    turn = row * rotation_stride
    q = load_rotated(base, cos + turn, sin + turn, HEAD_DIM, WIDTH, HALF).to(tl.float32) * scale

    length = tl.cdiv(tl.cdiv(seen, SPLITS), KEYS) * KEYS
    begin = part * length
    end = tl.minimum(begin + length, seen)
    slots = number.to(tl.int64) * capacity * HEAD_DIM
    lane = tl.arange(0, KEYS)
    peak = tl.full((KEYS,), -1e30, tl.float32)
    total = tl.zeros((KEYS,), tl.float32)
    summed = tl.zeros((KEYS, WIDTH), tl.float32)
    for start in range(begin, end, KEYS):
        key = start + lane
        here = key < end
        at = slots + key.to(tl.int64)[:, None] * HEAD_DIM + feature[None, :]
        mask = here[:, None]
        if WIDTH != HEAD_DIM:
            mask = mask & inside[None, :]
        k = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(here, tl.sum(k * q[None, :], 1), float("-inf"))
        higher = tl.maximum(peak, score)
        shrink = tl.exp2(peak - higher)
        weight = tl.exp2(score - higher)
        total = total * shrink + weight
        summed = summed * shrink[:, None] + weight[:, None] * v
        peak = higher

    top = tl.max(peak, 0)
    if part == 0:
        k_pointer = base + HEADS * HEAD_DIM
        k_new = load_rotated(k_pointer, cos + turn, sin + turn, HEAD_DIM, WIDTH, HALF)
        v_new = tl.load(base + 2 * HEADS * HEAD_DIM + feature, mask=inside, other=0.0)
        place = slots + seen.to(tl.int64) * HEAD_DIM + feature
        tl.store(keys + place, k_new, mask=inside)
        tl.store(values + place, v_new, mask=inside)
        own = tl.sum(q * k_new.to(tl.float32), 0)
        top = tl.maximum(top, own)
        shrink = tl.exp2(peak - top)
        weight = tl.exp2(own - top)
        denominator = tl.sum(total * shrink, 0) + weight
        numerator = tl.sum(summed * shrink[:, None], 0) + weight * v_new.to(tl.float32)
    else:
        shrink = tl.exp2(peak - top)
        denominator = tl.sum(total * shrink, 0)
        numerator = tl.sum(summed * shrink[:, None], 0)
    if SPLITS == 1:
        result = (numerator / denominator).to(o.dtype.element_ty)
        tl.store(o + number.to(tl.int64) * HEAD_DIM + feature, result, mask=inside)
    else:
        index = number.to(tl.int64) * SPLITS + part
        tl.store(sums + index * HEAD_DIM + feature, numerator, mask=inside)
        tl.store(peaks + index, top)
        tl.store(totals + index, denominator)


@triton.jit
def combine_kernel(
    sums,
    peaks,
    totals,
    o,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Put the parts of one head of one row together."""
    number = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    feature = tl.arange(0, WIDTH)
    inside = feature < HEAD_DIM
    index = number * SPLITS + part
    peak = tl.load(peaks + index, mask=part < SPLITS, other=-1e30)
    total = tl.load(totals + index, mask=part < SPLITS, other=0.0)
    mask = (part < SPLITS)[:, None] & inside[None, :]
    summed = tl.load(sums + index[:, None] * HEAD_DIM + feature[None, :], mask=mask, other=0.0)
    shrink = tl.exp2(peak - tl.max(peak, 0))
    result = tl.sum(summed * shrink[:, None], 0) / tl.sum(total * shrink, 0)
    tl.store(o + number * HEAD_DIM + feature, result.to(o.dtype.element_ty), mask=inside)


def attend_step(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    programs: int,
) -> Tensor:
    """Attend from one new position of each row and store its key and value.

    Args:
        qkv: (B, 3 heads head_dim), before rotation.
        keys, values: (B, heads, capacity, head_dim), contiguous; changed in place.
        lengths: Positions seen, (B,), below the capacity.
        rotation: Cosine and sine, (B, 1, 1, half) each, float32.
        programs: How many programs the keys of the batch are spread over, at least.

    Returns:
        (B, heads head_dim).
    """
    B, heads, capacity, head_dim = keys.shape
    splits = min(triton.cdiv(programs, B * heads), triton.cdiv(capacity, 4 * KEYS))
    o = torch.empty((B, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    parts = B * heads, splits if splits > 1 else 0
    sums = qkv.new_empty((*parts, head_dim), dtype=torch.float32)
    peaks, totals = (qkv.new_empty(parts, dtype=torch.float32) for _ in range(2))
    cos, sin = (None, None) if rotation is None else (x.flatten(1) for x in rotation)
    width = triton.next_power_of_2(head_dim)
    attend_step_kernel[(B * heads, splits)](
        qkv, keys, values, lengths,
        qkv if cos is None else cos, qkv if sin is None else sin, o, sums, peaks, totals,
        qkv.stride(0), 0 if cos is None or cos.shape[0] == 1 else cos.stride(0), capacity,
        LOG2_E / head_dim**0.5,
        HEADS=heads, HEAD_DIM=head_dim, WIDTH=width, HALF=0 if cos is None else cos.shape[1],
        KEYS=KEYS, SPLITS=splits, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(B * heads,)](
            sums, peaks, totals, o, HEAD_DIM=head_dim, WIDTH=width, SPLITS=splits,
            PARTS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return o


@triton.jit
def add_norm_kernel(
    r,
    x,
    weight,
    bias,
    shift,
    summed,
    normed,
    eps,
    D,
    SHIFTED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: summed = r + x (+ shift behind the norm), normed = layer_norm(r + x)."""
    row = tl.program_id(0).to(tl.int64) * D
    i = tl.arange(0, WIDTH)
    inside = i < D
    first = tl.load(r + row + i, mask=inside, other=0.0).to(tl.float32)
    total = first + tl.load(x + row + i, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(summed.dtype.element_ty).to(tl.float32)
    mean = tl.sum(rounded, 0) / D
    centred = tl.where(inside, rounded - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    gain = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    y = centred * scale * gain + offset
    tl.store(normed + row + i, y.to(normed.dtype.element_ty), mask=inside)
    if SHIFTED:
        total += tl.load(shift + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(summed + row + i, total.to(summed.dtype.element_ty), mask=inside)


def add_norm(
    r: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum r + x + shift, and the layer norm of r + x, both (rows, D), contiguous."""
    rows, D = r.shape
    summed, normed = torch.empty_like(r), torch.empty_like(r)
    add_norm_kernel[(rows,)](
        r, x, weight, bias, bias if shift is None else shift, summed, normed, eps, D,
        SHIFTED=shift is not None, WIDTH=triton.next_power_of_2(D), num_warps=4,
    )  # fmt: skip
    return summed, normed
