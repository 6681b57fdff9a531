"""The synthetic tasks of the H3 paper, and multi-query associative recall.

The first two draw from numpy's `default_rng`, the third from the legacy `RandomState`, in the
order of the published generators: the rows are the same, bit for bit.

Source: Fu et al. 2023 (arXiv 2212.14052v3), Table 1 and its training code; Arora et al. 2023
(Zoology) for the third.
"""

import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from h3lm.errors import UserError

Ids = NDArray[np.int64]

IGNORED = -100
NO_OP, MARKER = ".", "=>"
_SPECIALS = 2


@dataclass(frozen=True)
class Split:
    """Rows of a task.

    Attributes:
        inputs: Token ids, (rows, L).
        targets: Token to predict at each position, (rows, L); `IGNORED` where none is.
        answers: Whether accuracy counts a position, (rows, L), the same number in each row.
    """

    inputs: Ids
    targets: Ids
    answers: NDArray[np.bool_]

    @property
    def sequences(self) -> Ids:
        """The whole rows, inputs and the last target, (rows, L + 1)."""
        return np.concatenate([self.inputs, self.targets[:, -1:]], axis=1)


@dataclass(frozen=True)
class Dataset:
    """The two splits of a task.

    Attributes:
        task: What they were drawn from.
        train: Rows with every target unmasked (the query's only, in multi-query recall).
        test: Rows with the answers' targets only.
    """

    task: "Task"
    train: Split
    test: Split


@dataclass(frozen=True)
class Baseline:
    """What a rule that learns nothing would score.

    Attributes:
        rule: The rule, in words.
        accuracy: Expected share of right answers; ties are broken at random.
        loss: Cross-entropy of its prediction in nats; None where the rule gives no probabilities.
    """

    rule: str
    accuracy: float
    loss: float | None = None


class Task(Hashable, Protocol):
    """What a task offers."""

    name: ClassVar[str]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def length(self) -> int:
        """Length that rows are drawn at unless another is asked for."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Printed form of each id, `vocab_size` of them."""

    def dataset(
        self,
        seed: int = 0,
        *,
        num_train: int = 5000,
        num_test: int = 500,
        test_length: int | None = None,
    ) -> Dataset:
        """Draw both splits; the test rows may have a length of their own."""

    def baselines(self, data: Dataset) -> list[Baseline]:
        """Trivial rules, scored on the test rows of `data`."""


@dataclass(frozen=True)
class InductionHead:
    """Random tokens; after the second marker, repeat what followed the first.

    `vocab_size` counts the no-op and the marker. Rows have `length + 1` inputs (and
    `copy_length - 1` more): `length` tokens, of which one or more are markers, and the last
    marker.

    Attributes:
        vocab_size: Tokens, the two special ones included.
        length: Tokens before the last marker.
        copy_length: Tokens to repeat.
        num_triggers: Most markers before the last one; half of the rows have only one.

    Raises:
        UserError: if the vocabulary or the length is too small.
    """

    name: ClassVar[str] = "induction"
    vocab_size: int = 20
    length: int = 30
    copy_length: int = 1
    num_triggers: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        _check_vocabulary(self.name, self.vocab_size, 4, "two ordinary tokens")
        _check_positive(copy_length=self.copy_length, num_triggers=self.num_triggers)
        self._check_length(self.length)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Printed form of each id."""
        return _vocabulary(self.vocab_size)

    def dataset(
        self,
        seed: int = 0,
        *,
        num_train: int = 5000,
        num_test: int = 500,
        test_length: int | None = None,
    ) -> Dataset:
        """Draw distinct rows, train first."""
        return _next_token_dataset(self, self._draw, seed, num_train, num_test, test_length)

    def baselines(self, data: Dataset) -> list[Baseline]:
        """Guess an ordinary token, the context's most frequent one, training's most frequent."""
        ordinary = self.vocab_size - _SPECIALS
        contexts = [
            [token for token in row if 0 < token < self.vocab_size - 1]
            for row in data.test.inputs.tolist()
            for _ in range(self.copy_length)
        ]
        return [
            Baseline("any ordinary token", 1 / ordinary, float(np.log(ordinary))),
            Baseline("most frequent token of the row", _vote(contexts, _answers(data.test))),
            _majority(data),
        ]

    def _check_length(self, length: int) -> None:
        least = self.copy_length + 2
        if length < least:
            raise UserError(
                f"length {length} cannot hold a marker and the {self.copy_length} token(s) after "
                f"it: {self.name} needs at least {least}"
            )

    def _draw(self, rng: np.random.Generator, length: int) -> tuple[int, ...]:
        marker, m = self.vocab_size - 1, self.copy_length
        ordinary = np.zeros(self.vocab_size)
        ordinary[1:-1] = 1 / (self.vocab_size - _SPECIALS)
        edges = np.cumsum(ordinary)
        row = np.searchsorted(edges / edges[-1], rng.random(length), side="right").tolist()
        row.append(marker)
        # drawn even if there is one trigger anyway: the stream depends on it
        triggers = 1 if rng.random() < 0.5 else self.num_triggers
        places: list[int] = []
        for place in sorted(rng.integers(0, length - (1 + m), size=triggers).tolist()):
            if not places or place - places[-1] > m:
                places.append(place)
        copied = row[places[0] + 1 : places[0] + 1 + m]
        for place in places:
            row[place] = marker
            row[place + 1 : place + 1 + m] = copied
        return tuple(row + copied)


@dataclass(frozen=True)
class AssociativeRecall:
    """Key-value pairs by a map of the row's own, then a key: answer its value.

    Half of the ordinary tokens are keys, half are values; the map is redrawn for each row, so
    that only its own pairs tell the answer. `vocab_size` counts the no-op and the marker.

    Attributes:
        vocab_size: Tokens, the two special ones included.
        length: Tokens of the pairs.
        key_length: Tokens of a key.
        allow_unseen: Whether the query may be a key that the row does not hold; the answer is
            then the no-op.

    Raises:
        UserError: if the vocabulary or the length is too small.
    """

    name: ClassVar[str] = "recall"
    vocab_size: int = 10
    length: int = 20
    key_length: int = 1
    allow_unseen: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        _check_vocabulary(self.name, self.vocab_size, 4, "one key and one value")
        _check_positive(key_length=self.key_length)
        self._check_length(self.length)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Printed form of each id."""
        return _vocabulary(self.vocab_size)

    def dataset(
        self,
        seed: int = 0,
        *,
        num_train: int = 5000,
        num_test: int = 500,
        test_length: int | None = None,
    ) -> Dataset:
        """Draw distinct rows, train first."""
        return _next_token_dataset(self, self._draw, seed, num_train, num_test, test_length)

    def baselines(self, data: Dataset) -> list[Baseline]:
        """Rules that ignore the query: they score far more than one value in `vocab_size`."""
        values = self._keys_and_values()[1]
        answers, by_pair, by_key, last = _answers(data.test), [], [], []
        for row in data.test.inputs.tolist():
            pairs = self._pairs(row)
            by_pair.append([value for _, value in pairs])
            by_key.append(list(dict(pairs).values()))
            last.append([pairs[-1][1]])
        present = [sorted(set(row)) for row in by_pair]
        # an unseen query is answered by no value: the loss of these two is infinite then
        loss = None if self.allow_unseen else float(np.log(len(values)))
        loss_present = None if self.allow_unseen else _uniform_loss(present)
        seen = float(np.mean([answer != 0 for answer in answers]))
        return [
            Baseline("any value", seen / len(values), loss),
            Baseline("any value of the row", _vote(present, answers), loss_present),
            Baseline("most frequent value of the row, by pairs", _vote(by_pair, answers)),
            Baseline("most frequent value of the row, by keys", _vote(by_key, answers)),
            Baseline("last value of the row", _vote(last, answers)),
            _majority(data),
        ]

    def _keys_and_values(self) -> tuple[range, range]:
        half = (self.vocab_size - _SPECIALS) // 2
        return range(1, 1 + half), range(1 + half, self.vocab_size - 1)

    def _pairs(self, row: list[int]) -> list[tuple[tuple[int, ...], int]]:
        m = self.key_length
        ends = range(m, len(row) - (m + 1), m + 1)
        return [(tuple(row[end - m : end]), row[end]) for end in ends]

    def _check_length(self, length: int) -> None:
        if length < self.key_length + 1:
            raise UserError(f"length {length} cannot hold a pair of {self.key_length + 1} tokens")

    def _draw(self, rng: np.random.Generator, length: int) -> tuple[int, ...]:
        letters, values = self._keys_and_values()
        keys = list(itertools.product(letters, repeat=self.key_length))
        value = {key: values[rng.integers(0, len(values))] for key in keys}
        seen: dict[tuple[int, ...], None] = {}  # in the order of first sight
        row: list[int] = []
        for _ in range(length // (self.key_length + 1)):
            key = keys[rng.integers(0, len(keys))]
            row += [*key, value[key]]
            seen[key] = None
        query = keys[rng.integers(0, len(keys))]
        if not self.allow_unseen and query not in seen:
            query = list(seen)[rng.integers(0, len(seen))]
        answer = value[query] if query in seen else 0
        return (*row, self.vocab_size - 1, *query, answer)


@dataclass(frozen=True)
class MultiQueryRecall:
    """Key-value pairs, then each key once more at some distance: answer at the key's position.

    The answer is not written into the row. Keys are the ids 1 .. V//2 - 1, values V//2 .. V - 1,
    the blank is 0; queries sit at even distances from the end of the pairs.
    Source: Arora et al. 2023 (Zoology), its generator; with `filler` the random tokens come from
    the same stream here (there from another one, so that they cannot be repeated).

    Attributes:
        vocab_size: V, greater than `length`.
        length: Tokens of a row, even, at least 4 `num_pairs`.
        num_pairs: Pairs, each asked once.
        power: Exponent of the distances: 0.01 crowds the queries behind the pairs, 1 spreads them
            evenly.
        filler: Whether blanks become random tokens.

    Raises:
        UserError: if there are more keys than the vocabulary holds, or the length cannot hold
            the pairs and queries.
    """

    name: ClassVar[str] = "mqar"
    vocab_size: int = 8192
    length: int = 64
    num_pairs: int = 4
    power: float = 0.01
    filler: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        _check_positive(num_pairs=self.num_pairs)
        most = self.vocab_size // 2 - 1
        if self.num_pairs > most:
            raise UserError(
                f"{self.num_pairs} pairs need as many keys, a vocabulary of {self.vocab_size} has "
                f"{max(most, 0)}: use at least {2 * (self.num_pairs + 1)} tokens"
            )
        self._check_length(self.length)
        if self.power <= 0:
            raise UserError(f"power={self.power} must be positive")

    @property
    def tokens(self) -> tuple[str, ...]:
        """Printed form of each id: k1 .. for keys, v0 .. for values."""
        half = self.vocab_size // 2
        keys = (f"k{i}" for i in range(1, half))
        return (NO_OP, *keys, *(f"v{i}" for i in range(self.vocab_size - half)))

    def rows(self, seed: int, count: int, length: int | None = None) -> Split:
        """Draw `count` rows from a stream of their own."""
        L, K, half = length or self.length, self.num_pairs, self.vocab_size // 2
        rs = np.random.RandomState(seed)
        keys = np.array([rs.choice(np.arange(1, half), K, replace=False) for _ in range(count)])
        values = np.array(
            [rs.choice(np.arange(half, self.vocab_size), K, replace=False) for _ in range(count)]
        )
        gaps = (L - 2 * K) // 2
        weight = self.power * np.arange(1, gaps + 1) ** (self.power - 1)
        weight /= weight.sum()
        slots = np.array(
            [rs.choice(np.arange(gaps), K, replace=False, p=weight) for _ in range(count)]
        )
        inputs = np.zeros((count, L), dtype=np.int64)
        targets = np.full((count, L), IGNORED, dtype=np.int64)
        inputs[:, 0 : 2 * K : 2], inputs[:, 1 : 2 * K : 2] = keys, values
        row = np.arange(count)[:, None]
        inputs[row, 2 * K + 2 * slots] = keys
        targets[row, 2 * K + 2 * slots] = values
        if self.filler:
            inputs = np.where(inputs == 0, rs.randint(0, self.vocab_size, size=(count, L)), inputs)
        return Split(inputs, targets, targets != IGNORED)

    def dataset(
        self,
        seed: int = 0,
        *,
        num_train: int = 5000,
        num_test: int = 500,
        test_length: int | None = None,
    ) -> Dataset:
        """Draw both splits, the test rows from `seed` + 1,000,000."""
        _check_positive(num_train=num_train, num_test=num_test)
        test_length = self.length if test_length is None else test_length
        self._check_length(test_length)
        return Dataset(
            self,
            train=self.rows(seed, num_train),
            test=self.rows(seed + 1_000_000, num_test, test_length),
        )

    def baselines(self, data: Dataset) -> list[Baseline]:
        """Guess a value, a value of the row, training's most frequent answer."""
        values = self.vocab_size - self.vocab_size // 2
        return [
            Baseline("any value", 1 / values, float(np.log(values))),
            Baseline("any value of the row", 1 / self.num_pairs, float(np.log(self.num_pairs))),
            _majority(data),
        ]

    def _check_length(self, length: int) -> None:
        if length % 2 or length < 4 * self.num_pairs:
            raise UserError(
                f"length {length} cannot hold {self.num_pairs} pairs and their queries: it must "
                f"be even and at least {4 * self.num_pairs}"
            )
        _check_vocabulary(self.name, self.vocab_size, length + 1, "more tokens than positions")


TASKS: dict[str, type[InductionHead] | type[AssociativeRecall] | type[MultiQueryRecall]] = {
    task.name: task for task in (InductionHead, AssociativeRecall, MultiQueryRecall)
}


def make_task(name: str, **options: int | float | bool | None) -> Task:
    """Make a task by name; options that are None are left at the task's own default.

    Raises:
        UserError: if the name or an option is unknown, or the task cannot be drawn so.

    Example:
        >>> make_task("recall", vocab_size=20, length=40)
        AssociativeRecall(vocab_size=20, length=40, key_length=1, allow_unseen=False)
    """
    check_known("task", name, TASKS)
    given = {option: value for option, value in options.items() if value is not None}
    fields = TASKS[name].__dataclass_fields__
    for option in given:
        check_known(f"option of {name}", option, fields)
    return TASKS[name](**given)  # type: ignore[arg-type]


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not among the known ones, naming the nearest.

    Raises:
        UserError: if `name` is not in `known`.
    """
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown {what} {name!r}: {hint}Known: {', '.join(names)}")


def _vocabulary(vocab_size: int) -> tuple[str, ...]:
    # sorted as strings: 0, 1, 10, 11, ..., 2; the no-op comes first and the marker last
    plain = sorted(str(i) for i in range(vocab_size - _SPECIALS))
    return (NO_OP, *plain, MARKER)


def _next_token_dataset(
    task: InductionHead | AssociativeRecall,
    draw: Callable[[np.random.Generator, int], tuple[int, ...]],
    seed: int,
    num_train: int,
    num_test: int,
    test_length: int | None,
) -> Dataset:
    _check_positive(num_train=num_train, num_test=num_test)
    test_length = task.length if test_length is None else test_length
    task._check_length(test_length)
    rng = np.random.default_rng(seed)
    train = _distinct_rows(rng, draw, num_train, task.length)
    test = _distinct_rows(rng, draw, num_test, test_length)
    scored = task.copy_length if isinstance(task, InductionHead) else 1
    in_train, in_test = (np.zeros_like(rows[:, 1:], dtype=np.bool_) for rows in (train, test))
    in_train[:, -scored:] = in_test[:, -scored:] = True
    return Dataset(
        task,
        train=Split(train[:, :-1], train[:, 1:], in_train),
        test=Split(test[:, :-1], np.where(in_test, test[:, 1:], IGNORED), in_test),
    )


def _distinct_rows(
    rng: np.random.Generator,
    draw: Callable[[np.random.Generator, int], tuple[int, ...]],
    count: int,
    length: int,
) -> Ids:
    """Rows without duplicates, in the published order: sorted, topped up, shuffled as a list."""
    rows = sorted({draw(rng, length) for _ in range(count)})
    seen, misses = set(rows), 0
    while len(rows) < count:
        row = draw(rng, length)
        misses += 1
        if row not in seen:
            rows.append(row)
            seen.add(row)
            misses = 0
        elif misses > 10_000:
            raise UserError(
                f"only {len(rows)} different rows of length {length} were found, {count} are "
                "asked for: take fewer rows, a longer row or a larger vocabulary"
            )
    shuffled = [list(row) for row in rows]
    rng.shuffle(shuffled)
    return np.array(shuffled, dtype=np.int64)


def _answers(split: Split) -> list[int]:
    return split.targets[split.answers].tolist()


def _vote(ballots: Iterable[list[int]], answers: list[int]) -> float:
    """Share of answers hit by each row's most frequent entry, ties at random."""
    hits = []
    for ballot, answer in zip(ballots, answers, strict=True):
        counts = Counter(ballot)
        most = max(counts.values())
        winners = [token for token, count in counts.items() if count == most]
        hits.append((answer in winners) / len(winners))
    return float(np.mean(hits))


def _uniform_loss(choices: list[list[int]]) -> float:
    return float(np.mean([np.log(len(row)) for row in choices]))


def _majority(data: Dataset) -> Baseline:
    """The answer that training holds most often, and the loss of training's frequencies."""
    counts = Counter(_answers(data.train))
    total, test = sum(counts.values()), _answers(data.test)
    favourite = counts.most_common(1)[0][0]
    # an answer that training never held would cost infinitely much: add one to every count
    vocab = data.task.vocab_size
    loss = -np.mean([np.log((counts[answer] + 1) / (total + vocab)) for answer in test])
    accuracy = float(np.mean([answer == favourite for answer in test]))
    return Baseline("most frequent answer in training", accuracy, float(loss))


def _check_vocabulary(task: str, vocab_size: int, least: int, reason: str) -> None:
    if vocab_size < least:
        raise UserError(
            f"vocab_size={vocab_size} is too small for {task}: it needs at least {least} ({reason})"
        )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name}={value} must be positive")
