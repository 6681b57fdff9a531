"""Perplexity by position and by test length, beyond what a model was trained at.

A window of any length starts from an empty state and is read in chunks: each hands its state on to
the next, exactly. Memory is that of a chunk and of the state, which is of constant size for all
but attention layers; those keep keys and values of the window.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from h3lm.errors import UserError
from h3lm.evals.figures import influence, standard_error
from h3lm.evals.kept import KeptArrays, is_known
from h3lm.evals.perplexity import Tokens
from h3lm.evals.scorer import Limits
from h3lm.evals.states import NO_MASK, States, probe

FIRST_BUCKET = 16  # tokens in front; from there on each bucket of positions is twice as long


@dataclass(frozen=True)
class Point:
    """Perplexity of some positions.

    Attributes:
        begin: Tokens of the window in front of the first of them.
        end: One more than in front of the last.
        perplexity: Per token.
        stderr: Its standard error over windows, None for a single one.
        tokens: How many were predicted.
    """

    begin: int
    end: int
    perplexity: float
    stderr: float | None
    tokens: int


@dataclass(frozen=True)
class LengthScores:
    """What a text's tokens cost in windows of several lengths.

    Attributes:
        by_length: For each length, of all positions.
        by_position: Of the longest length, by bucket of positions.
    """

    by_length: list[Point]
    by_position: list[Point]

    def lines(self) -> str:
        """For people."""
        told = ["  test length    perplexity per token"]
        told += [f"{p.end:13,}    {_told(p)}" for p in self.by_length]
        told += [f"  position, of {self.by_length[-1].end:,}"]
        told += [f"{f'{p.begin:,} to {p.end - 1:,}':>20}  {_told(p)}" for p in self.by_position]
        return "\n".join(told)


def score_lengths(
    model: Any,
    tokens: Tokens,
    lengths: Sequence[int],
    *,
    limits: Limits | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    kept: KeptArrays | None = None,
) -> LengthScores:
    """Predict a text in windows of several lengths, none of which overlap.

    Args:
        model: One of ours.
        tokens: The text. What is left behind the last whole window of
            the longest length is left out, for all lengths.
        lengths: Lengths of windows in tokens.
        limits: Memory; what suits the device if None.
        progress: Called with a name of the length, tokens done and their total.
        kept: Where the nats of windows are kept, so that none is read again by a later call; in
            memory if None.

    Raises:
        UserError: if the text is shorter than a length.
    """
    lengths = sorted(set(lengths))
    if lengths[0] < 1:
        raise UserError(f"a test length of {lengths[0]} tokens: give positive ones")
    if len(tokens) - 1 < lengths[-1]:
        raise UserError(
            f"the text has {len(tokens) - 1:,} tokens, fewer than the test length "
            f"{lengths[-1]:,}: give a longer text or shorter --lengths"
        )
    limits = limits or Limits.of(next(model.parameters()).device)
    # the same text at every length
    usable = (len(tokens) - 1) // lengths[-1] * lengths[-1]
    nats = np.zeros(0)
    by_length = []
    for length in lengths:
        shape = usable // length, len(_edges(length)) - 1
        nats = (kept or KeptArrays())(f"length-{length}", shape)
        counts = _windows(model, tokens, length, limits, progress, nats)
        by_length.append(_point(nats.sum(1), counts.sum(1), 0, length))
    edges = _edges(lengths[-1])
    by_position = [
        _point(nats[:, i], counts[:, i], edges[i], edges[i + 1]) for i in range(len(edges) - 1)
    ]
    return LengthScores(by_length, by_position)


def _edges(length: int) -> list[int]:
    """0, 16, 32, 64, ... length."""
    doubled = [FIRST_BUCKET * 2**i for i in range(64) if FIRST_BUCKET * 2**i < length]
    return [0, *doubled, length]


def _point(nats: NDArray[np.float64], tokens: NDArray[np.float64], begin: int, end: int) -> Point:
    error = standard_error(influence("perplexity", nats, tokens))
    mean = float(nats.sum() / tokens.sum())
    return Point(begin, end, math.exp(min(mean, 700.0)), error, int(tokens.sum()))


@torch.no_grad()
def _windows(
    model: Any,
    tokens: Tokens,
    length: int,
    limits: Limits,
    progress: Callable[[str, int, int], None] | None,
    nats: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Fill in what is not known yet of the nats (windows, buckets); returns their tokens."""
    model.eval()
    edges = np.array(_edges(length))
    bucket = np.searchsorted(edges, np.arange(length), side="right") - 1
    count = len(nats)
    chunk = min(length, limits.segment)
    rows = max(1, min(limits.batch_tokens, limits.batch_logits) // chunk)

    def tell(done: int) -> None:
        if progress is not None:
            progress(f"length {length:,}", done, count * length)

    for first in range(0, count, rows):
        some = range(first, min(first + rows, count))
        if is_known(nats[some.start : some.stop]):
            tell(some.stop * length)
            continue
        found = np.zeros((len(some), nats.shape[1]))
        for begin, losses in _chunks(model, tokens, some, length, chunk):
            here = bucket[begin : begin + losses.shape[1]]
            starts = np.flatnonzero(np.diff(here, prepend=-1))
            found[:, here[starts]] += np.add.reduceat(losses, starts, axis=1)
            tell(some.start * length + len(some) * (begin + losses.shape[1]))
        nats[some.start : some.stop] = found
    return np.tile(np.bincount(bucket).astype(float), (count, 1))


def _chunks(model: Any, tokens: Tokens, windows: range, length: int, chunk: int):
    """(begin, nats (rows, tokens)) of each chunk of some windows side by side."""
    shape = probe(model)
    states = States.zeros(shape, len(windows), length if shape.has_attention else 0)
    everything = np.arange(len(windows))
    for begin in range(0, length, chunk):
        size = min(chunk, length - begin)
        starts = [w * length + begin for w in windows]
        ids = np.stack([tokens[s : s + size + 1] for s in starts])
        inputs = torch.from_numpy(ids[:, :-1]).to(shape.device)
        targets = torch.from_numpy(ids[:, 1:]).to(shape.device)
        cache = states.cache(model, in_place=True)
        logits = model(
            input_ids=inputs,
            past_key_values=cache,
            use_cache=True,
            position_ids=torch.arange(begin, begin + size, device=shape.device)[None].expand(
                len(windows), -1
            ),
            attention_mask=NO_MASK,
        ).logits
        states.take(cache, everything, size)
        losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        yield begin, losses.double().cpu().numpy()


def draw(scores: LengthScores, title: str, path: Path) -> None:
    """Two panels: perplexity by position in the longest window, and by test length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    places = [math.sqrt(max(1, p.begin) * p.end) for p in scores.by_position]
    for axes, points, x in (
        (left, scores.by_position, places),
        (right, scores.by_length, [p.end for p in scores.by_length]),
    ):
        axes.errorbar(
            x,
            [p.perplexity for p in points],
            yerr=[2 * (p.stderr or 0.0) for p in points],
            fmt="o-",
            capsize=3,
        )
        axes.set_xscale("log", base=2)
        axes.set_ylabel("perplexity per token ± 2 SE")
    left.set_yscale("log")
    left.set_xlabel(f"position in windows of {scores.by_length[-1].end:,} tokens")
    right.set_xlabel("test length, tokens")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=130)


def _told(point: Point) -> str:
    error = "" if point.stderr is None else f" ± {point.stderr:.4f}"
    return f"{point.perplexity:.4f}{error}  ({point.tokens:,} tokens)"
