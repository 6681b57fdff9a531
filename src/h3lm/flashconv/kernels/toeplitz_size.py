"""How the products with blocks of a Toeplitz matrix are cut, see `toeplitz_triton`."""

from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Tile:
    """How the kernels are launched.

    Attributes:
        T: Outputs of a piece.
        K: Inputs of a block, a power of two from 16 on.
        pieces: Most pieces of a tile.
        warps: Warps of a program.
        stages: Blocks in flight.
        filter_pieces: Pieces of a tile where the filter's gradient is made.
        resident: Whether the blocks of rows of two chunks fit beside them, see `toeplitz_rows`.
    """

    T: int = 128
    K: int = 64
    pieces: int = 128
    warps: int = 8
    stages: int = 3
    filter_pieces: int = 32
    resident: bool = True


# with Hopper's shared memory, and with the 99 KB that every GPU from 8.0 on has; see docs/log.md
LARGE, SMALL = Tile(), Tile(stages=2, resident=False)


@dataclass(frozen=True)
class ToeplitzSize:
    """What a filter reaches, lags -ahead .. behind, and how its products are cut.

    Attributes:
        behind: The largest lag.
        ahead: The largest lag of the reverse filter, 0 without one.
        tile: How the kernels are launched.
    """

    behind: int
    ahead: int = 0
    tile: Tile = LARGE

    def blocks(self, K: int) -> tuple[int, int]:
        """The first and the last m with a lag in m K - (K - 1) .. m K + (T - 1)."""
        return -((self.ahead + self.tile.T - 1) // K), (self.behind + K - 1) // K

    @cached_property
    def origin(self) -> int:
        """Where lag 0 stands in the table's first copy."""
        return self.tile.K * (1 - self.blocks(self.tile.K)[0])

    @cached_property
    def reversed(self) -> "ToeplitzSize":
        """That of the transposed convolution."""
        return ToeplitzSize(self.ahead, self.behind, self.tile)


@lru_cache(1024)
def size_for(taps: int, taps_reverse: int | None, large: bool) -> ToeplitzSize:
    """The size for filters, on a GPU with as much shared memory as Hopper or with less."""
    return ToeplitzSize(taps - 1, (taps_reverse or 1) - 1, LARGE if large else SMALL)
