"""Prepared data: a stream of tokens in memory-mapped shards, and the blocks cut from it.

A prepared folder holds

    index.json                    what is here and from which settings; see `Index`
    tokenizer/                    the tokenizer, as `AutoTokenizer` loads it
    train-00000.tokens.npy        the tokens, uint16 or uint32; all shards of a split but the last
                                  are equally long
    train-00000.documents.npy     uint32: where the documents that end in this shard end, counted
                                  from the shard's start, one past the last token

The shards of a split, one after the other, are one stream: documents, each closed by the end of
text. numpy alone reads it.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, cast, overload

import numpy as np
from numpy.typing import NDArray

from h3lm.errors import UserError

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
UNFINISHED_FILE = "unfinished.jsonl"
TOKENIZER_FOLDER = "tokenizer"

# A memory map keeps a file descriptor, of which a process commonly has 1,024, and takes as much of
# the address space, which may be limited, as the file is long
_MAPS_KEPT_OPEN = 256
_BYTES_KEPT_MAPPED = 1 << 30


@contextmanager
def reading_index(path: Path, version: int, missing: str) -> Iterator[dict[str, Any]]:
    """The fields of an index file of prepared data, for the block that makes something of them.

    Args:
        path: The file.
        version: The format version that is read.
        missing: What to say of its folder if there is no such file.

    Raises:
        UserError: if it is missing, unreadable or of another version, or if what it says or the
            block makes of it does not fit together.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        found = fields.pop("format_version")
        if found != version:
            raise UserError(
                f"{path}: prepared in format version {found}, and this h3lm reads version "
                f"{version}: prepare the data again"
            )
        yield fields
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent}: {missing}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}): prepare the data again"
        ) from None


@dataclass(frozen=True)
class File:
    """A file of a prepared folder, as it was written."""

    name: str
    bytes: int
    sha256: str

    def check(self, folder: Path, *, contents: bool) -> None:
        """Compare the file's size, and its contents if asked, with what was written.

        Raises:
            UserError: if the file is missing, truncated or altered.
        """
        path = folder / self.name
        remedy = "prepare the data again, or copy this file again"
        found = self.sha256
        try:
            size = path.stat().st_size
            if contents and size == self.bytes:
                with path.open("rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
        if size != self.bytes:
            ends = f", it ends at offset {size:,}" if size < self.bytes else ""
            raise UserError(
                f"{path}: truncated or altered: {size:,} bytes instead of {self.bytes:,}{ends}: "
                f"{remedy}"
            )
        if found != self.sha256:
            raise UserError(
                f"{path}: altered: its sha256 is {found[:12]}... instead of "
                f"{self.sha256[:12]}...: {remedy}"
            )


def check_contents(files: Iterable[File], folder: str | Path) -> None:
    """Read files and compare their sha256, several at a time: hashing lets go of Python's lock.

    Raises:
        UserError: naming the first file that is missing, truncated or altered.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        waiting = [pool.submit(file.check, Path(folder), contents=True) for file in files]
        try:
            for done in waiting:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Shard:
    """A stretch of a split's stream: two files.

    Attributes:
        num_tokens: Tokens in it.
        num_documents: Documents that end in it.
        max_token: The largest id in it.
        tokens: The file of the tokens.
        documents: The file of the documents' ends.
    """

    num_tokens: int
    num_documents: int
    max_token: int
    tokens: File
    documents: File

    @classmethod
    def from_json(cls, fields: dict) -> Self:
        """Read what `dataclasses.asdict` made of a shard."""
        files = {name: File(**fields[name]) for name in ("tokens", "documents")}
        return cls(**(fields | files))


@dataclass(frozen=True)
class Index:
    """What a prepared folder holds: the contents of `index.json`.

    Attributes:
        settings: Everything that decides the bytes: tokenizer, source text by its sha256, shares.
        block_length: The block length it was prepared for, the default of `Blocks`.
        dtype: `uint16` or `uint32`.
        vocab_size: Number of ids of the tokenizer.
        tokenizer_files: The files of the tokenizer, with names relative to the folder.
        splits: The shards of each split in order.
    """

    settings: dict
    block_length: int
    dtype: str
    vocab_size: int
    tokenizer_files: tuple[File, ...]
    splits: dict[str, tuple[Shard, ...]]

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the index of a prepared folder.

        Raises:
            UserError: if the folder holds no prepared data, unfinished data, data of another
                format version, or a damaged index.
        """
        path = Path(folder) / INDEX_FILE
        missing = f"no prepared data here (no {INDEX_FILE}): make it with h3lm prepare"
        if (Path(folder) / UNFINISHED_FILE).exists():
            missing = "this preparation was not finished: run the same h3lm prepare again"
        with reading_index(path, FORMAT_VERSION, missing) as fields:
            fields["tokenizer_files"] = tuple(File(**file) for file in fields["tokenizer_files"])
            fields["splits"] = {
                split: tuple(map(Shard.from_json, shards))
                for split, shards in fields["splits"].items()
            }
            return cls(**fields)

    def to_json(self) -> str:
        """Return the text of `index.json`, the same for the same contents."""
        return json.dumps({"format_version": FORMAT_VERSION} | asdict(self), indent=1) + "\n"

    def num_tokens(self, split: str) -> int:
        """Count the tokens of a split."""
        return sum(shard.num_tokens for shard in self.splits[split])

    def num_documents(self, split: str) -> int:
        """Count the documents of a split."""
        return sum(shard.num_documents for shard in self.splits[split])

    def verify(self, folder: str | Path) -> None:
        """Read every file and compare its sha256.

        Raises:
            UserError: naming the first file that is missing, truncated or altered.
        """
        check_contents(self.files(), folder)

    def fingerprint(self, split: str) -> str:
        """What tells a split's tokens and their meaning from any others, wherever they lie."""
        digest = hashlib.sha256(f"{self.dtype} {self.vocab_size}".encode())
        shards = self.splits[split]
        files = [file for shard in shards for file in (shard.tokens, shard.documents)]
        for file in (*self.tokenizer_files, *files):
            digest.update(file.sha256.encode())
        return digest.hexdigest()

    def files(self) -> Iterator[File]:
        """Go through all files that the index speaks of."""
        yield from self.tokenizer_files
        for shards in self.splits.values():
            for shard in shards:
                yield shard.tokens
                yield shard.documents


class Maps:
    """Memory maps of files of prepared data; those not used for longest are let go.

    What they hold in common, file descriptors and address space, is the process's: streams that are
    read together share one.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, NDArray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def open(self, path: Path, dtype: np.dtype, length: int) -> NDArray:
        """Map a file, checking that it holds the array that the index promises.

        Raises:
            UserError: if it does not.
        """
        array = self._kept.get(path)
        if array is None:
            array = self._kept[path] = self._map(path, dtype, length)
            while len(self) > 1 and (
                len(self) > _MAPS_KEPT_OPEN
                or sum(kept.nbytes for kept in self._kept.values()) > _BYTES_KEPT_MAPPED
            ):
                self._kept.popitem(last=False)
        self._kept.move_to_end(path)
        return array

    def _map(self, path: Path, dtype: np.dtype, length: int) -> NDArray:
        try:
            array = cast(NDArray, np.load(path, mmap_mode="r" if length else None))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}): prepare the data again") from None
        if array.dtype != dtype or array.shape != (length,):
            raise UserError(
                f"{path}: holds {array.dtype} of shape {array.shape} instead of {dtype} of "
                f"shape {(length,)}: prepare the data again"
            )
        return array

    def __getstate__(self) -> dict:
        # Worker processes of a data loader map the files anew: a pickled map would be a copy.
        return {"_kept": OrderedDict()}


class TokenStream:
    """One split of a prepared folder, as a sequence of all its tokens.

    Opening checks that every file is there and has its size; `verify` checks the contents.

    Args:
        folder: Where `h3lm prepare` wrote.
        split: `train`, `valid`, `test`, or what else the source had.

    Raises:
        UserError: if there is no such split, or a file is missing or has another size.

    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder, self.split = Path(folder), split
        self.index = Index.load(folder)
        if split not in self.index.splits:
            found = ", ".join(self.index.splits)
            raise UserError(f"{folder}: no split {split!r} here, only {found}")
        self.shards = self.index.splits[split]
        for shard in self.shards:
            shard.tokens.check(self.folder, contents=False)
            shard.documents.check(self.folder, contents=False)
        sizes = [shard.num_tokens for shard in self.shards]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.maps = Maps()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, position: int) -> int: ...
    @overload
    def __getitem__(self, position: slice) -> NDArray[np.int64]: ...
    def __getitem__(self, position: int | slice) -> int | NDArray[np.int64]:
        """Return one token, or a stretch of them as a new array (n,), int64, of step 1."""
        if isinstance(position, slice):
            start, stop, step = position.indices(len(self))
            if step != 1:
                raise ValueError(f"a stretch of tokens has step 1, not {step}")
            return self._read(start, max(start, stop))
        start = position + len(self) if position < 0 else position
        if not 0 <= start < len(self):
            raise IndexError(f"token {position} of {len(self)}")
        return int(self._read(start, start + 1)[0])

    def document_ends(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return where documents end: every e, start < e <= stop, such that token e - 1 is a last.

        Args:
            start: First position, 0 <= start <= stop.
            stop: One past the last position, at most the length.

        Returns:
            (number of ends,), int64, counted from the stream's beginning, rising.
        """
        found = [np.zeros(0, np.int64)]
        for i, low, high in self._spans(start, stop):
            ends = self._open(
                self.shards[i].documents, np.dtype(np.uint32), self.shards[i].num_documents
            )
            # Keys of another type would have the whole array converted.
            first, last = np.searchsorted(ends, np.array([low, high], ends.dtype), side="right")
            found.append(ends[first:last].astype(np.int64) + self._starts[i])
        return np.concatenate(found)

    @property
    def max_token(self) -> int:
        """The largest id in the split."""
        return max((shard.max_token for shard in self.shards), default=-1)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that a model of so many embedding rows can read every token.

        Raises:
            UserError: if an id is `vocab_size` or more.
        """
        if self.max_token >= vocab_size:
            raise UserError(
                f"{self.folder}: the {self.split} tokens go up to id {self.max_token}, but the "
                f"model's vocab_size is {vocab_size}: it must be at least {self.index.vocab_size}, "
                "the size of the tokenizer there"
            )

    def verify(self) -> None:
        """Read the files of this split and compare their sha256.

        Raises:
            UserError: naming the first file that is missing, truncated or altered.
        """
        files = (file for shard in self.shards for file in (shard.tokens, shard.documents))
        check_contents(files, self.folder)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies, for `AutoTokenizer.from_pretrained`."""
        return self.folder / TOKENIZER_FOLDER

    def _read(self, start: int, stop: int) -> NDArray[np.int64]:
        dtype = np.dtype(self.index.dtype)
        tokens = np.empty(stop - start, np.int64)
        filled = 0
        for i, low, high in self._spans(start, stop):
            stored = self._open(self.shards[i].tokens, dtype, self.shards[i].num_tokens)
            tokens[filled : filled + high - low] = stored[low:high]
            filled += high - low
        return tokens

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first, one past the last), counted within the shard, for a stretch."""
        i = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            begin, end = int(self._starts[i]), int(self._starts[i + 1])
            yield i, start - begin, min(stop, end) - begin
            start = end
            i += 1

    def _open(self, file: File, dtype: np.dtype, length: int) -> NDArray:
        return self.maps.open(self.folder / file.name, dtype, length)


class Block(NamedTuple):
    """A training example.

    Attributes:
        tokens: (L + 1,), int64: the inputs are `tokens[:-1]`, the targets `tokens[1:]`.
        document_starts: Rising int64 positions 0 < p < L where `tokens[p]` begins a document;
            what stands before the first belongs to a document begun in an earlier block, or here.
    """

    tokens: NDArray[np.int64]
    document_starts: NDArray[np.int64]

    def position_ids(self) -> NDArray[np.int64]:
        """Count the inputs from 0, anew in each document.

        Returns:
            (L,), int64.
        """
        positions = np.arange(len(self.tokens) - 1)
        starts = np.zeros_like(positions)
        starts[self.document_starts] = self.document_starts
        return positions - np.maximum.accumulate(starts)


class Blocks:
    """A split cut into blocks of L inputs, whose targets are the next tokens.

    Block i covers the tokens i L to i L + L inclusive: the last token of a block is the first of
    the next, so that every token but the first is a target once. The partial block at the end is
    dropped. Source: paper appendix and release, The Pile's data module (documents with the end of
    text, concatenated, overlap of one token).

    A sequence for any sampler: `len`, indexing from both ends, iteration, pickling.

    Args:
        folder: Where `h3lm prepare` wrote.
        split: `train`, `valid`, `test`, or what else the source had.
        block_length: L; the one that the data were prepared for, if None.

    Raises:
        UserError: as `TokenStream`, and if the split is shorter than one block.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", block_length: int | None = None
    ) -> None:
        self.stream = TokenStream(folder, split)
        self.block_length = self.stream.index.block_length if block_length is None else block_length
        check_block_length(self.block_length)
        if not len(self):
            raise UserError(too_short(split, len(self.stream), self.block_length))

    def __len__(self) -> int:
        return max(0, (len(self.stream) - 1) // self.block_length)

    def __getitem__(self, i: int) -> Block:
        """Read block i, 0 <= i < len, or from the end if negative."""
        block = i + len(self) if i < 0 else i
        if not 0 <= block < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        start = block * self.block_length
        tokens = self.stream[start : start + self.block_length + 1]
        starts = self.stream.document_ends(start, start + self.block_length - 1) - start
        return Block(tokens, starts)


def check_block_length(block_length: int) -> None:
    """Raise UserError unless a block has at least one input."""
    if block_length < 1:
        raise UserError(f"block_length={block_length} must be at least 1")


def too_short(split: str, num_tokens: int, block_length: int) -> str:
    """Say that a split is shorter than one block."""
    return (
        f"the {split} text is shorter than a block: {num_tokens:,} tokens, and a block of "
        f"block_length={block_length:,} needs {block_length + 1:,}: take a shorter block or "
        "more text"
    )
