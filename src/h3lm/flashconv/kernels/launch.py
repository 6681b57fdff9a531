"""What the launches of all chunk kernels share: operators, walks over a batch, gradients."""

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from h3lm.flashconv.dispatch import SEGMENT_UNIT

CHUNK_LENGTH = 64


class Operators(NamedTuple):
    """Chunk operators as kernels take them: contiguous, real, any floating dtype.

    They are rounded to the dtype of the inputs inside the kernels; their gradients are float32.

    Attributes:
        F: (D, 2 or 3, T, T), or None without a short filter. F_0 is lower triangular, of two
            blocks F_1 is zero on and below the diagonal. Each block is a Toeplitz matrix, of which
            the Hopper kernels read eight rows, the short filter's the first and the last.
        M: (H, T, T), lower triangular, Toeplitz too; H is D, or D / 2, D / 4, D / 8 for heads of
            several channels.
        K: (H, N, T), N a power of two from 16 to 128.
        P: (H, T, N).
        decay: (H, N/2, 2), float32; float64 for float32 inputs, of which its rest is used too.
    """

    F: Tensor | None
    M: Tensor
    K: Tensor
    P: Tensor
    decay: Tensor

    def rounded(self, dtype: torch.dtype) -> "Operators":
        """The matrices in the dtype of the inputs; the decay stays as it is."""
        F = None if self.F is None else self.F.to(dtype)
        return Operators(F, self.M.to(dtype), self.K.to(dtype), self.P.to(dtype), self.decay)


def filter_blocks(operators: Operators) -> int:
    """Blocks of the short filter's operator, 0 without one."""
    return 0 if operators.F is None else operators.F.shape[1]


@dataclass(frozen=True)
class Walk:
    """How programs walk over a batch.

    Attributes:
        rows_per_tile: Rows of the batch that share a tile; over 1 only where one tile holds them.
        rows_per_program: Rows that a program takes, a multiple of `rows_per_tile`.
        tiles: Tiles of a row.
        programs_per_channel: Programs that share the rows of a channel.
    """

    rows_per_tile: int
    rows_per_program: int
    tiles: int
    programs_per_channel: int

    def is_even(self, B: int, L: int, C: int) -> bool:
        """Whether every tile of every program is full."""
        rows = self.rows_per_program * self.programs_per_channel
        return rows == B and L * self.rows_per_tile == self.tiles * C * CHUNK_LENGTH


def plan(B: int, D: int, L: int, C: int, slots: int, packed: bool = False) -> Walk:
    """Give each program as many rows as `slots` concurrent programs allow.

    Long walks are faster: operators are loaded, and their gradients written, once per program.
    Packed sequences have a tile to themselves, and as many as they need: kernels count them.
    """
    tile_length = C * CHUNK_LENGTH
    rows = 1
    while not packed and rows < C // 8 and 2 * rows * L <= tile_length and rows < B:
        rows *= 2
    blocks = -(-B // rows)
    programs = min(blocks, -(-slots // D))
    blocks_per_program = -(-blocks // programs)
    return Walk(
        rows_per_tile=rows,
        rows_per_program=rows * blocks_per_program,
        tiles=-(-L // tile_length),
        programs_per_channel=-(-blocks // blocks_per_program),
    )


def strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of the row and the channel of (B, D, L), whose positions are contiguous."""
    if x is None:
        return 0, 0
    return 0 if x.shape[0] == 1 else x.stride(0), 0 if x.shape[1] == 1 else x.stride(1)


def empty_rows(x: Tensor) -> Tensor:
    """An uninitialised (B, D, L) with channels outermost in memory where those of `x` are.

    So what a projection has made channel first, a product W u^T, goes into the next product, and
    its gradient into the two of the backward pass, without a copy.
    """
    B, D, L = x.shape
    if B > 1 and x.stride(1) > x.stride(0):
        return x.new_empty(D, B, L).transpose(0, 1)
    return x.new_empty(B, D, L)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere (the interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def product_precision(dtype: torch.dtype) -> str:
    """Precision of products: float32 inputs get float32 products, not tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def rows_of_walk(k: Tensor, segments: int, bounds: Tensor | None) -> int:
    """Rows, segments or packed sequences that a kernel walks over."""
    return k.shape[0] * segments if bounds is None else len(bounds) - 1


@dataclass(frozen=True)
class Gradients:
    """Gradients of a backward pass; those of operators with a leading axis of partial sums."""

    q: Tensor | None
    k: Tensor
    v: Tensor | None
    F: Tensor | None
    M: Tensor
    K: Tensor
    P: Tensor
    decay: Tensor
    carry: Tensor | None
    start: Tensor | None

    @classmethod
    def empty(
        cls,
        q: Tensor | None,
        k: Tensor,
        v: Tensor | None,
        operators: Operators,
        carry: Tensor | None,
        start: Tensor | None,
        walk: Walk,
        segments: int = 1,
        into: tuple[Tensor, ...] | None = None,
    ) -> "Gradients":
        """Uninitialised gradients, with the partial sums of a walk.

        Those of q, k and v have strides in common, and lie `into` given tensors if there are any.
        Carry and start are those of segments; a carry is made wherever one segment leans on
        the one before.
        """
        B, D, _ = k.shape
        if into is None:
            into = tuple(empty_rows(k) for x in (q, k, v) if x is not None)
        data = iter(into)

        def partial(x: Tensor) -> Tensor:
            shape = (walk.programs_per_channel, *x.shape)
            return k.new_empty(shape, dtype=torch.float32)

        def like(x: Tensor | None) -> Tensor | None:
            shape = () if x is None else (len(x) * segments, *x.shape[1:])
            return None if x is None else k.new_empty(shape, dtype=torch.float32)

        F, M, K, P, decay = operators
        dcarry = like(carry)
        if segments > 1 and F is not None:
            reach = (filter_blocks(operators) - 1) * CHUNK_LENGTH
            dcarry = k.new_empty(B * segments, D, reach, dtype=torch.float32)
        return cls(
            None if q is None else next(data), next(data), None if v is None else next(data),
            None if F is None else partial(F), partial(M), partial(K), partial(P),
            partial(decay), dcarry, like(start),
        )  # fmt: skip

    def summed(self) -> "Gradients":
        """Add partial sums, in a fixed order."""

        def total(x: Tensor) -> Tensor:
            return x[0] if len(x) == 1 else x.sum(0)

        return replace(
            self, F=None if self.F is None else total(self.F), M=total(self.M), K=total(self.K),
            P=total(self.P), decay=total(self.decay),
        )  # fmt: skip

    def in_order(self) -> tuple[Tensor | None, ...]:
        """All gradients, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))


def tile_chunks(dtype: torch.dtype) -> int:
    """Chunks of a tile: 64, or 32 for float32, whose operands take twice the room.

    For half dtypes 32 gave wrong results with Triton 3.6 on Hopper (docs/benchmarks).
    """
    return 32 if dtype == torch.float32 else 64


def segment_length(total: int, segments: int) -> int:
    """Length of the segments of a row: whole tiles, but for the last segment."""
    return total if segments == 1 else -(-total // (segments * SEGMENT_UNIT)) * SEGMENT_UNIT


def saved_slots(walk: Walk, length: int, C: int, bounds: Tensor | None) -> int:
    """States before tiles that are saved for a row, or for all sequences packed in one."""
    if bounds is None:
        return walk.tiles
    return length // (C * CHUNK_LENGTH) + len(bounds) - 1


def saved_states_shape(
    k: Tensor, heads: int, modes: int, segments: int = 1, bounds: Tensor | None = None
) -> tuple[int, ...]:
    """Shape of the states before tiles; none are saved where one tile holds several rows.

    Heads of several channels save those before segments.
    """
    D, total = k.shape[1:]
    if heads != D:
        pairs = D * (D // heads)
        return (k.shape[0] * segments, pairs, 1, modes, 2) if segments > 1 else (0,)
    B, C = rows_of_walk(k, segments, bounds), tile_chunks(k.dtype)
    walk = plan(B, D, segment_length(total, segments), C, slots=1, packed=bounds is not None)
    if walk.rows_per_tile > 1:
        return (0,)
    return 1 if bounds is not None else B, D, saved_slots(walk, total, C, bounds), modes, 2
