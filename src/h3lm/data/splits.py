"""Which text becomes which split: what a source holds, and what of it is held out."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from h3lm.data.sources import Piece, Source, pieces
from h3lm.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

# The Pile's, of documents. It is meant for millions of them: of fewer, 50 or a tenth.
VALID_FRACTION_OF_DOCUMENTS = 0.0005
VALID_DOCUMENTS = 50
# Of a text alone, whose end is taken, and the most that is taken of few documents.
VALID_FRACTION_OF_A_TEXT = 0.1


@dataclass
class Survey:
    """What one reading of a source's split finds out."""

    documents: int = 0
    characters: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    alphabet: set[str] = field(default_factory=set)

    def identity(self) -> dict:
        """Return what tells this text from any other, however it was packed."""
        return {
            "documents": self.documents,
            "characters": self.characters,
            "sha256": self.digest.hexdigest(),
        }


def survey_split(
    source: Source, split: str, separator: str | None, alphabet: bool, line: "Progress"
) -> Survey:
    """Read a split of a source once, to its end.

    Args:
        source: What to read.
        split: Which of its splits.
        separator: The text of the end of a document; see `pieces`.
        alphabet: Whether to collect the characters.
        line: Where to show how far it has come.

    Raises:
        UserError: for whatever is wrong with the text, naming the place.
    """
    survey = Survey()
    task = line.add_task(f"reading {split}", total=None)
    for piece in pieces(source.documents(split), separator):
        try:
            survey.digest.update(piece.text.encode())
        except UnicodeEncodeError as error:
            raise UserError(
                f"{piece.where}: holds half a surrogate pair, {piece.text[error.start]!a}, which "
                "is no text in any encoding: mend it"
            ) from None
        survey.characters += len(piece.text)
        if alphabet:
            survey.alphabet.update(piece.text)
        if piece.ends_document:
            survey.digest.update(b"\xff")  # is in no UTF-8
            survey.documents += 1
        line.update(task, completed=survey.characters)
    line.update(task, total=survey.characters)
    return survey


@dataclass(frozen=True)
class Part:
    """One split of the output: its name, its pieces, and how many characters they have."""

    name: str
    pieces: Callable[[], Iterator[Piece]]
    characters: int | None


def plan_splits(
    source: Source,
    surveys: dict[str, Survey],
    separator: str | None,
    valid_fraction: float | None,
    seed: int,
) -> dict[str, Part]:
    """Say which text becomes which split, holding some out for validation if need be.

    Args:
        source: Where the text is read from.
        surveys: What was found in its splits that hold text.
        separator: The text of the end of a document; see `pieces`.
        valid_fraction: Share of the training text to hold out; see `prepare`.
        seed: Which documents are held out.

    Returns:
        The splits of the output by their names.
    """

    def read(split: str) -> Iterator[Piece]:
        return pieces(source.documents(split), separator)

    def whole(split: str) -> Part:
        return Part(split, lambda: read(split), surveys[split].characters)

    plan = {split: whole(split) for split in surveys}
    if "train" not in surveys or "valid" in surveys or valid_fraction == 0:
        return plan
    train = surveys["train"]
    if train.documents == 1:
        share = VALID_FRACTION_OF_A_TEXT if valid_fraction is None else valid_fraction
        size = train.characters
        # At least one character on each side; a text of one character is left to training.
        cut = min(max(int(size * (1 - share)), 1), max(size - 1, 1))
        halves = {"train": (0, cut), "valid": (cut, size)}
        if cut == size:
            return plan
        held_out = {
            name: Part(name, lambda a=a, b=b: _stretch(read("train"), a, b), b - a)  # type: ignore[misc]
            for name, (a, b) in halves.items()
        }
    else:
        chosen = _choose(train.documents, _held_out(train.documents, valid_fraction), seed)
        held_out = {
            # The characters of the training text are those of all the documents, nearly.
            name: Part(name, lambda take=take: _chosen(read("train"), chosen, take), characters)  # type: ignore[misc]
            for name, take, characters in (
                ("train", False, train.characters),
                ("valid", True, None),
            )
        }
    others = {split: part for split, part in plan.items() if split != "train"}
    return held_out | others


def _held_out(documents: int, valid_fraction: float | None) -> int:
    """Return how many of several documents to hold out: at least one, not all."""
    if valid_fraction is None:
        few = min(VALID_DOCUMENTS, round(documents * VALID_FRACTION_OF_A_TEXT))
        number = max(round(documents * VALID_FRACTION_OF_DOCUMENTS), few)
    else:
        number = round(documents * valid_fraction)
    return min(max(number, 1), documents - 1)


def _stretch(text: Iterable[Piece], start: int, stop: int) -> Iterator[Piece]:
    """Take the characters from `start` to `stop` of a single document, as one document."""
    position = 0
    for piece in text:
        first, last = max(start - position, 0), min(stop - position, len(piece.text))
        if first < last:
            yield Piece(piece.text[first:last], position + last == stop, piece.where)
        position += len(piece.text)


def _chosen(text: Iterable[Piece], chosen: set[int], take: bool) -> Iterator[Piece]:
    """Take the chosen documents, or the others."""
    number = 0
    for piece in text:
        if (number in chosen) == take:
            yield piece
        number += piece.ends_document


def _choose(total: int, number: int, seed: int) -> set[int]:
    """Choose so many of 0 .. total - 1 at random, the same with every version of numpy.

    Source: SplitMix64 (Steele, Lea and Flood 2014) gives each a key; the smallest keys win.
    """
    best_keys = np.zeros(0, np.uint64)
    best = np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        for start in range(0, total, 2**20):
            members = np.arange(start, min(start + 2**20, total), dtype=np.uint64)
            z = np.uint64(seed % 2**64) + (members + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            keys = np.concatenate([best_keys, z ^ (z >> np.uint64(31))])
            order = np.argsort(keys, kind="stable")[:number]
            best_keys, best = keys[order], np.concatenate([best, members])[order]
    return set(best.tolist())
