"""Where text comes from: files of several forms, folders of them, Hugging Face datasets.

Text and JSON lines are read here, not by `datasets`, whose readers replace line ends, hold a text
file in memory whole, and do not say where undecodable bytes stand.
"""

import codecs
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol, cast

from h3lm.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

# Characters encoded at a time: few enough that memory stays small, enough that cuts are rare.
PIECE_CHARACTERS = 2**18

_READ_BYTES = 2**20
_COMPRESSIONS = (".xz", ".gz", ".zst")
_TEXT = (".txt", ".text")
_JSON = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet",)
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}
_INSTALL = "install it with: pip install 'h3lm[data]'"


class Document(NamedTuple):
    """A text of the source: where it stands, for messages, and its parts in order."""

    where: str
    parts: Iterable[str]


class Piece(NamedTuple):
    """A stretch of a document, of at most about `PIECE_CHARACTERS`."""

    text: str
    ends_document: bool
    where: str


class Source(Protocol):
    """Text in named splits, to be read from the beginning as often as needed."""

    @property
    def splits(self) -> list[str]:
        """The splits there are, of which some have names of our own: train, valid, test."""

    def documents(self, split: str) -> Iterator[Document]:
        """Read a split, one document after the other."""


def open_source(
    source: str | Path, *, text_field: str = "text", subset: str | None = None
) -> Source:
    """Find out what a source is.

    A file is one split, `train`. In a folder the words train, valid, validation, val, dev and test
    in the path of a file tell its split; a file without such a word is for training.

    Args:
        source: A file, a folder of files, a folder that `datasets` saved, or the name of a dataset
            on the Hugging Face hub.
        text_field: The field or column that holds the text.
        subset: Which configuration of a Hugging Face dataset.

    Raises:
        UserError: if there is no such source, or nothing in it that can be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return FileSource({"train": [path]}, text_field)
    if path.is_dir():
        if all((path / name).exists() for name in ("index.json", "tokenizer")):
            raise UserError(f"{source}: is prepared data already, no text")
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return DatasetSource(_load_saved(path), text_field)
        if subset is not None or _declares_configs(path / "README.md"):
            return DatasetSource(_load_by_name(str(path), subset), text_field)
        return FileSource(_files_by_split(path), text_field)
    looks_like_path = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if looks_like_path or _form(path) is not None:
        raise UserError(f"{source}: no such file or folder")
    return DatasetSource(_load_by_name(str(source), subset), text_field)


class FileSource:
    """Text, JSON lines and Parquet files, each also as .xz, .gz or .zst.

    A text file is one document, a line of JSON lines or a row of Parquet another. A file of an
    unknown suffix is text. UTF-8; a byte order mark is left out, everything else kept as it is.

    Args:
        files: The files of each split, in the order in which they are read.
        text_field: The field or column that holds the text.
    """

    def __init__(self, files: dict[str, list[Path]], text_field: str) -> None:
        self.files, self.text_field = files, text_field

    @property
    def splits(self) -> list[str]:
        """The splits there are."""
        return list(self.files)

    def documents(self, split: str) -> Iterator[Document]:
        """Read a split, one document after the other.

        Raises:
            UserError: naming the file and the place, for whatever is wrong with it.
        """
        readers: dict[str | None, Callable[[Path], Iterator[Document]]] = {
            "json": self._json_lines,
            "parquet": self._parquet_rows,
        }
        for path in self.files[split]:
            yield from readers.get(_form(path), self._text)(path)

    def _text(self, path: Path) -> Iterator[Document]:
        yield Document(str(path), _decoded(path))

    def _json_lines(self, path: Path) -> Iterator[Document]:
        offset = 0
        with open_unpacked(path) as stream:
            for number, line in enumerate(stream, start=1):
                where = f"{path}, line {number:,}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise _undecodable(path, offset + error.start, error) from None
                offset += len(line)
                if text.isspace():
                    continue
                try:
                    row = json.loads(text)
                except ValueError as error:
                    raise UserError(f"{where}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise UserError(
                        f"{where}: JSON lines hold one object a line, and this is a "
                        f"{type(row).__name__}"
                    )
                yield Document(where, [_text_of(row, self.text_field, where)])

    def _parquet_rows(self, path: Path) -> Iterator[Document]:
        try:
            from pyarrow import ArrowException, ArrowInvalid
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise UserError(f"{path}: reading Parquet needs pyarrow: {_INSTALL}") from None
        with _seekable(path) as stream:
            try:
                table = ParquetFile(stream)
            except ArrowInvalid as error:
                raise UserError(f"{path}: no Parquet file, or damaged ({error})") from None
            if self.text_field not in table.schema_arrow.names:
                raise UserError(_no_field(str(path), self.text_field, table.schema_arrow.names))
            number = 0
            batches = table.iter_batches(batch_size=16, columns=[self.text_field])
            while True:
                try:
                    batch = next(batches, None)
                    texts = [] if batch is None else batch.column(0).to_pylist()
                except UnicodeDecodeError as error:
                    where = f"{path}, rows {number + 1:,} to {number + 16:,}"
                    raise UserError(f"{where}: text that is not UTF-8 ({error.reason})") from None
                except (ArrowException, OSError) as error:
                    raise UserError(f"{path}: damaged after row {number:,} ({error})") from None
                if batch is None:
                    return
                for text in texts:
                    number += 1
                    where = f"{path}, row {number:,}"
                    field = self.text_field
                    yield Document(where, [_text_of({field: text}, field, where)])


class DatasetSource:
    """A Hugging Face dataset, memory-mapped from the disk.

    Args:
        splits: Its splits by their names there.
        text_field: The column that holds the text.
    """

    def __init__(self, splits: "dict[str, Dataset]", text_field: str) -> None:
        self.datasets = {_SPLIT_WORDS.get(name, name): rows for name, rows in splits.items()}
        self.text_field = text_field
        for name, rows in self.datasets.items():
            if text_field not in rows.column_names:
                raise UserError(_no_field(f"split {name}", text_field, rows.column_names))

    @property
    def splits(self) -> list[str]:
        """The splits there are."""
        return list(self.datasets)

    def documents(self, split: str) -> Iterator[Document]:
        """Read a split, one row after the other.

        Raises:
            UserError: if a row holds no text.
        """
        rows = self.datasets[split].select_columns(self.text_field)
        for number, row in enumerate(rows, start=1):
            where = f"split {split}, row {number:,}"
            yield Document(where, [_text_of(row, self.text_field, where)])


def pieces(documents: Iterable[Document], separator: str | None) -> Iterator[Piece]:
    """Cut documents into pieces that can be encoded one by one.

    A document that holds the separator is several documents. A long one is cut between a letter
    and the white space after it, where every byte-level BPE of GPT-2's family cuts as well: its
    pieces give the same tokens as the whole. Tokenizers that treat the beginning of a text
    specially see one about every 260,000 characters. Empty documents are left out.

    Args:
        documents: What to cut.
        separator: The text of the end of a document, if texts may contain it.

    Yields:
        Pieces whose texts, joined, are the documents without separators; the same however the
        documents were divided into parts.
    """
    for where, parts in documents:
        begun = False
        for text, ends in _cut(parts, separator):
            if text or begun:
                yield Piece(text, ends, where)
            begun = not ends


def _cut(parts: Iterable[str], separator: str | None) -> Iterator[tuple[str, bool]]:
    held = ""
    # With so much in hand, a separator that begins within a piece is there to its end.
    enough = PIECE_CHARACTERS + len(separator or "")
    for part in parts:
        *whole, held = (held + part).split(separator) if separator else [held + part]
        for text in whole:
            start = 0
            while len(text) - start > PIECE_CHARACTERS:
                stop = _safe_cut(text, start)
                yield text[start:stop], False
                start = stop
            yield text[start:], True
        start = 0
        while len(held) - start > enough:
            stop = _safe_cut(held, start)
            yield held[start:stop], False
            start = stop
        held = held[start:]
    while len(held) > PIECE_CHARACTERS:
        stop = _safe_cut(held, 0)
        yield held[:stop], False
        held = held[stop:]
    yield held, True


_AFTER_LETTER = re.compile(r"[^\W\d_](?=\s)")
_BEFORE_SPACE = re.compile(r"\S(?=\s)")


def _safe_cut(text: str, start: int) -> int:
    """Return where to cut the piece that begins at `start`; the text is longer than a piece."""
    limit = start + PIECE_CHARACTERS
    for pattern in (_AFTER_LETTER, _BEFORE_SPACE):
        for back in (512, PIECE_CHARACTERS // 2):  # nearly always the first holds one
            cuts = [
                found.end() for found in pattern.finditer(text, max(start, limit - back), limit)
            ]
            if cuts:
                return cuts[-1]
    return limit


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    first = True
    with open_unpacked(path) as stream:
        while True:
            data = stream.read(_READ_BYTES)
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise _undecodable(path, offset - waiting + error.start, error) from None
            offset += len(data)
            if first and text:
                text = text.removeprefix("\ufeff")
                first = False
            yield text
            if not data:
                return


def _undecodable(path: Path, offset: int, error: UnicodeDecodeError) -> UserError:
    unpacked = " (of the unpacked text)" if path.suffix in _COMPRESSIONS else ""
    byte = error.object[error.start]
    return UserError(
        f"{path}: byte {offset:,}{unpacked}, 0x{byte:02x}, is not UTF-8 ({error.reason}): convert "
        "the file to UTF-8"
    )


def _text_of(row: dict, field: str, where: str) -> str:
    if field not in row:
        raise UserError(_no_field(where, field, list(row)))
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} is a {type(text).__name__}, not a text")
    return text


def _no_field(where: str, field: str, found: list[str]) -> str:
    return (
        f"{where}: no field {field!r}, only {', '.join(map(repr, found))}: name the text's with "
        "--text-field"
    )


@contextmanager
def open_unpacked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked; what goes wrong while it is read is a UserError."""
    try:
        with path.open("rb") as raw:
            yield io.BufferedReader(cast(io.RawIOBase, _unpacked(path, raw)), _READ_BYTES)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or truncated {path.suffix} file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _unpacked(path: Path, raw: IO[bytes]) -> object:
    if path.suffix == ".xz":
        return lzma.LZMAFile(raw)
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return _open_zstandard(path, raw) if path.suffix == ".zst" else raw


def _open_zstandard(path: Path, raw: IO[bytes]) -> io.RawIOBase:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path}: reading .zst needs zstandard: {_INSTALL}") from None

    class Reader(io.RawIOBase):
        """The library's own reader takes the end of a truncated file for the end of the text."""

        def __init__(self) -> None:
            self.packed = b""
            self.unpacked = memoryview(b"")
            self.frame = self._new_frame()
            self.begun = False

        def _new_frame(self) -> "zstandard.ZstdDecompressionObj":
            return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            while not self.unpacked:
                self.packed = self.packed or raw.read(_READ_BYTES // 8)
                if not self.packed:
                    if self.begun:
                        raise EOFError("the file ends within a frame")
                    return 0
                try:
                    self.unpacked = memoryview(self.frame.decompress(self.packed))
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from None
                self.packed = self.frame.unused_data
                self.begun = not self.frame.eof
                if self.frame.eof:
                    self.frame = self._new_frame()
            count = min(len(buffer), len(self.unpacked))
            buffer[:count] = self.unpacked[:count]
            self.unpacked = self.unpacked[count:]
            return count

    return Reader()


@contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that is read from its end, as Parquet is: unpacked on the disk if packed."""
    with open_unpacked(path) as stream:
        if path.suffix not in _COMPRESSIONS:
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked, _READ_BYTES)
            unpacked.seek(0)
            yield unpacked


def _form(path: Path) -> str | None:
    """Return text, json or parquet by the suffix under any compression, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    forms = (("text", _TEXT), ("json", _JSON), ("parquet", _PARQUET))
    return next((form for form, endings in forms if last in endings), None)


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        inside = path.relative_to(folder).as_posix()
        if path.is_file() and _form(path) is not None and "/." not in f"/{inside}":
            words = re.split(r"[^a-z]+", inside.lower())
            found = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
            if len(found) > 1:
                raise UserError(
                    f"{path}: its name tells of several splits, {' and '.join(sorted(found))}"
                )
            files.setdefault(found.pop() if found else "train", []).append(path)
    if not files:
        endings = " ".join((*_TEXT, *_JSON, *_PARQUET))
        raise UserError(
            f"{folder}: no text in this folder: files end in {endings}, packed or not "
            f"({' '.join(_COMPRESSIONS)})"
        )
    order = ["train", "valid", "test"]
    return {split: files[split] for split in order if split in files}


def _declares_configs(readme: Path) -> bool:
    """Tell whether a dataset card says which files belong to which split."""
    if not readme.is_file():
        return False
    head = readme.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    return head.startswith("---") and re.search(r"^configs:", head, re.MULTILINE) is not None


def _load_saved(folder: Path) -> "dict[str, Dataset]":
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise UserError(f"{folder}: reading it needs datasets: {_INSTALL}") from None
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # pyarrow's, the library's own, OSError
        raise UserError(f"{folder}: this saved dataset cannot be read ({_line(error)})") from error
    return dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}


def _load_by_name(name: str, subset: str | None) -> "dict[str, Dataset]":
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{name}: no such file or folder; reading datasets of the Hugging Face hub needs "
            f"datasets: {_INSTALL}"
        ) from None
    try:
        # Not streamed: kept on the disk and memory-mapped, it is downloaded once, not at each of
        # the passes that preparing takes.
        return dict(load_dataset(name, subset))
    except Exception as error:  # of many kinds, for names, networks and formats
        raise UserError(
            f"{name}: neither a file, a folder, nor a dataset that the Hugging Face hub gives "
            f"({_line(error)})"
        ) from error


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
