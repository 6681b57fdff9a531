"""The short filter alone, in plain Triton: s = taps * k for rows, or for packed sequences.

For chunk c of a sequence, with the blocks F_m of the filter's Toeplitz matrix (`ssm.operators`):

    s_c = sum_m F_m k_{c-m};   dk_c = sum_m F_m^T ds_{c+m};   dF_m = sum_c ds_c k_{c-m}^T

A tile is C chunks of T positions, of any rows: nothing is carried from one to another. In packed
rows each sequence is cut into chunks of its own. Sequence n, which begins at b_n, has those from
number b_n // T + n on, of which it may leave one unused: so their number has a bound that does not
depend on where sequences begin, and finding a chunk's sequence takes one table.

Source: Fu et al. 2023 (arXiv 2212.14052v3), section 3.1 and appendix D (shift SSM).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.kernels.launch import CHUNK_LENGTH, multiprocessors, product_precision, strides
from h3lm.flashconv.kernels.overlap import can_overlap, let_next_start
from h3lm.flashconv.kernels.tile import T, add_product

C = tl.constexpr(64)
# of a launch, the best on an H200
FORWARD = {"num_warps": 4, "num_stages": 3}


@dataclass(frozen=True)
class Chunks:
    """The chunks of rows or of packed sequences.

    Attributes:
        count: How many there are, at most.
        per_row: Of a row; 0 where sequences are packed.
        sequence: The sequence of each chunk, int32, if they are packed.
    """

    count: int
    per_row: int
    sequence: Tensor | None

    @classmethod
    def of(cls, rows: int, length: int, bounds: Tensor | None) -> "Chunks":
        """Of rows of one length, or of the sequences that `bounds` cuts a row into."""
        per_row = -(-length // CHUNK_LENGTH)
        if bounds is None:
            return cls(rows * per_row, per_row, None)
        count = length // CHUNK_LENGTH + len(bounds) - 1
        first = bounds[:-1] // CHUNK_LENGTH + torch.arange(len(bounds) - 1, device=bounds.device)
        number = torch.arange(count, device=bounds.device)
        return cls(count, 0, (torch.searchsorted(first, number, right=True) - 1).int())


@triton.jit
def spans_of(number, bounds, sequence, total, count, per_row):
    """Row of a chunk, row of its states, its number there, where that begins, and its length."""
    inside = number < count
    if bounds is None:
        row = tl.where(inside, number // per_row, 0)
        length = tl.where(inside, total, 0)
        return row.to(tl.int64), row.to(tl.int64), number % per_row, number * 0, length
    else:
        owner = tl.load(sequence + number, inside, 0)
        begin = tl.load(bounds + owner)
        length = tl.where(inside, tl.load(bounds + owner + 1) - begin, 0)
        chunk = number - begin // T - owner
        return owner.to(tl.int64) * 0, owner.to(tl.int64), chunk, begin, length


@triton.jit
def load_chunks(base, position, length, EVEN: tl.constexpr):
    """Chunks [C, T] at positions of their sequences; 0 outside of them."""
    if EVEN:
        return tl.load(base + position)
    else:
        return tl.load(base + position, (position >= 0) & (position < length), 0.0)


@triton.jit
def load_toeplitz(F, lag, dtype: tl.constexpr):
    """A Toeplitz block [T, T], or its transpose, from its first and last row: 512 bytes of 16 K."""
    return tl.load(F + tl.where(lag < 0, -lag, T * T - 1 - lag)).to(dtype)


@triton.jit(do_not_specialize=["tiles", "count", "per_row"])
def filter_kernel(
    k, s, F, carry, bounds, sequence, k_row, k_channel, D, total, tiles, count, per_row,
    BLOCKS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """S for some tiles of a channel; `carry` is added to the first chunks of each sequence."""
    let_next_start(EARLY)
    channel = tl.program_id(0) % D
    dtype: tl.constexpr = k.dtype.element_ty
    i = tl.arange(0, T)
    lag = i[None, :] - i[:, None]  # of transposed blocks
    F += channel * (BLOCKS * T * T)
    F0 = load_toeplitz(F, lag, dtype)
    F1 = load_toeplitz(F + T * T, lag, dtype)
    F2 = load_toeplitz(F + 2 * T * T, lag, dtype) if BLOCKS > 2 else F1
    for tile in range(tl.program_id(0) // D * tiles, (tl.program_id(0) // D + 1) * tiles):
        number = tile * C + tl.arange(0, C)
        row, owner, chunk, begin, length = spans_of(number, bounds, sequence, total, count, per_row)
        position = chunk[:, None] * T + i[None, :]
        k_base = (k + row * k_row + channel.to(tl.int64) * k_channel + begin)[:, None]
        k_tile = load_chunks(k_base, position, length[:, None], EVEN)
        y = tl.dot(k_tile, F0, input_precision=PRECISION)
        before = load_chunks(k_base, position - T, length[:, None], False)
        y = add_product(y, before, F1, PRECISION)
        if BLOCKS > 2:
            before = load_chunks(k_base, position - 2 * T, length[:, None], False)
            y = add_product(y, before, F2, PRECISION)
        mask = (position >= 0) & (position < length[:, None])
        if carry is not None:
            carry_at = ((owner * D + channel) * ((BLOCKS - 1) * T))[:, None] + position
            y += tl.load(carry + carry_at, mask & (chunk < BLOCKS - 1)[:, None], 0.0)
        s_at = s + ((row * D + channel) * total + begin)[:, None] + position
        tl.store(s_at, y.to(s.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tiles", "count", "per_row"])
def filter_backward_kernel(
    k, ds, dk, F, dF, dcarry, bounds, sequence, k_row, k_channel, D, total, tiles, count, per_row,
    BLOCKS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of k and the carry, and each program's sum of that of F."""
    program = tl.program_id(0)
    channel = program % D
    i = tl.arange(0, T)
    square = i[:, None] * T + i[None, :]
    F_at = F + channel * (BLOCKS * T * T) + square
    sum_0 = tl.zeros([T, T], tl.float32)
    sum_1 = sum_0
    sum_2 = sum_0
    for tile in range(program // D * tiles, (program // D + 1) * tiles):
        number = tile * C + tl.arange(0, C)
        row, owner, chunk, begin, length = spans_of(number, bounds, sequence, total, count, per_row)
        position = chunk[:, None] * T + i[None, :]
        inside = length[:, None]
        mask = (position >= 0) & (position < inside)
        k_base = (k + row * k_row + channel.to(tl.int64) * k_channel + begin)[:, None]
        ds_base = (ds + (row * D + channel) * total + begin)[:, None]
        ds_tile = load_chunks(ds_base, position, inside, EVEN)
        turned = tl.trans(ds_tile)
        d_k = tl.dot(ds_tile, tl.load(F_at), input_precision=PRECISION)
        k_tile = load_chunks(k_base, position, inside, EVEN)
        sum_0 = add_product(sum_0, turned, k_tile, PRECISION)
        for m in tl.static_range(1, BLOCKS):
            after = load_chunks(ds_base, position + m * T, inside, False)
            d_k = add_product(d_k, after, tl.load(F_at + m * T * T), PRECISION)
        before = load_chunks(k_base, position - T, inside, False)
        sum_1 = add_product(sum_1, turned, before, PRECISION)
        if BLOCKS > 2:
            before = load_chunks(k_base, position - 2 * T, inside, False)
            sum_2 = add_product(sum_2, turned, before, PRECISION)
        dk_at = dk + ((row * D + channel) * total + begin)[:, None] + position
        tl.store(dk_at, d_k.to(dk.dtype.element_ty), mask)
        if dcarry is not None:
            early = (chunk >= 0) & (chunk < BLOCKS - 1) & (number < count)
            carry_at = ((owner * D + channel) * ((BLOCKS - 1) * T))[:, None] + position
            tl.store(dcarry + carry_at, ds_tile.to(tl.float32), early[:, None])
    dF_at = dF + program.to(tl.int64) * (BLOCKS * T * T) + square
    tl.store(dF_at, sum_0)
    tl.store(dF_at + T * T, sum_1)
    if BLOCKS > 2:
        tl.store(dF_at + 2 * T * T, sum_2)


def _tiles(chunks: Chunks, channels: int, slots: int) -> tuple[int, int]:
    """Tiles of a program and programs of a channel: long walks, but enough of them."""
    tiles = -(-chunks.count // C.value)
    each = -(-tiles // min(tiles, -(-slots // channels)))
    return each, -(-tiles // each)


def _is_even(chunks: Chunks, length: int, each: int, programs: int) -> bool:
    """Whether every tile of every program is full."""
    whole = length % CHUNK_LENGTH == 0 and chunks.sequence is None
    return whole and each * programs * C.value == chunks.count


def forward(
    k: Tensor, filters: Tensor, carry: Tensor | None, bounds: Tensor | None = None
) -> Tensor:
    """S = taps * k, contiguous.

    Args:
        k: (B, D, L), positions contiguous.
        filters: F, (D, 2 or 3, T, T), Toeplitz matrices; they are rounded to the dtype of k.
        carry: What earlier inputs add to the first chunks, (B or sequences, D, (blocks - 1) T).
        bounds: Where packed sequences begin and end, (sequences + 1,), int32; then B is 1.
    """
    B, D, L = k.shape
    s = k.new_empty(B, D, L)
    chunks = Chunks.of(B, L, bounds)
    each, programs = _tiles(chunks, D, 8 * multiprocessors(k.device))
    filter_kernel[(D * programs,)](
        k, s, filters, carry, bounds, chunks.sequence, *strides(k),
        D, L, each, chunks.count, chunks.per_row,
        BLOCKS=filters.shape[1], EVEN=_is_even(chunks, L, each, programs),
        PRECISION=product_precision(k.dtype), EARLY=can_overlap(k.device), **FORWARD,
    )  # fmt: skip
    return s


def backward(
    ds: Tensor, k: Tensor, filters: Tensor, carry: Tensor | None, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of k, F and the carry (if there is one) from a contiguous ds."""
    B, D, L = k.shape
    dk = k.new_empty(B, D, L)
    chunks = Chunks.of(B, L, bounds)
    each, programs = _tiles(chunks, D, 2 * multiprocessors(k.device))
    dF = k.new_empty(programs, *filters.shape, dtype=torch.float32)
    # a row shorter than what a carry reaches leaves the rest of it without effect
    dcarry = None if carry is None else torch.zeros_like(carry)
    filter_backward_kernel[(D * programs,)](
        k, ds, dk, filters.to(k.dtype), dF, dcarry, bounds, chunks.sequence, *strides(k),
        D, L, each, chunks.count, chunks.per_row,
        BLOCKS=filters.shape[1], EVEN=_is_even(chunks, L, each, programs),
        PRECISION=product_precision(k.dtype), num_warps=4, num_stages=1,
    )  # fmt: skip
    return dk, dF[0] if programs == 1 else dF.sum(0), dcarry
