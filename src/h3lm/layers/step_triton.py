"""What a decoding step of a whole layer needs around its mixer's core, in Triton.

Attention of one new position against slots of keys and values, each row with a length of its own
that is read on the device, so that one captured graph serves every length; products of few rows,
which are a matter of reading weights; and the residual sum with the norm behind it.

All of them may start while the kernel before them still runs (EARLY, see `flashconv.kernels
.overlap`): weights are on their way when the inputs come.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.dispatch import LARGE_SHARED, capability
from h3lm.flashconv.kernels.overlap import fetch, launch_options, wait_for_inputs
from h3lm.flashconv.step import rows_class

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class AttendSize:
    """Sizes of attention; `h3lm.bench.generate_tune` times them.

    Attributes:
        keys: Keys that a program takes at a time.
        stages: How many of these are on their way through shared memory; 1 for registers.
        warps: Warps of a program.
        programs_per_sm: The keys of the batch are spread over about so many.
        first: Whether the next kernel may start before this one waits.
    """

    keys: int = 32
    stages: int = 4
    warps: int = 4
    programs_per_sm: int = 4
    first: bool = False


@dataclass(frozen=True)
class ProductSize:
    """Sizes of a product of few rows; `h3lm.bench.generate_tune` times them.

    Attributes:
        columns: Outputs of a program.
        depth: Inputs that it takes at a time.
        parts: Programs that share the inputs of an output.
        stages: How many tiles of weights are on their way; of several rows alone.
        warps: Warps of a program.
        ahead: Inputs whose weights are on their way to the L2 cache before x is there.
        first: Whether the next kernel may start before this one waits.
        tma: Whether tiles come by TMA (`step_hopper`), the first `stages` of weights before x.
        x_stages: How many tiles of x are on their way then.
    """

    columns: int
    depth: int = 128
    parts: int = 1
    stages: int = 3
    warps: int = 4
    ahead: int = 0
    first: bool = False
    tma: bool = False
    x_stages: int = 0


ATTEND = AttendSize(first=True)
MAX_ROWS = 64  # of products; with more, the libraries' kernels are as good
# By `rows_class`: whether what follows a norm may start before the norm waits
NORM_FIRST = {1: True, 16: False, 64: True}
# By rows at most and kind of product; None for the library's. Chosen by the time of whole steps
# (`h3lm.bench.generate_tune --steps`).
SIZES: dict[tuple[int, str], ProductSize | None] = {
    (1, "up"): ProductSize(columns=4, depth=1024, warps=2, first=True),
    (1, "down"): ProductSize(columns=8, depth=2048, parts=2, warps=8),
    (1, "qkv"): ProductSize(columns=4, depth=1024, warps=2),
    (1, "out"): ProductSize(columns=4, depth=2048),
    (1, "head"): ProductSize(columns=4, depth=1024, warps=2, first=True),
    (16, "up"): ProductSize(columns=64, depth=256, ahead=256),
    (16, "down"): ProductSize(
        columns=128, depth=64, parts=8, stages=8, ahead=256, tma=True, x_stages=8
    ),
    (16, "qkv"): ProductSize(columns=64, stages=6, ahead=256, first=True),
    (16, "out"): ProductSize(columns=64, parts=2, stages=6, ahead=512, tma=True, x_stages=6),
    (16, "head"): ProductSize(columns=64, depth=64, stages=7),
    (64, "up"): ProductSize(columns=64, stages=6, ahead=1024, first=True, tma=True, x_stages=6),
    (64, "down"): ProductSize(columns=64, parts=4, stages=4, ahead=512),
    (64, "qkv"): ProductSize(columns=64, stages=6, ahead=512, first=True, tma=True, x_stages=6),
    (64, "out"): ProductSize(columns=64, parts=2, stages=6, tma=True, x_stages=6),
    (64, "head"): None,
}


def product_kind(rows: int, weight: Tensor, gelu: bool, in_parts: bool) -> tuple[int, str]:
    """The key of `SIZES` for a product; kinds are named after what they are in a block."""
    N, K = weight.shape
    if in_parts:
        kind = "down" if K > N else "out"
    else:
        kind = "up" if gelu else "head" if N >= 8 * K else "qkv"
    return rows_class(rows), kind


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
def take_keys(
    peak,
    total,
    summed,
    k,
    v,
    q,
    here,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add a tile of keys and values [KEYS, WIDTH] to the running softmax of each lane.

    Keys i and i + LANES share a lane, and the threads that hold them: nothing but the product with
    q crosses threads.
    """
    score = tl.sum(k.to(tl.float32) * q[None, :], 1)
    if MASKED:
        score = tl.where(here, score, float("-inf"))
    score = tl.reshape(score, (KEYS // LANES, LANES))
    higher = tl.maximum(peak, tl.max(score, 0))
    shrink = tl.exp2(peak - higher)
    weight = tl.exp2(score - higher[None, :])
    total = total * shrink + tl.sum(weight, 0)
    wide = tl.reshape(v, (KEYS // LANES, LANES, WIDTH)).to(tl.float32)
    summed = summed * shrink[:, None] + tl.sum(wide * weight[:, :, None], 0)
    return higher, total, summed


@triton.jit(do_not_specialize=["first"])
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
    first,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    KEYS: tl.constexpr,
    LANES: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One head of one row against its part of the keys; the first part also stores the new one.

    All but the last of its tiles are whole and loaded without a mask.
    """
    number = tl.program_id(0)
    part = tl.program_id(1)
    row = (number // HEADS).to(tl.int64)
    head = number % HEADS
    seen = tl.load(lengths + row).to(tl.int32)
    feature = tl.arange(0, WIDTH)
    inside = feature < HEAD_DIM
    length = tl.cdiv(tl.cdiv(seen, SPLITS), KEYS) * KEYS
    begin = part * length
    end = tl.minimum(begin + length, seen)
    slots = number.to(tl.int64) * capacity * HEAD_DIM
    k_from, v_from = keys + slots, values + slots
    if EARLY:
        LINE: tl.constexpr = 1024 // keys.dtype.element_ty.primitive_bitwidth
        line = begin * HEAD_DIM + tl.arange(0, AHEAD * WIDTH // LINE) * LINE
        line = tl.minimum(line, tl.maximum(end * HEAD_DIM - 1, 0))
        fetch(k_from + line, EARLY)
        fetch(v_from + line, EARLY)
    wait_for_inputs(first, EARLY)
    base = qkv + row * row_stride + head * HEAD_DIM
    turn = row * rotation_stride
    q = load_rotated(base, cos + turn, sin + turn, HEAD_DIM, WIDTH, HALF).to(tl.float32) * scale

    key = tl.arange(0, KEYS)
    at = key[:, None] * HEAD_DIM + feature[None, :]
    whole = begin + tl.maximum(end - begin, 0) // KEYS * KEYS
    peak = tl.full((LANES,), -1e30, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    summed = tl.zeros((LANES, WIDTH), tl.float32)
    for start in tl.range(begin, whole, KEYS, num_stages=STAGES):
        if WIDTH == HEAD_DIM:
            k = tl.load(k_from + start * HEAD_DIM + at)
            v = tl.load(v_from + start * HEAD_DIM + at)
        else:
            k = tl.load(k_from + start * HEAD_DIM + at, mask=inside[None, :], other=0.0)
            v = tl.load(v_from + start * HEAD_DIM + at, mask=inside[None, :], other=0.0)
        peak, total, summed = take_keys(
            peak, total, summed, k, v, q, True, False, KEYS, LANES, WIDTH
        )
    if whole < end:
        here = whole + key < end
        mask = here[:, None] & inside[None, :]
        k = tl.load(k_from + whole * HEAD_DIM + at, mask=mask, other=0.0)
        v = tl.load(v_from + whole * HEAD_DIM + at, mask=mask, other=0.0)
        peak, total, summed = take_keys(
            peak, total, summed, k, v, q, here, True, KEYS, LANES, WIDTH
        )

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


@triton.jit(do_not_specialize=["first"])
def combine_kernel(
    sums,
    peaks,
    totals,
    o,
    first,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Put the parts of one head of one row together."""
    wait_for_inputs(first, EARLY)
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
    multiprocessors: int,
    early: bool = False,
    size: AttendSize | None = None,
) -> Tensor:
    """Attend from one new position of each row and store its key and value.

    Args:
        qkv: (B, 3 heads head_dim), before rotation.
        keys, values: (B, heads, capacity, head_dim), contiguous; changed in place.
        lengths: Positions seen, (B,), below the capacity.
        rotation: Cosine and sine, (B, 1, 1, half) each, float32.
        multiprocessors: Of the GPU.
        early: Whether to start while the kernel before still runs.
        size: Sizes of the kernel; `ATTEND` if None.

    Returns:
        (B, heads head_dim).
    """
    size = size or ATTEND
    B, heads, capacity, head_dim = keys.shape
    wanted = round(size.programs_per_sm * multiprocessors / (B * heads))
    splits = max(1, min(wanted, capacity // (2 * size.keys)))
    o = torch.empty((B, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    parts = B * heads, splits if splits > 1 else 0
    sums = qkv.new_empty((*parts, head_dim), dtype=torch.float32)
    peaks, totals = (qkv.new_empty(parts, dtype=torch.float32) for _ in range(2))
    cos, sin = (None, None) if rotation is None else (x.flatten(1) for x in rotation)
    width = triton.next_power_of_2(head_dim)
    # keys that a program's threads load at once, 16 bytes each
    lanes = max(1, min(size.keys, size.warps * 512 // keys.itemsize // width))
    attend_step_kernel[(B * heads, splits)](
        qkv, keys, values, lengths,
        qkv if cos is None else cos, qkv if sin is None else sin, o, sums, peaks, totals,
        qkv.stride(0), 0 if cos is None or cos.shape[0] == 1 else cos.stride(0), capacity,
        LOG2_E / head_dim**0.5,
        HEADS=heads, HEAD_DIM=head_dim, WIDTH=width, HALF=0 if cos is None else cos.shape[1],
        KEYS=size.keys, LANES=lanes, AHEAD=64, SPLITS=splits, STAGES=size.stages,
        num_warps=size.warps, **launch_options(early, size.first),
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(B * heads,)](
            sums, peaks, totals, o, HEAD_DIM=head_dim, WIDTH=width, SPLITS=splits,
            PARTS=triton.next_power_of_2(splits), num_warps=4,
            **launch_options(early, size.first),
        )  # fmt: skip
    return o


@triton.jit
def tanh_gelu(x):
    """GELU in its tanh approximation: tanh z = 2 sigmoid(2 z) - 1."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit(do_not_specialize=["ahead", "first"])
def product_kernel(
    x,
    weight,
    bias,
    y,
    M,
    N,
    K,
    depth_of_part,
    ahead,
    first,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Product x weight^T, with bias and GELU if WHOLE; else a part of the sum, in float32.

    The program asks for weights of `ahead` inputs before it waits for x.
    """
    part = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    inside = (column < N)[:, None]
    weight_row = weight + column.to(tl.int64)[:, None] * K
    begin = part * depth_of_part
    end = tl.minimum(begin + depth_of_part, K)
    if EARLY:
        line = tl.arange(0, DEPTH // 64) * 64  # one in each line of 128 bytes
        safe = weight + tl.minimum(column, N - 1).to(tl.int64)[:, None] * K
        for start in range(begin, tl.minimum(begin + ahead, end), DEPTH):
            fetch(safe + tl.minimum(start + line, K - 1)[None, :], EARLY)
        wait_for_inputs(first, EARLY)

    depth = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(begin, end, DEPTH, num_stages=STAGES):
        at = start + depth
        here = (at < end)[None, :]
        values = tl.load(
            x + row[:, None] * K + at[None, :], mask=(row < M)[:, None] & here, other=0.0
        )
        weights = tl.load(weight_row + at[None, :], mask=inside & here, other=0.0)
        total = tl.dot(values, tl.trans(weights), total)
    mask = (row < M)[:, None] & (column < N)[None, :]
    y_at = row.to(tl.int64)[:, None] * N + column[None, :]
    if WHOLE:
        if BIAS:
            total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if GELU:
            total = tanh_gelu(total)
        tl.store(y + y_at, total.to(y.dtype.element_ty), mask=mask)
    else:
        tl.store(y + part.to(tl.int64) * M * N + y_at, total, mask=mask)


@triton.jit(do_not_specialize=["ahead", "first"])
def row_product_kernel(
    x,
    weight,
    bias,
    y,
    N,
    K,
    depth_of_part,
    ahead,
    first,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`product_kernel` for one row, without matrix units: weights go from memory to registers.

    The first of them are in registers before the program waits for x, others in the L2 cache.
    """
    part = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    inside = (column < N)[:, None]
    begin = part * depth_of_part
    end = tl.minimum(begin + depth_of_part, K)
    weight_row = weight + column.to(tl.int64)[:, None] * K
    at = begin + depth
    weights = tl.load(weight_row + at[None, :], mask=inside & (at < end)[None, :], other=0.0)
    if EARLY:
        line = tl.arange(0, DEPTH // 64) * 64
        safe = weight + tl.minimum(column, N - 1).to(tl.int64)[:, None] * K
        for start in range(begin + DEPTH, tl.minimum(begin + ahead, end), DEPTH):
            fetch(safe + tl.minimum(start + line, K - 1)[None, :], EARLY)
        wait_for_inputs(first, EARLY)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(begin, end, DEPTH, num_stages=1):
        at = start + depth
        values = tl.load(x + at, mask=at < end, other=0.0).to(tl.float32)
        if start > begin:
            weights = tl.load(
                weight_row + at[None, :], mask=inside & (at < end)[None, :], other=0.0
            )
        total += tl.sum(weights.to(tl.float32) * values[None, :], 1)
    if WHOLE:
        if BIAS:
            total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
        if GELU:
            total = tanh_gelu(total)
        tl.store(y + column, total.to(y.dtype.element_ty), mask=column < N)
    else:
        tl.store(y + part * N + column, total, mask=column < N)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool,
    in_parts: bool,
    early: bool,
    size: ProductSize,
) -> Tensor:
    """Multiply few rows by weights: x weight^T.

    Args:
        x: (rows, K), contiguous, a half dtype; up to `MAX_ROWS` rows.
        weight: (N, K), contiguous.
        bias: (N,), added where the product is whole.
        gelu: Whether GELU follows.
        in_parts: Whether to leave the last sum to somebody else, with bias.
        early: Whether to start while the kernel before still runs.
        size: Sizes of the kernel; several parts only if `in_parts`.

    Returns:
        (rows, N), or (parts, rows, N) in float32.
    """
    (M, K), N = x.shape, weight.shape[0]
    where = capability(x.device)
    # written for Hopper's products; TMA takes rows of whole 16 bytes
    no_tma = size.tma and (not early or K % 8 or where is None or where[0] != 9)
    if no_tma or (M > 1 and where not in LARGE_SHARED):
        size = ProductSize(64, 128, size.parts)  # 96 KB of shared memory
    depth_of_part = triton.cdiv(triton.cdiv(K, size.parts), size.depth) * size.depth
    parts = triton.cdiv(K, depth_of_part)
    assert in_parts or parts == 1
    shape, dtype = ((parts, M, N), torch.float32) if in_parts else ((M, N), x.dtype)
    y = torch.empty(shape, dtype=dtype, device=x.device)
    columns = triton.cdiv(N, size.columns)
    tensors = x, weight, weight if bias is None else bias, y
    choices = {
        "WHOLE": not in_parts, "BIAS": bias is not None, "GELU": gelu, "ahead": size.ahead,
    }  # fmt: skip
    launch = {"num_warps": size.warps, **launch_options(early, size.first)}
    if size.tma:
        from h3lm.layers import step_hopper

        step_hopper.launch(
            (columns, parts), *tensors, depth_of_part, size.columns, size.depth, size.stages,
            size.x_stages or size.stages, choices, launch,
        )  # fmt: skip
    elif M == 1:
        row_product_kernel[(columns, parts)](
            *tensors, N, K, depth_of_part,
            COLUMNS=size.columns, DEPTH=size.depth, **choices, **launch,
        )  # fmt: skip
    else:
        product_kernel[(columns, parts)](
            *tensors, M, N, K, depth_of_part, ROWS=max(16, triton.next_power_of_2(M)),
            COLUMNS=size.columns, DEPTH=size.depth, STAGES=size.stages, **choices, **launch,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["first"])
def add_norm_kernel(
    r,
    parts,
    bias,
    weight,
    offset,
    summed,
    normed,
    eps,
    M,
    D,
    first,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One row: summed = r + parts + bias, normed = layer_norm(summed)."""
    row = tl.program_id(0).to(tl.int64) * D
    i = tl.arange(0, WIDTH)
    inside = i < D
    gain = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(offset + i, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(first, EARLY)
    total = tl.load(r + row + i, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        at = parts + part * M * D + row + i
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(summed.dtype.element_ty)
    tl.store(summed + row + i, rounded, mask=inside)
    total = rounded.to(tl.float32)
    mean = tl.sum(total, 0) / D
    centred = tl.where(inside, total - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    y = centred * scale * gain + shift
    tl.store(normed + row + i, y.to(normed.dtype.element_ty), mask=inside)


def add_norm(
    r: Tensor,
    parts: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    offset: Tensor,
    eps: float,
    early: bool,
) -> tuple[Tensor, Tensor]:
    """The sum of r (rows, D), parts (n, rows, D) and bias, and its layer norm; all contiguous."""
    rows, D = r.shape
    summed, normed = torch.empty_like(r), torch.empty_like(r)
    width = triton.next_power_of_2(D)
    add_norm_kernel[(rows,)](
        r, r if parts is None else parts, weight if bias is None else bias, weight, offset,
        summed, normed, eps, rows, D,
        PARTS=0 if parts is None else len(parts), BIAS=bias is not None, WIDTH=width,
        num_warps=min(8, max(1, width // 256)),
        **launch_options(early, NORM_FIRST[rows_class(rows)]),
    )  # fmt: skip
    return summed, normed
