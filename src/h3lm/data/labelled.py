"""Labelled sequences in one form: rows end to end, memory-mapped, with a class each.

    labelled.json               what it is, the classes, the files with their checksums
    SPLIT.rows.bin              all rows of the split, one after the other
    SPLIT.starts.npy            where each row begins, and where the last ends
    SPLIT.labels.npy            the class of each example
    tokenizer/                  if the rows are text

The index comes last: a folder without it was not finished, and is written anew.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from h3lm.data.blocks import TOKENIZER_FOLDER, File, check_contents, reading_index
from h3lm.data.shards import write_array, write_text
from h3lm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INDEX_FILE = "labelled.json"
FORMAT_VERSION = 1
_WRITE_BYTES = 2**22


@dataclass(frozen=True)
class RowKind:
    """What the rows of a set are.

    Attributes:
        dtype: Of what is stored.
        num_channels: C of signals (L, C); None for token ids (L,).
        vocab_size: Number of ids; None for signals.
        scale, shift: A signal is `scale * stored + shift`.
        rows_per_example: 2 for pairs of documents, else 1.
        sample_rate: Of audio, in Hz.
    """

    dtype: str
    num_channels: int | None = None
    vocab_size: int | None = None
    scale: float = 1.0
    shift: float = 0.0
    rows_per_example: int = 1
    sample_rate: int | None = None


class Example(NamedTuple):
    """One labelled example.

    Attributes:
        rows: One array, or two for pairs: ids (L,) or a signal (L, C).
        label: Its class, an index.
    """

    rows: tuple[NDArray, ...]
    label: int


class Source(Protocol):
    """Where labelled examples come from."""

    @property
    def kind(self) -> RowKind:
        """What its rows are."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes."""

    @property
    def splits(self) -> Sequence[str]:
        """Its splits: train, valid, test, as far as it has them."""

    def examples(self, split: str) -> Iterable[Example]:
        """The examples of a split, in an order that is always the same."""


@dataclass(frozen=True)
class Split:
    """One split of a prepared set.

    Attributes:
        num_examples: Examples in it.
        longest, shortest: Positions of its longest and its shortest row.
        rows, starts, labels: Its files.
    """

    num_examples: int
    longest: int
    shortest: int
    rows: File
    starts: File
    labels: File


@dataclass(frozen=True)
class LabelledIndex:
    """What a prepared folder holds: the contents of `labelled.json`.

    Attributes:
        settings: What it was made from and how.
        kind: What the rows are.
        classes: Names of the classes.
        splits: The splits by name.
        tokenizer_files: Files of the tokenizer, if the rows are text.
    """

    settings: dict
    kind: RowKind
    classes: tuple[str, ...]
    splits: dict[str, Split]
    tokenizer_files: tuple[File, ...] = ()

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the index of a prepared folder.

        Raises:
            UserError: if there is none, or it is damaged or of another version.
        """
        missing = (
            f"no labelled data here (no {INDEX_FILE}): make it with "
            "h3lm prepare SOURCE FOLDER --labelled FORM"
        )
        with reading_index(Path(folder) / INDEX_FILE, FORMAT_VERSION, missing) as found:
            splits = {}
            for name, split in found["splits"].items():
                files = {key: File(**split[key]) for key in ("rows", "starts", "labels")}
                splits[name] = Split(**(split | files))
            return cls(
                found["settings"], RowKind(**found["kind"]), tuple(found["classes"]), splits,
                tuple(File(**file) for file in found["tokenizer_files"]),
            )  # fmt: skip

    def to_json(self) -> str:
        """The text of `labelled.json`."""
        return json.dumps({"format_version": FORMAT_VERSION} | asdict(self), indent=1) + "\n"

    def verify(self, folder: str | Path) -> None:
        """Read every file and compare its sha256.

        Raises:
            UserError: naming the first file that is missing, truncated or altered.
        """
        files = [
            f for split in self.splits.values() for f in (split.rows, split.starts, split.labels)
        ]
        check_contents((*files, *self.tokenizer_files), folder)


class Labelled:
    """One split of a prepared set, as a sequence of examples.

    Opening checks that every file is there and has its size.

    Args:
        folder: Where `h3lm prepare` wrote.
        split: "train", "valid" or "test".

    Raises:
        UserError: if there is no such split, or a file is missing or has another size.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder, self.split = Path(folder), split
        self.index = LabelledIndex.load(folder)
        if split not in self.index.splits:
            found = ", ".join(self.index.splits)
            raise UserError(f"{folder}: no split {split!r} here, only {found}")
        self.kind, files = self.index.kind, self.index.splits[split]
        for file in (files.rows, files.starts, files.labels):
            file.check(self.folder, contents=False)
        self._rows_file = files.rows
        self.labels: NDArray[np.int32] = np.load(self.folder / files.labels.name)
        self._starts: NDArray[np.int64] = np.load(self.folder / files.starts.name)
        self._map: NDArray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Example:
        """Example i: ids (L,), int64, or signals (L, C), float32."""
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        n = self.kind.rows_per_example
        return Example(tuple(self._row(n * i + j) for j in range(n)), int(self.labels[i]))

    def _row(self, number: int) -> NDArray:
        if self._map is None:
            self._map = self._open()
        stored = self._map[self._starts[number] : self._starts[number + 1]]
        if self.kind.num_channels is None:
            return stored.astype(np.int64)
        return stored.astype(np.float32) * np.float32(self.kind.scale) + np.float32(self.kind.shift)

    def _open(self) -> NDArray:
        dtype = np.dtype(self.kind.dtype)
        shape: tuple[int, ...] = (int(self._starts[-1]),)
        if self.kind.num_channels is not None:
            shape = (*shape, self.kind.num_channels)
        path = self.folder / self._rows_file.name
        if self._rows_file.bytes != int(np.prod(shape)) * dtype.itemsize:
            raise UserError(f"{path}: its size does not fit the index: prepare the data again")
        return np.memmap(path, dtype, mode="r", shape=shape)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer lies, if the rows are text."""
        return self.folder / TOKENIZER_FOLDER if self.index.tokenizer_files else None

    def __getstate__(self) -> dict:
        # Worker processes of a data loader map the file anew: a pickled map would be a copy
        return self.__dict__ | {"_map": None}


def write_labelled(
    source: Source,
    out_dir: str | Path,
    settings: dict,
    *,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    progress: bool = False,
) -> LabelledIndex:
    """Write a source into a folder that `Labelled` reads.

    Memory does not grow with the set, but for one example.

    Args:
        source: The examples.
        out_dir: A new or empty folder, or one whose preparation was cut short.
        settings: What is being prepared and how, for the index.
        tokenizer: What made the ids, if they are text.
        progress: Whether to show a progress line on standard error.

    Raises:
        UserError: if the folder holds something else, a split is empty, or a signal is not finite.
    """
    out = Path(out_dir)
    try:
        _claim(out)
        files = _save_tokenizer(tokenizer, out) if tokenizer is not None else ()
        splits = {split: _write_split(source, split, out, progress) for split in source.splits}
        index = LabelledIndex(settings, source.kind, tuple(source.classes), splits, files)
        write_text(out / INDEX_FILE, index.to_json())
    except OSError as error:
        where = error.filename or out
        raise UserError(f"{where}: cannot be written: {error.strerror or error}") from None
    return index


def _claim(out: Path) -> None:
    """See that the folder is ours to write in."""
    if (out / INDEX_FILE).exists():
        raise UserError(f"{out}: holds prepared data already: remove it or take another folder")
    out.mkdir(parents=True, exist_ok=True)
    mark = out / f"{INDEX_FILE}.unfinished"
    if any(out.iterdir()) and not mark.exists():
        raise UserError(f"{out}: is not empty and holds no prepared data: take another folder")
    mark.touch()


def _write_split(source: Source, split: str, out: Path, progress: bool) -> Split:
    from rich.console import Console
    from rich.progress import track

    kind = source.kind
    path = out / f"{split}.rows.bin"
    starts, labels = [0], []
    digest, size = hashlib.sha256(), 0
    shown = track(
        source.examples(split), f"writing {split}",
        console=Console(stderr=True), transient=True, disable=not progress,
    )  # fmt: skip
    with path.open("wb", buffering=_WRITE_BYTES) as stream:
        for number, example in enumerate(shown):
            for row in example.rows:
                _check_row(row, kind, f"{split} example {number}")
                data = np.ascontiguousarray(row, dtype=kind.dtype).data.cast("B")
                stream.write(data)
                digest.update(data)
                size += len(data)
                starts.append(starts[-1] + len(row))
            labels.append(example.label)
        stream.flush()
        os.fsync(stream.fileno())
    if not labels:
        raise UserError(f"the {split} split is empty: there is no example in it")
    lengths = np.diff(starts)
    return Split(
        num_examples=len(labels),
        longest=int(lengths.max()),
        shortest=int(lengths.min()),
        rows=File(path.name, size, digest.hexdigest()),
        starts=write_array(out / f"{split}.starts.npy", np.array(starts, np.int64)),
        labels=write_array(out / f"{split}.labels.npy", np.array(labels, np.int32)),
    )


def _check_row(row: NDArray, kind: RowKind, where: str) -> None:
    if not len(row):
        raise UserError(f"{where}: it is empty")
    if kind.num_channels is not None and row.shape != (len(row), kind.num_channels):
        raise UserError(f"{where}: {row.shape[1:]} channels instead of {kind.num_channels}")


def _save_tokenizer(tokenizer: "PreTrainedTokenizerFast", out: Path) -> tuple[File, ...]:
    folder = out / TOKENIZER_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        found.append(
            File(f"{folder.name}/{path.name}", len(data), hashlib.sha256(data).hexdigest())
        )
    return tuple(found)


class HeldOut:
    """A source some of whose training examples, drawn at random, are another split.

    Args:
        source: The source.
        split: Name of the new split, "valid" or "test".
        fraction: Part of the training examples, within (0, 1).
        seed: Of the draw.
    """

    def __init__(self, source: Source, split: str, fraction: float, seed: int = 2357) -> None:
        if split in source.splits:
            raise UserError(f"the source has a {split} split of its own: hold nothing out for it")
        if not 0 < fraction < 1:
            raise UserError(f"the part held out for {split} is {fraction}: it must be within 0, 1")
        self.source, self.split, self.fraction, self.seed = source, split, fraction, seed
        self.kind, self.classes = source.kind, source.classes
        self.splits = (*source.splits, split)

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split."""
        if split not in ("train", self.split):
            yield from self.source.examples(split)
            return
        for number, example in enumerate(self.source.examples("train")):
            # one draw for each example: no need to know how many there are
            drawn = np.random.default_rng([self.seed, number]).random() < self.fraction
            if drawn == (split == self.split):
                yield example


class Shaped:
    """A source whose rows are cut, and refused if their lengths differ without leave.

    Args:
        source: The source.
        length: Longer rows are cut there; None for as they are.
        pad: Whether rows of other lengths may stay: batches of them are padded and masked.
    """

    def __init__(self, source: Source, *, length: int | None, pad: bool) -> None:
        if length is not None and length < 1:
            raise UserError(f"length={length} must be at least 1")
        self.source, self.length, self.pad = source, length, pad
        self.kind, self.classes, self.splits = source.kind, source.classes, source.splits
        self._first: int | None = None

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split."""
        for number, example in enumerate(self.source.examples(split)):
            rows = tuple(row[: self.length] for row in example.rows)
            if not self.pad:
                for row in rows:
                    self._compare(len(row), f"{split} example {number}")
            yield example._replace(rows=rows)

    def _compare(self, length: int, where: str) -> None:
        if self._first is None:
            self._first = length
        if length != self._first:
            raise UserError(
                f"{where}: {length:,} positions, the ones before have {self._first:,}: give --pad "
                "to keep unequal lengths (padding is masked), or --length to cut them"
            )


def class_index(classes: Sequence[str], name: str, where: str) -> int:
    """Which class a name is.

    Raises:
        UserError: if it is none of them.
    """
    try:
        return classes.index(name)
    except ValueError:
        raise UserError(f"{where}: unknown label {name!r}, not one of {_some(classes)}") from None


def check_finite(values: NDArray, where: str, first_row: int = 0) -> None:
    """Refuse NaN and infinity.

    Args:
        values: (n, ...), a row of a file each.
        where: The file.
        first_row: What the first row is called.

    Raises:
        UserError: naming the row.
    """
    if np.issubdtype(values.dtype, np.integer):
        return
    bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
    if bad.any():
        row = int(bad.argmax())
        found = values[row][~np.isfinite(values[row])].flat[0]
        raise UserError(
            f"{where}: row {first_row + row} holds {found}: fill or leave out what is missing"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown}, ..."
