"""What was measured of the ways to run a call, for the choice between them.

`measured.json` holds rows of reports, by generation of GPUs: `python -m h3lm.bench.ways` times them
and takes them in.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("measured.json")
# Blackwell's GPUs for data centres have Hopper's shared memory; nothing was measured on them
LIKE = {10: 9}


class Table:
    """Rows of a report, found by the nearest sizes.

    Args:
        gpu: What was measured.
        rows: Of the report; times stand under "<way> <what>", ms.
        kinds: Columns that must agree.
        sizes: Columns that are numbers.
        ways: What was compared.
        within: Largest ratio of a size to the measured one that an answer is given for.
    """

    def __init__(
        self,
        gpu: str,
        rows: list[dict[str, Any]],
        *,
        kinds: tuple[str, ...],
        sizes: tuple[str, ...],
        ways: tuple[str, ...],
        within: float = math.inf,
    ) -> None:
        self.gpu, self._sizes, self._ways, self._within = gpu, sizes, ways, within
        self._rows: dict[tuple[str, ...], list[tuple[list[int], dict[str, Any]]]] = {}
        for row in rows:
            at = [int(row[size]) for size in sizes]
            self._rows.setdefault(tuple(row[kind] for kind in kinds), []).append((at, row))
        for measured in self._rows.values():
            measured.sort(key=lambda found: found[0])
        self._nearest = lru_cache(4096)(self._find)

    def faster(
        self,
        kinds: tuple[str, ...],
        sizes: tuple[int, ...],
        what: str,
        slower: Mapping[str, float] | None = None,
    ) -> str | None:
        """The way that won; None if nothing like it was measured.

        Args:
            kinds, sizes: Of the call.
            what: Of the times.
            slower: Ways that take so many times as long here as where they were measured.
        """
        row = self._nearest(kinds, sizes)
        if row is None:
            return None
        factors = slower or {}
        return min(self._ways, key=lambda way: float(row[f"{way} {what}"]) * factors.get(way, 1.0))

    def said(self, kinds: tuple[str, ...], sizes: tuple[int, ...], what: str) -> str:
        """The measurement that `faster` goes by, for people."""
        row = self._nearest(kinds, sizes)
        assert row is not None
        times = ", ".join(f"{way} {row[f'{way} {what}']:g}" for way in self._ways)
        at = ", ".join(f"{size} {row[size]}" for size in self._sizes)
        return f"measured {what}, ms: {times} ({at}, {self.gpu})"

    def _find(self, kinds: tuple[str, ...], sizes: tuple[int, ...]) -> dict[str, Any] | None:
        """The row with the smallest product of all sizes' ratios; of two, that of smaller sizes."""
        best, least = None, math.inf
        for at, row in self._rows.get(kinds, ()):
            far = [
                abs(math.log2(max(1, size) / known)) for size, known in zip(sizes, at, strict=True)
            ]
            if sum(far) < least and max(far) <= math.log2(self._within):
                best, least = row, sum(far)
        return best


def _tables(name: str, **columns: Any) -> dict[int, Table]:
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
)
METHODS = _tables(
    "methods",
    kinds=("dtype", "d_state", "states"),
    sizes=("length", "rows"),
    ways=("scan", "fft_chunks"),
    within=4.0,
)
