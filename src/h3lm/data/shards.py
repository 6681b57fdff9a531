"""The writing of shards, such that what is written survives any interruption.

A shard is written aside and renamed, then noted in `unfinished.jsonl` with the place in the text
where the next one begins. That file's first line holds the settings. The index comes last and
takes its place.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Self

import numpy as np
from numpy.typing import NDArray

from h3lm.data.blocks import (
    FORMAT_VERSION,
    INDEX_FILE,
    TOKENIZER_FOLDER,
    UNFINISHED_FILE,
    File,
    Shard,
)
from h3lm.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where in a split's pieces a shard ends.

    Attributes:
        piece: The piece's number, from 0.
        used: How many of its tokens are in the shard or before.
    """

    piece: int
    used: int


class ShardWriter:
    """Collects the tokens of a split and writes a shard whenever one is full.

    Args:
        split: The split's name.
        journal: Where whole shards are noted; it knows the folder.
        shard_tokens: Tokens of every shard but the last.
        shards: The shards that there are already.
    """

    def __init__(
        self,
        split: str,
        journal: "Journal",
        shard_tokens: int,
        shards: list[Shard],
    ) -> None:
        self.split, self.journal = split, journal
        self.shard_tokens = shard_tokens
        self.shards = shards
        self._arrays: list[NDArray] = []
        self._held = 0
        self._ends: list[int] = []
        self._place = Place(0, 0)

    def add(self, tokens: NDArray, ends_document: bool, piece: int, used: int) -> None:
        """Take a piece's tokens from `used` on; the piece may end a document."""
        while used < len(tokens):
            taken = tokens[used : used + self.shard_tokens - self._held]
            self._arrays.append(taken)
            self._held += len(taken)
            used += len(taken)
            if ends_document and used == len(tokens):
                self._ends.append(self._held)
            self._place = Place(piece, used)
            if self._held == self.shard_tokens:
                self._write()

    def finish(self) -> tuple[Shard, ...]:
        """Write what is left, and return all shards."""
        if self._held:
            self._write()
        return tuple(self.shards)

    def _write(self) -> None:
        stem = self.journal.folder / f"{self.split}-{len(self.shards):05d}"
        tokens = np.concatenate(self._arrays)
        shard = Shard(
            num_tokens=len(tokens),
            num_documents=len(self._ends),
            max_token=int(tokens.max()),
            tokens=write_array(stem.with_name(f"{stem.name}.tokens.npy"), tokens),
            documents=write_array(
                stem.with_name(f"{stem.name}.documents.npy"), np.array(self._ends, np.uint32)
            ),
        )
        self.journal.note(self.split, shard, self._place)
        self.shards.append(shard)
        self._arrays, self._held, self._ends = [], 0, []


class Journal:
    """`unfinished.jsonl`: the settings, then a line for every whole shard."""

    def __init__(self, folder: Path, lines: list[dict]) -> None:
        self.folder = folder
        self._lines = lines

    @classmethod
    def open(cls, folder: Path, settings: dict) -> Self:
        """Go on with the journal of an interrupted run, or begin one."""
        for left in folder.glob("*.part"):
            if left.is_file():
                left.unlink()
        # Where there is an index, it is a damaged one, and everything is made again.
        damaged = (folder / INDEX_FILE).exists()
        old = [] if damaged else journal_lines(folder)
        lines = [{"format_version": FORMAT_VERSION, "settings": settings}]
        if len(old) < 2 and old != lines:
            shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
        lines += _up_to_damage(folder, old[1:])
        # Written anew: neither a line that a crash cut short nor one of a damaged shard may stand
        # before those to come.
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(folder / UNFINISHED_FILE, text)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        return cls(folder, lines)

    def whole_shards(self, split: str) -> tuple[list[Shard], Place]:
        """Return the whole shards of a split, and the place where the last of them ends."""
        lines = [line for line in self._lines[1:] if line["split"] == split]
        place = Place(**lines[-1]["place"]) if lines else Place(0, 0)
        return [Shard.from_json(line["shard"]) for line in lines], place

    def note(self, split: str, shard: Shard, place: Place) -> None:
        """Note a shard that has its final name."""
        line = {"split": split, "shard": asdict(shard), "place": asdict(place)}
        with (self.folder / UNFINISHED_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Remove the journal, once the index is there."""
        (self.folder / UNFINISHED_FILE).unlink()


def _up_to_damage(folder: Path, lines: list[dict]) -> Iterator[dict]:
    """Yield the lines whose shards are whole, of each split up to the first that is not."""
    broken = set()
    for line in lines:
        if line["split"] in broken:
            continue
        shard = Shard.from_json(line["shard"])
        try:
            shard.tokens.check(folder, contents=True)
            shard.documents.check(folder, contents=True)
        except UserError:
            broken.add(line["split"])
        else:
            yield line


def journal_lines(folder: Path) -> list[dict]:
    """Read a journal up to a line that was cut short; empty if there is none."""
    lines = []
    try:
        for text in (folder / UNFINISHED_FILE).read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(text))
    except (FileNotFoundError, ValueError):
        pass
    return lines


def write_array(path: Path, array: NDArray) -> File:
    """Write a one-dimensional array as .npy, aside first and then under its name.

    Raises:
        OSError: as the operating system gives it, with its number; nothing is left behind.
    """
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
    digest = hashlib.sha256()
    with _aside(path) as stream:
        # numpy's own writing of the data loses the error number when the disk is full.
        for part in (buffer.getbuffer(), np.ascontiguousarray(array).view(np.uint8).data):
            stream.write(part)
            digest.update(part)
        size = stream.tell()
    return File(path.name, size, digest.hexdigest())


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, aside first and then under its name.

    Raises:
        OSError: as the operating system gives it, with its number; nothing is left behind.
    """
    with _aside(path) as stream:
        stream.write(text.encode())


@contextmanager
def _aside(path: Path) -> Iterator[IO[bytes]]:
    """Open a file under another name; on the disk, it gets its own: what has the name is whole."""
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
