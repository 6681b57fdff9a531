"""Tables of labelled series: .npz, Parquet, and .ts of the UCR and UEA archives."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from h3lm.data.labelled import Example, RowKind, check_finite, class_index
from h3lm.data.sources import open_unpacked
from h3lm.errors import UserError

SPLIT_WORDS = {
    "train": "train", "training": "train", "valid": "valid", "validation": "valid",
    "val": "valid", "dev": "valid", "test": "test",
}  # fmt: skip
ORDER = ("train", "valid", "test")
SUFFIXES = (".ts", ".npz", ".parquet")


class Table(NamedTuple):
    """Series of one file or split.

    Attributes:
        series: An array (L, C) each.
        labels: The name of each one's class.
        classes: All classes, if the file says; those that occur, if not.
        declared: Whether the file says.
    """

    series: Sequence[NDArray]
    labels: list[str]
    classes: list[str]
    declared: bool


class TableSource:
    """Labelled series of one table, or of a table for each split.

    Args:
        path: A file; a folder of files whose names say their split; or the beginning of such
            names, as `ucr/ACSF1` for `ucr/ACSF1_TRAIN.ts` and `ucr/ACSF1_TEST.ts`.
        values_field: Column of a Parquet file that holds the series.
        label_field: Column that holds the label.
        split_field: Column that tells the split, if there is one.

    Raises:
        UserError: naming the file and the row, for whatever is wrong.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        values_field: str = "values",
        label_field: str = "label",
        split_field: str | None = None,
    ) -> None:
        self._fields = values_field, label_field, split_field
        self._tables: dict[str, tuple[str, Table]] = {}
        for split, file in _files(Path(path).expanduser()):
            for found, table in self._read(file, split).items():
                if found in self._tables:
                    raise UserError(f"{file}: a second table for the {found} split")
                self._tables[found] = str(file), table
        self.splits = [split for split in ORDER if split in self._tables]
        if "train" not in self.splits:
            raise UserError(f"{path}: no training series here, only {', '.join(self.splits)}")
        self.classes = self._tables["train"][1].classes
        self.kind = self._kind()

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split."""
        where, table = self._tables[split]
        for row, (series, label) in enumerate(zip(table.series, table.labels, strict=True), 1):
            yield Example((series,), class_index(self.classes, label, f"{where}, row {row}"))

    def _kind(self) -> RowKind:
        first = self._tables["train"][1].series[0]
        channels = first.shape[1]
        for where, table in self._tables.values():
            for row, series in enumerate(table.series, 1):
                if series.shape[1] != channels:
                    raise UserError(
                        f"{where}: row {row} has {series.shape[1]} channels, the first {channels}"
                    )
        whole = all(t.series[0].dtype == np.uint8 for _, t in self._tables.values())
        if whole:  # pixels
            return RowKind("uint8", channels, scale=1 / 127.5, shift=-1.0)
        return RowKind("float32", channels)

    def _read(self, file: Path, split: str) -> dict[str, Table]:
        form = file.name.removesuffix(file.suffix) if file.suffix in (".xz", ".gz") else file.name
        if form.endswith(".ts"):
            return {split: read_ts(file)}
        if form.endswith(".npz"):
            return _read_npz(file, split)
        return _read_parquet(file, split, *self._fields)


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """The table files of a place, each with the split that its name tells, `train` if none."""
    if path.is_file():
        yield "train", path
        return
    places = sorted(path.iterdir()) if path.is_dir() else sorted(path.parent.glob(f"{path.name}_*"))
    found = False
    for file in places:
        plain = file.name.removesuffix(file.suffix) if file.suffix in (".xz", ".gz") else file.name
        if file.is_file() and plain.endswith(SUFFIXES):
            words = Path(plain).stem.lower().replace("-", "_").split("_")
            found = True
            yield next((SPLIT_WORDS[w] for w in reversed(words) if w in SPLIT_WORDS), "train"), file
    if not found:
        what = "no such file or folder" if not path.exists() else "no table in this folder"
        raise UserError(f"{path}: {what}: {', '.join(SUFFIXES)} can be read")


def read_ts(path: Path) -> Table:
    """Read a .ts file: channels between colons, then the label; also as .xz or .gz.

    Raises:
        UserError: naming the row (of the data, from 1) that cannot be read or has a value missing.
    """
    classes: list[str] | None = None
    series: list[NDArray] = []
    labels: list[str] = []
    in_data = False
    with open_unpacked(path) as stream:
        for line in stream:
            text = line.decode("utf-8", "replace").strip()
            if not text or text.startswith("#"):
                continue
            if not in_data:
                words = text.split()
                if words[0].lower() == "@classlabel" and words[1:2] == ["true"]:
                    classes = words[2:]
                if words[0].lower() == "@timestamps" and words[1:2] == ["true"]:
                    raise UserError(f"{path}: series with time stamps are not read")
                in_data = words[0].lower() == "@data"
                continue
            *channels, label = text.split(":")
            row = f"{path}: row {len(labels) + 1}"
            series.append(_numbers(channels, row))
            labels.append(label)
            if classes is not None and label not in classes:
                class_index(classes, label, row)
    if not labels:
        raise UserError(f"{path}: no series in it: a .ts file has them behind a line @data")
    return Table(series, labels, classes or sorted(set(labels)), classes is not None)


def _numbers(channels: list[str], where: str) -> NDArray:
    if not channels:
        raise UserError(f"{where} has no label behind a colon")
    try:
        columns = [np.array(channel.replace("?", "nan").split(","), float) for channel in channels]
        values = np.stack(columns, 1).astype(np.float32)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if not np.isfinite(values).all():
        at = int((~np.isfinite(values)).any(1).argmax())
        raise UserError(
            f"{where} holds a missing or infinite value at position {at + 1}: fill it or leave "
            "the row out"
        )
    return values


def _read_npz(path: Path, split: str) -> dict[str, Table]:
    """`values` and `labels`, or `train_values`, `train_labels`, `test_values`, ..."""
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no .npz file, or damaged ({error})") from None
    tables = {}
    for name, values in found.items():
        prefix, _, word = name.rpartition("_")
        if word != "values" or (prefix and prefix not in SPLIT_WORDS):
            continue
        labels_name = f"{prefix}_labels" if prefix else "labels"
        if labels_name not in found:
            raise UserError(f"{path}: has {name} but no {labels_name}")
        labels = found[labels_name]
        if len(labels) != len(values) or values.ndim not in (2, 3):
            raise UserError(
                f"{path}: {name} is {values.shape} and {labels_name} {labels.shape}: they must be "
                "(n, L) or (n, L, C) and (n,)"
            )
        check_finite(values, f"{path}, {name}", first_row=1)
        names = [str(label) for label in labels.tolist()]
        kept = values if values.dtype == np.uint8 else values.astype(np.float32)
        rows = kept[..., None] if values.ndim == 2 else kept
        tables[SPLIT_WORDS.get(prefix, split)] = Table(rows, names, _classes(names), False)
    if not tables:
        raise UserError(
            f"{path}: holds {', '.join(found)}; wanted are values and labels, or train_values, "
            "train_labels, test_values, test_labels"
        )
    return tables


def _read_parquet(
    path: Path, split: str, values_field: str, label_field: str, split_field: str | None
) -> dict[str, Table]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install 'h3lm[data]'") from None
    wanted = [values_field, label_field, *([split_field] if split_field else [])]
    try:
        columns = read_table(path).to_pydict()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: no Parquet file, or damaged ({error})") from None
    for name in wanted:
        if name not in columns:
            raise UserError(
                f"{path}: no column {name!r}, only {', '.join(map(repr, columns))}: name it with "
                "--values-field, --label-field or --split-field"
            )
    gathered: dict[str, tuple[list[NDArray], list[str]]] = {}
    for row, values in enumerate(columns[values_field], 1):
        word = str(columns[split_field][row - 1]) if split_field else split
        if word not in SPLIT_WORDS:
            raise UserError(f"{path}: row {row} is of split {word!r}, not of train, valid or test")
        try:
            array = np.array(values, np.float32)
        except (TypeError, ValueError):
            raise UserError(f"{path}: row {row} of {values_field!r} is no series") from None
        check_finite(array[None], str(path), first_row=row)
        series, labels = gathered.setdefault(SPLIT_WORDS[word], ([], []))
        series.append(array[:, None] if array.ndim == 1 else array)
        labels.append(str(columns[label_field][row - 1]))
    return {
        word: Table(series, labels, _classes(labels), False)
        for word, (series, labels) in gathered.items()
    }


def _classes(labels: list[str]) -> list[str]:
    """Names in order, as numbers where all of them are."""
    names = set(labels)
    return sorted(names, key=int) if all(name.isdigit() for name in names) else sorted(names)
