"""What was measured of the ways to run a call, for the choice between them.

`measured.json` holds rows of reports, by generation of GPUs: `python -m h3lm.bench.ways` times them
and takes them in.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("measured.json")
# Blackwell's GPUs for data centres have Hopper's shared memory; nothing was measured on them
LIKE = {10: 9}

Pieces = tuple[tuple[int | None, Any], ...]


class Table:
    """What won, and what was measured, at the nearest of some sizes.

    Args:
        gpu: What was measured.
        rows: Of a report; times stand under "<way> <what>", ms.
        kinds: Columns that must agree.
        sizes: Columns of which the nearest number is taken, one after the other.
        ways: What was compared.
        whats: What of each, as "forward".
    """

    def __init__(
        self,
        gpu: str,
        rows: list[dict[str, Any]],
        *,
        kinds: tuple[str, ...],
        sizes: tuple[str, ...],
        ways: tuple[str, ...],
        whats: tuple[str, ...],
    ) -> None:
        trees: dict[tuple[str, ...], Any] = {}
        for row in rows:
            branch = trees.setdefault((*(row[kind] for kind in kinds),), {})
            *outer, last = (int(row[size]) for size in sizes)
            for size in outer:
                branch = branch.setdefault(size, {})
            branch[last] = row
        self.gpu, self._sizes, self._ways = gpu, sizes, ways
        levels = len(sizes)
        self._rows = {kind: _pieces(tree, levels, _same) for kind, tree in trees.items()}
        self._winners = {
            (*kind, what): _pieces(tree, levels, partial(_winner, ways, what))
            for kind, tree in trees.items()
            for what in whats
        }

    def faster(self, kinds: tuple[str, ...], sizes: tuple[int, ...], what: str) -> str | None:
        """The way that won; None if no such kinds were measured."""
        branch = self._winners.get((*kinds, what))
        return None if branch is None else _leaf(branch, sizes)

    def said(self, kinds: tuple[str, ...], sizes: tuple[int, ...], what: str) -> str:
        """The measurement that `faster` goes by, for people."""
        row = _leaf(self._rows[kinds], sizes)
        times = ", ".join(f"{way} {row[f'{way} {what}']:g}" for way in self._ways)
        at = ", ".join(f"{size} {row[size]}" for size in self._sizes)
        return f"measured {what}, ms: {times} ({at}, {self.gpu})"


def _same(row: dict[str, Any]) -> dict[str, Any]:
    return row


def _winner(ways: tuple[str, ...], what: str, row: dict[str, Any]) -> str:
    return min(ways, key=lambda way: float(row[f"{way} {what}"]))


def _pieces(branch: dict[Any, Any], levels: int, leaf: Callable[[Any], Any]) -> Pieces:
    """What holds between which sizes: pairs of a bound of size^2 and what holds below it.

    Halfway, by ratio, between two measured sizes; neighbours that agree are one, so that a
    compiler, to which each comparison is a case of its own, sees few.
    """
    inner = leaf if levels == 1 else partial(_pieces, levels=levels - 1, leaf=leaf)
    sizes = sorted(branch)
    found = [inner(branch[size]) for size in sizes]
    pieces = []
    for i, below in enumerate(found):
        if i + 1 == len(found):
            pieces.append((None, below))
        elif found[i + 1] != below:
            pieces.append((sizes[i] * sizes[i + 1], below))
    return tuple(pieces)


def _leaf(branch: Pieces, sizes: tuple[int, ...]) -> Any:
    for size in sizes:
        for bound, below in branch:
            if bound is None or size * size < bound:
                branch = below
                break
    return branch


def _tables(name: str, **columns: tuple[str, ...]) -> dict[int, Table]:
    """Tables by the major number of the compute capability."""
    found = {
        int(major): Table(parts[name]["gpu"], parts[name]["rows"], **columns)
        for major, parts in json.loads(FILE.read_text()).items()
        if name in parts
    }
    return found | {major: found[like] for major, like in LIKE.items() if like in found}


ALGORITHMS = _tables(
    "algorithms",
    kinds=("gated",),
    sizes=("lags", "length", "rows"),
    ways=("blocks", "transforms"),
    whats=("forward", "backward"),
)
METHODS = _tables(
    "methods",
    kinds=("dtype", "d_state", "states"),
    sizes=("length", "rows"),
    ways=("scan", "fft_chunks"),
    whats=("forward", "both"),
)
