"""Labelled examples of a recipe, as torch sees them."""

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, get_args, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from h3lm.data.labelled import Example, Labelled, RowKind
from h3lm.data.order import Order
from h3lm.errors import UserError
from h3lm.models.modeling_classification import LENGTH_UNIT
from h3lm.train.corpus import BlockOrder

LIMITS: dict[str, tuple[int, float]] = {  # from the first to below the second
    "seeds": (1, math.inf),
    "max_length": (1, math.inf),
    "label_smoothing": (0, 1),
    "shift": (0, math.inf),
    "gain_db": (0, math.inf),
    "noise": (0, math.inf),
    "stretch": (0, 1),
}


@dataclass(frozen=True)
class ClassificationSettings:
    """The keys of a recipe's `classification`.

    Attributes:
        seeds: Runs with seeds `seed`, `seed` + 1, ..., reported with their spread.
        max_length: Longer rows are cut there.
        standardise: Whether each channel of a row gets mean 0 and variance 1.
        label_smoothing: Part of a target spread over all classes.
        shift: Signals in training: moved by up to so many positions either way.
        gain_db: Signals in training: louder or softer by up to so much.
        noise: Signals in training: white noise of up to so many standard deviations of the row.
        stretch: Signals in training: played faster or slower by up to this part.
        graphs: Whether a GPU may replay steps as CUDA graphs (`train.graphs`); with one process.
    """

    seeds: int = 1
    max_length: int | None = None
    standardise: bool = False
    label_smoothing: float = 0.0
    shift: int = 0
    gain_db: float = 0.0
    noise: float = 0.0
    stretch: float = 0.0
    graphs: bool = True

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self:
        """Check the keys and values of a recipe.

        Raises:
            UserError: if a key is unknown or a value impossible.
        """
        hints = get_type_hints(cls)
        for name, value in values.items():
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"unknown recipe key classification.{name}{hint}")
            if not _fits(value, hints[name]):
                wanted = {bool: "true or false", float: "a number"}.get(hints[name])
                raise UserError(
                    f"classification.{name}={value!r} must be {wanted or 'a whole number'}"
                )
        settings = cls(**values)
        for name, (low, high) in LIMITS.items():
            value = getattr(settings, name)
            if value is not None and not low <= value < high:
                allowed = f"at least {low}" if high == math.inf else f"from {low} to below {high}"
                raise UserError(f"classification.{name}={value} must be {allowed}")
        return settings


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML is of a type; whole numbers are numbers, truth values are not."""
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


class ExampleDataset(Dataset[Example]):
    """Examples for a data loader; those for training are varied.

    Item i + n * pass is example i as it is in that pass: the variation depends on the seed, the
    pass and the example alone, so that a resumed run sees what an uninterrupted one would.

    Args:
        labelled: The split.
        settings: What is done to its rows.
        labels: The model's class of each of the data's.
        seed: Of the variation; None for none.
    """

    def __init__(
        self,
        labelled: Labelled,
        settings: ClassificationSettings,
        labels: NDArray[np.int64],
        seed: int | None = None,
    ) -> None:
        self.labelled, self.settings, self.seed = labelled, settings, seed
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, i: int) -> Example:
        number, index = divmod(i, len(self))
        example = self.labelled[index]
        rows = example.rows
        if self.labelled.kind.num_channels is not None:
            rows = tuple(self._signal(row, number, index) for row in rows)
        rows = tuple(row[: self.settings.max_length] for row in rows)
        return Example(rows, int(self.labels[example.label]))

    def _signal(self, row: NDArray, number: int, index: int) -> NDArray:
        if self.seed is not None:
            row = varied(row, self.settings, np.random.default_rng([self.seed, number, index]))
        if self.settings.standardise:
            spread = row.std(0)
            row = (row - row.mean(0)) / np.where(spread > 0, spread, 1)
        return row.astype(np.float32)


def varied(row: NDArray, settings: ClassificationSettings, rng: np.random.Generator) -> NDArray:
    """A signal (L, C), varied as far as the settings allow."""
    s = settings
    if s.stretch:
        n = max(1, round(len(row) * (1 + rng.uniform(-s.stretch, s.stretch))))
        # band-limited: interpolating linearly would dull what training sees and the test does not
        row = np.fft.irfft(np.fft.rfft(row, axis=0), n, axis=0) * (n / len(row))
    if s.shift:
        by = int(rng.integers(-s.shift, s.shift + 1))
        silence = np.zeros((max(by, 0), row.shape[1]), row.dtype)
        row = np.concatenate([silence, row[min(max(-by, 0), len(row) - 1) :]])
    if s.gain_db:
        row = row * 10 ** (rng.uniform(-s.gain_db, s.gain_db) / 20)
    if s.noise:
        row = row + rng.normal(size=row.shape) * rng.uniform(0, s.noise) * row.std()
    return row


class ExampleOrder(BlockOrder):
    """As `BlockOrder`, each number telling its pass too; see `ExampleDataset`.

    Attributes:
        NAME: Of the way in which a seed gives an order, for checkpoints; another one for each.

    Args:
        num_examples: Examples that there are.
        total: Examples that the run takes.
        seed: Names the order.
    """

    NAME = "computed"

    def __init__(self, num_examples: int, total: int, seed: int) -> None:
        super().__init__(Order([num_examples], seed), total)
        self.num_examples = num_examples

    def __iter__(self) -> Iterator[int]:
        for position, index in enumerate(super().__iter__()):
            yield position // self.num_examples * self.num_examples + index


class ExampleCollator:
    """Examples to a batch for `H3ForSequenceClassification`.

    Rows are padded behind, to the longest of the batch; there are lengths if any is.

    Args:
        kind: What the rows are.
        unit: Where rows are of unequal lengths, the batch's is a multiple of this.
    """

    def __init__(self, kind: RowKind, unit: int = LENGTH_UNIT) -> None:
        self.kind, self.unit = kind, unit

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        """`input_ids` or `input_values`, `labels`, and `lengths` where there is padding."""
        rows = [row for example in examples for row in example.rows]
        lengths = np.array([len(row) for row in rows])
        longest = int(lengths.max())
        if lengths.min() < longest:
            longest = -self.unit * (-longest // self.unit)
        shape = (len(rows), longest, *rows[0].shape[1:])
        padded = np.zeros(shape, rows[0].dtype)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        batch = {
            "input_ids" if self.kind.num_channels is None else "input_values": padded,
            "labels": np.array([example.label for example in examples]),
        }
        if lengths.min() < longest:
            batch["lengths"] = lengths
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        if self.kind.rows_per_example > 1:
            pairs = self.kind.rows_per_example
            for name in tensors.keys() - {"labels"}:
                tensors[name] = tensors[name].unflatten(0, (-1, pairs))
        return tensors
