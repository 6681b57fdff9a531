"""Which block comes when, each place computed by itself.

A table of the order of a large corpus's blocks would have to be made whole in every process, before
the first is read. Here nothing is kept, and any stretch of a run's order can be asked for: it
depends on the seed alone, not on how many processes read, or from where one goes on.
"""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # halves of few bits need more than the four that suffice for many
WINDOW = 1024  # places in which every source has its share, to one block


class Permutation:
    """A permutation of 0 ... size - 1 that a seed names, in constant memory.

    A Feistel network permutes the numbers of 2h bits, the fewest that hold `size`; a number that
    comes out too large goes through it again, until one is below `size`: at most 4 times on
    average. Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, section 4
    (cycle walking over a generalised Feistel cipher).

    Args:
        size: How many there are, at least 1.
        seed: Numbers that name the permutation.
    """

    def __init__(self, size: int, *seed: int) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        self.size = size
        self._half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.size

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at places, each from 0 to size - 1; any shape."""
        found = self._network(places.astype(np.uint64))
        while (outside := found >= self.size).any():
            found[outside] = self._network(found[outside])
        return found.astype(np.int64)

    def _network(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        mask = (np.uint64(1) << self._half) - np.uint64(1)
        left, right = x >> self._half, x & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << self._half) | right


class Order:
    """The endless order of blocks from one or several sources.

    Without weights all sources are one: a permutation of all blocks after the other. With weights,
    every window of 1024 places holds of each source its share, rounded up or down such that
    in the long run nothing is lost; each source goes through its own permutations, the next when
    one is through.

    Args:
        sizes: Blocks of each source; they are numbered through all sources.
        seed: Names the order.
        weights: Share of each source in what is read, in any unit; None for all blocks alike.

    Raises:
        ValueError: if a size or weight is not positive, or their numbers differ.
    """

    def __init__(
        self, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None
    ) -> None:
        if min(sizes) < 1 or (weights is not None and not min(weights) > 0):
            raise ValueError(f"sizes {sizes} and weights {weights} must be positive")
        if weights is not None and len(weights) != len(sizes):
            raise ValueError(f"{len(weights)} weights for {len(sizes)} sources")
        self.seed = seed
        self.sizes = list(sizes) if weights is not None else [sum(sizes)]
        self._firsts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._edges: NDArray[np.float64] | None = None
        if weights is not None:
            self._edges = np.concatenate([[0.0], np.cumsum(weights) / sum(weights)])
            self._edges[-1] = 1.0
        self._known = 0, np.zeros(len(self.sizes), np.int64)
        self._permutation = functools.lru_cache(2 * len(self.sizes))(self._make_permutation)

    def blocks(self, first: int, stop: int) -> NDArray[np.int64]:
        """Numbers of the blocks at the places from `first` to below `stop`."""
        if self._edges is None:
            return self._of_source(0, np.arange(first, stop))
        windows = range(first // WINDOW, -(-stop // WINDOW))
        found = [self._window(number) for number in windows]
        start = windows.start * WINDOW
        return np.concatenate(found or [np.zeros(0, np.int64)])[first - start : stop - start]

    def _window(self, number: int) -> NDArray[np.int64]:
        before, behind = self._taken_before(number), self._taken_before(number + 1)
        in_turn = [
            self._of_source(source, np.arange(first, stop))
            for source, (first, stop) in enumerate(zip(before, behind, strict=True))
        ]
        mixed = Permutation(WINDOW, self.seed, len(self.sizes), number)
        return np.concatenate(in_turn)[mixed(np.arange(WINDOW))]

    def _taken_before(self, window: int) -> NDArray[np.int64]:
        """Blocks of each source in the windows before one."""
        known, counts = self._known
        if window < known:
            known, counts = 0, np.zeros_like(counts)
        if window > known:
            counts = counts + self._shares(np.arange(known, window)).sum(0)
        self._known = window, counts
        return counts

    def _shares(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Blocks of each source in some windows, (windows, sources): systematic sampling.

        Of the points (i + u) / 1024 a source gets those that lie in its share of [0, 1); u, drawn
        for each window, makes that right on average.
        """
        assert self._edges is not None
        key = np.random.SeedSequence([self.seed, len(self.sizes)]).generate_state(1, np.uint64)
        u = (_mixed(_mixed(windows.astype(np.uint64)) ^ key) >> np.uint64(11)) * 2.0**-53
        points = np.ceil(WINDOW * self._edges - u[:, None]).astype(np.int64)
        return np.diff(points, axis=1)

    def _of_source(self, source: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The blocks that a source gives at its own places."""
        passes, places = np.divmod(numbers, self.sizes[source])
        found = np.empty_like(places)
        for number in np.unique(passes).tolist():
            here = passes == number
            found[here] = self._permutation(source, number)(places[here])
        return found + self._firsts[source]

    def _make_permutation(self, source: int, number: int) -> Permutation:
        return Permutation(self.sizes[source], self.seed, source, number)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit of x: the finaliser of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
