"""What the launches of all chunk kernels share: operators, walks over a batch, gradients."""

from dataclasses import dataclass, fields
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
        F: (D, 2 or 3, T, T), or None without a short filter.
        M: (D, T, T).
        K: (D, N, T), N a power of two from 16 to 128.
        P: (D, T, N).
        decay: (D, N/2, 2), float32.
    """

    F: Tensor | None
    M: Tensor
    K: Tensor
    P: Tensor
    decay: Tensor

    def rounded(self, dtype: torch.dtype) -> "Operators":
        """The matrices in the dtype of the inputs; the decay stays float32."""
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


def plan(B: int, D: int, L: int, C: int, slots: int) -> Walk:
    """Give each program as many rows as `slots` concurrent programs allow.

    Long walks are faster: operators are loaded, and their gradients written, once per program.
    """
    tile_length = C * CHUNK_LENGTH
    rows = 1
    while rows < C // 8 and 2 * rows * L <= tile_length and rows < B:
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


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere (the interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def summed_output(o: Tensor, head_dim: int) -> Tensor:
    """Outputs of pairs of channels (i, j), added over i."""
    if head_dim == 1:
        return o
    return o.unflatten(1, (-1, head_dim, head_dim)).sum(2).flatten(1, 2)


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
        head_dim: int,
        segments: int = 1,
    ) -> "Gradients":
        """Uninitialised gradients for each pair of channels, with the partial sums of a walk.

        Carry and start are those of segments; a carry is made wherever one segment leans on
        the one before.
        """
        B, D, L = k.shape
        pairs = D * head_dim

        def data(x: Tensor | None) -> Tensor | None:
            return None if x is None else k.new_empty(B, pairs, L)

        def partial(x: Tensor) -> Tensor:
            shape = (walk.programs_per_channel, pairs, *x.shape[1:])
            return k.new_empty(shape, dtype=torch.float32)

        def like(x: Tensor | None) -> Tensor | None:
            shape = () if x is None else (B * segments, *x.shape[1:])
            return None if x is None else k.new_empty(shape, dtype=torch.float32)

        F, M, K, P, decay = operators
        dcarry = like(carry)
        if segments > 1 and F is not None:
            reach = (filter_blocks(operators) - 1) * CHUNK_LENGTH
            dcarry = k.new_empty(B * segments, pairs, reach, dtype=torch.float32)
        return cls(
            data(q), k.new_empty(B, pairs, L), data(v), None if F is None else partial(F),
            partial(M), partial(K), partial(P), partial(decay), dcarry, like(start),
        )  # fmt: skip

    def summed(self, head_dim: int) -> "Gradients":
        """Add partial sums, and pairs of channels that share a tensor, in a fixed order."""

        def total(x: Tensor, shared: tuple[int, ...]) -> Tensor:
            x = x[0] if len(x) == 1 else x.sum(0)
            if head_dim > 1:
                x = x.unflatten(0, (-1, head_dim, head_dim)).sum(shared)
            return x.flatten(0, 1) if head_dim > 1 and len(shared) == 1 else x

        def over(x: Tensor | None, axis: int) -> Tensor | None:
            if x is None or head_dim == 1:
                return x
            return x.unflatten(1, (-1, head_dim, head_dim)).sum(axis).flatten(1, 2)

        dk = over(self.k, 3)
        assert dk is not None
        return Gradients(
            q=over(self.q, 3),
            k=dk,
            v=over(self.v, 2),
            F=None if self.F is None else total(self.F, (2,)),
            M=total(self.M, (1, 2)),
            K=total(self.K, (1, 2)),
            P=total(self.P, (1, 2)),
            decay=total(self.decay, (1, 2)),
            carry=self.carry,
            start=self.start,
        )

    def in_order(self) -> tuple[Tensor | None, ...]:
        """All gradients, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))


def tile_chunks(dtype: torch.dtype) -> int:
    """Chunks of a tile: 64, or 32 for float32, whose operands take twice the room."""
    return 32 if dtype == torch.float32 else 64


def segment_length(total: int, segments: int) -> int:
    """Length of the segments of a row: whole tiles, but for the last segment."""
    return total if segments == 1 else -(-total // (segments * SEGMENT_UNIT)) * SEGMENT_UNIT


def saved_states_shape(k: Tensor, modes: int, head_dim: int, segments: int = 1) -> tuple[int, ...]:
    """Shape of the states before tiles; none are saved where one tile holds several rows."""
    B, D = k.shape[0] * segments, k.shape[1] * head_dim
    walk = plan(B, D, segment_length(k.shape[2], segments), tile_chunks(k.dtype), slots=1)
    return (B, D, walk.tiles, modes, 2) if walk.rows_per_tile == 1 else (0,)
