"""Figures of a text from the nats of its parts, with what chance does to them.

A perplexity is no mean over documents but a function of a ratio, all nats over all units. Its
standard error is that of the ratio, by the influence that each part has on it.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Each figure: what all nats are divided by, and whether that ratio is raised or told in bits
UNITS = {
    "perplexity": "tokens",
    "perplexity_per_word": "words",
    "bits_per_byte": "bytes",
    "bits_per_character": "characters",
}


def figure(metric: str, nats: float, units: float) -> float:
    """A figure of `UNITS` from a ratio.

    A perplexity beyond what a float holds is infinite.
    """
    ratio = nats / units
    if metric.startswith("bits"):
        return ratio / math.log(2)
    return math.exp(ratio) if ratio < 700 else math.inf


def influence(metric: str, nats: Floats, units: Floats) -> Floats:
    """How far each part moves a figure, to first order: a figure's error is that of their sum.

    Args:
        metric: One of `UNITS`.
        nats: (parts,) negative log-likelihood of each.
        units: (parts,) what each holds of the figure's unit.

    Returns:
        (parts,), of sum zero. For two models over the same parts, the influences on the difference
        of their figures are the differences of their influences.
    """
    total = units.sum()
    ratio = nats.sum() / total
    slope = 1 / math.log(2) if metric.startswith("bits") else figure(metric, nats.sum(), total)
    return slope * (nats - ratio * units) / total


def standard_error(influences: Floats) -> float | None:
    """Of a figure whose parts have these influences; None for a single part."""
    parts = len(influences)
    if parts < 2:
        return None
    return math.sqrt(parts / (parts - 1) * float(np.square(influences).sum()))


def parts_of(documents: list[Mapping[str, float]], metric: str) -> tuple[Floats, Floats]:
    """Nats and units of documents as a report has them."""
    columns = ([float(d[name]) for d in documents] for name in ("nats", UNITS[metric]))
    nats, units = (np.array(column) for column in columns)
    return nats, units
