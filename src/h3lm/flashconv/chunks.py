"""How positions are cut into chunks: a batch of equal rows, or one row of packed sequences."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]


class Cut(ABC):
    """Positions of (B, D, L) as chunks (D, rows, chunks, T), padded with zeros.

    Attributes:
        rows: Rows that are independent of each other.
        chunks: Chunks of a row.
        sequences: Sequences with a state each; equals `rows` in a batch.
    """

    rows: int
    chunks: int
    sequences: int

    @abstractmethod
    def split(self, x: Tensor) -> Tensor:
        """(B, D, L) -> (D, rows, chunks, T)."""

    @abstractmethod
    def merge(self, y: Tensor) -> Tensor:
        """(D, rows, chunks, T) -> (B, D, L)."""

    @abstractmethod
    def delay(self, x: Tensor, past: Tensor, m: int) -> Tensor:
        """Give each chunk what the chunk m before it has in x (D, rows, chunks, T).

        `past`, (D, sequences, m, T), stands for the m chunks before a sequence.
        """

    @abstractmethod
    def seed(self, start: Pair, into: Pair) -> tuple[Pair, Pair, Tensor | None]:
        """Put the sequences' start states, (H, pairs, sequences, N/2), into a scan.

        Returns:
            The state before the first chunk of each row, what each chunk adds to the state after
            it, and for each chunk 1.0 or, where the next chunk starts a sequence, 0.0 (None if
            no sequence starts inside a row).
        """

    @abstractmethod
    def last(self, x: Tensor) -> Tensor:
        """The last chunk of each sequence: (H, pairs, rows, chunks, n) -> (.., sequences, n)."""

    @abstractmethod
    def last_lengths(self, device: torch.device) -> Tensor:
        """Positions in the last chunk of each sequence, 1 .. T, (sequences,)."""

    @abstractmethod
    def last_inputs(self, k: Tensor, count: int, before: Tensor | None) -> Tensor:
        """The last `count` values of each sequence of k, (sequences, D, count), oldest first.

        `before`, same shape, is what stood in front of the sequences; zero if None.
        """


class DenseCut(Cut):
    """B rows of one length."""

    def __init__(self, batch: int, length: int, T: int) -> None:
        self.rows = self.sequences = batch
        self.chunks = -(-length // T)
        self.length, self.T = length, T

    def split(self, x: Tensor) -> Tensor:
        """Cut, (B, D, L) to (D, rows, chunks, T)."""
        missing = self.chunks * self.T - self.length
        x = x.transpose(0, 1)
        if missing:
            x = F.pad(x, (0, missing))
        return x.unflatten(-1, (self.chunks, self.T))

    def merge(self, y: Tensor) -> Tensor:
        """Put chunks back, (D, rows, chunks, T) to (B, D, L)."""
        return y.flatten(-2)[..., : self.length].transpose(0, 1)

    def delay(self, x: Tensor, past: Tensor, m: int) -> Tensor:
        """Give each chunk what the chunk m before it has."""
        return torch.cat([past, x], 2)[:, :, : self.chunks]

    def seed(self, start: Pair, into: Pair) -> tuple[Pair, Pair, Tensor | None]:
        """Put the sequences' start states into a scan."""
        return start, into, None

    def last(self, x: Tensor) -> Tensor:
        """Take the last chunk of each sequence."""
        return x[..., -1, :]

    def last_lengths(self, device: torch.device) -> Tensor:
        """Count the positions in it."""
        used = self.length - (self.chunks - 1) * self.T
        return torch.full((self.sequences,), used, device=device)

    def last_inputs(self, k: Tensor, count: int, before: Tensor | None) -> Tensor:
        """Take the last values of k of each sequence."""
        if before is None:
            missing = max(0, count - self.length)
            return F.pad(k, (missing, 0))[..., self.length + missing - count :]
        return torch.cat([before.to(k.dtype), k], -1)[..., self.length :]


def last_inputs(k: Tensor, bounds: Tensor, count: int, before: Tensor | None) -> Tensor:
    """The last values of k of each packed sequence, (sequences, D, count), oldest first.

    Args:
        k: (1, D, L).
        bounds: Boundaries of the sequences, int64.
        before: What stood in front of them, (sequences, D, at most count); zero if None.
    """
    sequences = len(bounds) - 1
    if before is None:
        before = k.new_zeros(sequences, k.shape[1], 0)
    before = F.pad(before.to(k.dtype), (count - before.shape[-1], 0))
    both = torch.cat([k[0], before.transpose(0, 1).flatten(1)], 1)
    position = bounds[1:, None] - count + torch.arange(count, device=k.device)
    behind = position - bounds[:-1, None]  # negative: in front of the sequence
    old = k.shape[-1] + torch.arange(sequences, device=k.device)[:, None] * count
    return both[:, torch.where(behind >= 0, position, old + count + behind)].transpose(0, 1)


class PackedCut(Cut):
    """One row of S sequences one after another; each starts at a chunk of its own."""

    def __init__(self, cu_seqlens: Tensor, T: int) -> None:
        bounds = cu_seqlens.to(torch.int64).cpu()
        device, lengths = cu_seqlens.device, bounds.diff()
        per_sequence = -(-lengths // T)
        first = F.pad(per_sequence.cumsum(0), (1, 0))  # [S + 1], in chunks
        self.rows, self.sequences, self.T = 1, len(lengths), T
        self.chunks, self.length = int(first[-1]), int(bounds[-1])
        sequence = torch.repeat_interleave(torch.arange(self.sequences), per_sequence)
        in_sequence = torch.arange(self.chunks) - first[sequence]
        position = torch.arange(self.length)
        owner = torch.repeat_interleave(torch.arange(self.sequences), lengths)
        self._slot = (first[owner] * T + position - bounds[owner]).to(device)  # of a position
        source = torch.full((self.chunks * T,), self.length)
        source[self._slot.cpu()] = position
        self._source = source.to(device)  # position in a slot; `length` where padded
        self._sequence, self._in_sequence = sequence.to(device), in_sequence.to(device)
        self._first, self._last = first[:-1].to(device), (first[1:] - 1).to(device)
        self._last_lengths = (lengths - (per_sequence - 1) * T).to(device)
        self._bounds = cu_seqlens.long()

    def split(self, x: Tensor) -> Tensor:
        """Cut, (B, D, L) to (D, rows, chunks, T)."""
        padded = F.pad(x.transpose(0, 1), (0, 1))
        return padded[..., self._source].unflatten(-1, (self.chunks, self.T))

    def merge(self, y: Tensor) -> Tensor:
        """Put chunks back, (D, rows, chunks, T) to (B, D, L)."""
        return y.flatten(-2)[..., self._slot].transpose(0, 1)

    def delay(self, x: Tensor, past: Tensor, m: int) -> Tensor:
        """Give each chunk what the chunk m before it has."""
        both = torch.cat([x, past.reshape(x.shape[0], 1, -1, x.shape[-1])], 2)
        here = torch.arange(self.chunks, device=x.device) - m
        before = self.chunks + self._sequence * m + self._in_sequence
        return both[:, :, torch.where(self._in_sequence >= m, here, before)]

    def seed(self, start: Pair, into: Pair) -> tuple[Pair, Pair, Tensor | None]:
        """Put the sequences' start states into a scan."""
        keep = torch.ones(self.chunks, device=self._first.device, dtype=into[0].dtype)
        keep = keep.index_fill(0, self._first[1:] - 1, 0.0)  # the chunk before a start
        seeded = [
            (add * keep[:, None]).index_add(-2, self._first[1:] - 1, state[..., None, 1:, :])
            for add, state in zip(into, start, strict=True)
        ]
        first = (start[0][..., :1, :], start[1][..., :1, :])
        return first, (seeded[0], seeded[1]), keep

    def last(self, x: Tensor) -> Tensor:
        """Take the last chunk of each sequence."""
        return x[..., 0, self._last, :]

    def last_lengths(self, device: torch.device) -> Tensor:
        """Count the positions in it."""
        return self._last_lengths

    def last_inputs(self, k: Tensor, count: int, before: Tensor | None) -> Tensor:
        """Take the last values of k of each sequence."""
        return last_inputs(k, self._bounds, count, before)
