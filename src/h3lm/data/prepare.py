"""From a text collection to a prepared folder: tokens in shards, with an index.

The source is read two times and once more for each further thing that needs it: first whole, to
count, to hash and to find what is wrong with it before any work is done; then split by split, to
encode. Reading is far cheaper than encoding. Pieces are encoded by threads (the tokenizers'
library lets go of Python's lock; of 400 ms for a MB of text, 8 are spent in Python) and written in
their order, so that the bytes depend on neither the number of workers nor interruptions.

A shard is written aside and renamed, then noted in `unfinished.jsonl` with the place in the text
where the next one begins. That file's first line holds the settings. The index comes last and
takes its place.
"""

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from h3lm.data.blocks import (
    FORMAT_VERSION,
    INDEX_FILE,
    TOKENIZER_FOLDER,
    UNFINISHED_FILE,
    File,
    Index,
    Shard,
    check_block_length,
    too_short,
    write_array,
)
from h3lm.data.sources import Piece, Source, open_source, pieces
from h3lm.data.tokenizers import END_OF_TEXT, Encoder, load_tokenizer, train_bpe
from h3lm.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedTokenizerFast

# The Pile's, of documents. It is meant for millions of them: of fewer, 50 or a tenth.
VALID_FRACTION_OF_DOCUMENTS = 0.0005
VALID_DOCUMENTS = 50
# Of a text alone, whose end is taken, and the most that is taken of few documents.
VALID_FRACTION_OF_A_TEXT = 0.1

# Texts for the training of a BPE, which holds 256 of them in memory.
_TRAINING_CHARACTERS = 2**14

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(
    source: str | Path,
    out_dir: str | Path,
    *,
    tokenizer: "str | Path | PreTrainedTokenizerFast" = "bytes",
    vocab_size: int | None = None,
    text_field: str = "text",
    subset: str | None = None,
    block_length: int = 1024,
    valid_fraction: float | None = None,
    seed: int = 2357,
    shard_tokens: int = 2**22,
    workers: int | None = None,
    progress: bool = True,
) -> Index:
    """Tokenize a text collection into a folder that `Blocks` and `TokenStream` read.

    Every document is closed by the tokenizer's end of text, if it has one. The same text and
    settings give the same bytes. Interrupted, even by kill -9, it goes on where the last whole
    shard ended when it is called again in the same way. Memory does not grow with the collection,
    but for its longest document.

    Where the source has training text but no validation text, some is held out: of several
    documents a random choice (at least one), of a single one its end.

    Args:
        source: A file, a folder, or the name of a Hugging Face dataset; see `open_source`.
        out_dir: Where to write: a new or empty folder, or one that was prepared in the same way.
        tokenizer: `characters`, `bytes`, `bpe` (trained on the training text), what else
            `load_tokenizer` takes, or a tokenizer.
        vocab_size: Number of ids of a `bpe`.
        text_field: The field or column that holds the text.
        subset: Which configuration of a Hugging Face dataset.
        block_length: The block length to record as the default, which every split must hold.
        valid_fraction: Share to hold out, in [0, 1); 0 for none. If None, 0.0005 of the documents
            as for The Pile, but at least 50 or a tenth of them; of a single one the last tenth.
        seed: Which documents are held out.
        shard_tokens: Tokens of a shard; that much work is lost by an interruption at most.
        workers: Threads that encode; as many as there are processors if None.
        progress: Whether to show a progress line on standard error.

    Returns:
        The index, as written to `index.json`.

    Raises:
        UserError: for whatever is wrong with the source, the settings, the output folder or the
            room on the disk. Finished shards are kept.
    """
    check_block_length(block_length)
    _check_settings(tokenizer, vocab_size, valid_fraction, shard_tokens, workers)
    out = Path(out_dir).expanduser()
    named = tokenizer if isinstance(tokenizer, str) else None
    learned = named if named in ("characters", "bpe") else None
    given = None if learned else _load(tokenizer)
    settings: dict = {
        "tokenizer": _tokenizer_settings(learned, given, vocab_size),
        "text_field": text_field,
        "valid_fraction": valid_fraction,
        "seed": seed,
        "shard_tokens": shard_tokens,
    }
    _check_output(out, settings)  # at once, before the source is read

    if out.resolve().is_relative_to(Path(source).expanduser().resolve()):
        raise UserError(f"{out}: lies in the source, and would be read as text: take another place")
    text = open_source(source, text_field=text_field, subset=subset)
    separator = given.eos_token if given is not None else END_OF_TEXT
    with _progress_line(progress) as line, _room_on_disk(out):
        surveys = {
            split: _survey(text, split, separator, learned == "characters", line)
            for split in text.splits
        }
        surveys = {split: survey for split, survey in surveys.items() if survey.documents}
        if not surveys:
            raise UserError(f"{source}: the corpus is empty: there is no text in it")
        settings["source"] = {split: survey.identity() for split, survey in surveys.items()}
        _check_output(out, settings)
        done = _finished(out, block_length)
        if done is not None:
            return done

        journal = _Journal.open(out, settings)
        plan = _plan(text, surveys, separator, valid_fraction, seed)
        if learned is not None:
            line.add_task(f"learning the tokenizer ({learned})", total=None)
            given = _learned_tokenizer(out, learned, vocab_size, surveys, plan)
        assert given is not None
        files = _save_tokenizer(out, given)
        ids = _vocabulary_size(given)
        dtype = np.dtype(np.uint16 if ids <= 2**16 else np.uint32)
        threads = workers or os.cpu_count() or 1
        splits = {
            split: _encode_split(
                part, journal, _PieceEncoder(given, dtype), shard_tokens, threads, line
            )
            for split, part in plan.items()
        }
        index = Index(settings, block_length, dtype.name, ids, files, splits)
        _check_lengths(index)
        _write_text(out / INDEX_FILE, index.to_json())
        journal.close()
    return index


def _check_settings(
    tokenizer: object,
    vocab_size: int | None,
    valid_fraction: float | None,
    shard_tokens: int,
    workers: int | None,
) -> None:
    if valid_fraction is not None and not 0 <= valid_fraction < 1:
        raise UserError(f"valid_fraction={valid_fraction} must be at least 0 and below 1")
    if shard_tokens < 1 or shard_tokens >= 2**32:
        raise UserError(f"shard_tokens={shard_tokens} must be at least 1 and below 2**32")
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    if (vocab_size is None) == (tokenizer == "bpe"):
        raise UserError(
            "the tokenizer 'bpe' needs a vocab_size"
            if vocab_size is None
            else "vocab_size is for the tokenizer 'bpe'; the others have their own"
        )


def _load(tokenizer: "str | Path | PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer


def _tokenizer_settings(
    learned: str | None, given: "PreTrainedTokenizerFast | None", vocab_size: int | None
) -> dict:
    if given is None:
        return {"name": learned} | ({} if vocab_size is None else {"vocab_size": vocab_size})
    state = given.backend_tokenizer.to_str().encode()
    return {"sha256": hashlib.sha256(state).hexdigest(), "end_of_text": given.eos_token}


def _vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return one more than the largest id: the rows that an embedding needs at least."""
    return max(tokenizer.get_vocab().values()) + 1


@dataclass
class _Survey:
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


def _survey(
    source: Source, split: str, separator: str | None, alphabet: bool, line: "Progress"
) -> _Survey:
    survey = _Survey()
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
class _Part:
    """One split of the output: its name, its pieces, and how many characters they have."""

    name: str
    pieces: Callable[[], Iterator[Piece]]
    characters: int | None


def _plan(
    source: Source,
    surveys: dict[str, _Survey],
    separator: str | None,
    valid_fraction: float | None,
    seed: int,
) -> dict[str, _Part]:
    """Say which text becomes which split, holding some out for validation if need be."""

    def read(split: str) -> Iterator[Piece]:
        return pieces(source.documents(split), separator)

    def whole(split: str) -> _Part:
        return _Part(split, lambda: read(split), surveys[split].characters)

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
            name: _Part(name, lambda a=a, b=b: _stretch(read("train"), a, b), b - a)  # type: ignore[misc]
            for name, (a, b) in halves.items()
        }
    else:
        chosen = _choose(train.documents, _held_out(train.documents, valid_fraction), seed)
        held_out = {
            # The characters of the training text are those of all the documents, nearly.
            name: _Part(name, lambda take=take: _chosen(read("train"), chosen, take), characters)  # type: ignore[misc]
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


def _learned_tokenizer(
    out: Path,
    name: str,
    vocab_size: int | None,
    surveys: dict[str, _Survey],
    plan: dict[str, _Part],
) -> "PreTrainedTokenizerFast":
    """Make the tokenizer that comes from the text, or take the one that an earlier run made."""
    if (out / TOKENIZER_FOLDER).is_dir():
        return load_tokenizer(out / TOKENIZER_FOLDER)
    if name == "characters":
        alphabet = set().union(*(survey.alphabet for survey in surveys.values()))
        return load_tokenizer("characters", corpus=alphabet)
    assert vocab_size is not None
    part = plan.get("train") or next(iter(plan.values()))
    texts = (
        piece.text[start : start + _TRAINING_CHARACTERS]
        for piece in part.pieces()
        for start in range(0, len(piece.text), _TRAINING_CHARACTERS)
    )
    return train_bpe(texts, vocab_size)


def _save_tokenizer(out: Path, tokenizer: "PreTrainedTokenizerFast") -> tuple[File, ...]:
    folder = out / TOKENIZER_FOLDER
    if not folder.is_dir():
        aside = out / f"{TOKENIZER_FOLDER}.part"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            tokenizer.save_pretrained(aside)
        except OSError:
            raise
        except Exception as error:  # the Rust library raises plain Exception
            raise OSError(str(error)) from error
        aside.replace(folder)
    return tuple(
        File(f"{TOKENIZER_FOLDER}/{path.name}", path.stat().st_size, _sha256(path))
        for path in sorted(folder.iterdir())
    )


class _PieceEncoder:
    """A piece to its tokens, the end of text included, in the stored type."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", dtype: np.dtype) -> None:
        self.dtype = dtype
        self._encode = Encoder(tokenizer)
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def __call__(self, piece: Piece) -> NDArray:
        try:
            ids = self._encode(piece.text)
        except UserError as error:
            raise UserError(f"{piece.where}: {error}") from None
        return np.concatenate([ids, self._end if piece.ends_document else []]).astype(self.dtype)


@dataclass(frozen=True)
class _Place:
    """Where in a split's pieces a shard ends: tokens used of a piece, counted from 0."""

    piece: int
    used: int


def _encode_split(
    part: _Part,
    journal: "_Journal",
    encode: _PieceEncoder,
    shard_tokens: int,
    threads: int,
    line: "Progress",
) -> tuple[Shard, ...]:
    """Encode what of a split is not in whole shards yet."""
    shards, place = journal.whole_shards(part.name)
    writer = _ShardWriter(part.name, journal, encode.dtype, shard_tokens, shards)
    task = line.add_task(f"encoding {part.name}", total=part.characters)

    def remaining() -> Iterator[tuple[int, Piece]]:
        for number, piece in enumerate(part.pieces()):
            if number < place.piece:
                line.advance(task, len(piece.text))
            else:
                yield number, piece

    with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
        waiting: deque[tuple[int, Piece, Future[NDArray]]] = deque()

        def write_first() -> None:
            number, piece, future = waiting.popleft()
            used = place.used if number == place.piece else 0
            writer.add(future.result(), piece.ends_document, number, used)
            line.advance(task, len(piece.text))

        try:
            for number, piece in remaining():
                waiting.append((number, piece, pool.submit(encode, piece)))
                # Enough that no thread waits, and no more: texts in hand are memory.
                if len(waiting) > 2 * threads:
                    write_first()
            while waiting:
                write_first()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    line.update(task, total=line.tasks[task].completed)
    return writer.finish()


class _ShardWriter:
    """Collects the tokens of a split and writes a shard whenever one is full."""

    def __init__(
        self,
        split: str,
        journal: "_Journal",
        dtype: np.dtype,
        shard_tokens: int,
        shards: list[Shard],
    ) -> None:
        self.split, self.journal = split, journal
        self.dtype, self.shard_tokens = dtype, shard_tokens
        self.shards = shards
        self._arrays: list[NDArray] = []
        self._held = 0
        self._ends: list[int] = []
        self._place = _Place(0, 0)

    def add(self, tokens: NDArray, ends_document: bool, piece: int, used: int) -> None:
        """Take a piece's tokens from `used` on; the piece may end a document."""
        while used < len(tokens):
            taken = tokens[used : used + self.shard_tokens - self._held]
            self._arrays.append(taken)
            self._held += len(taken)
            used += len(taken)
            if ends_document and used == len(tokens):
                self._ends.append(self._held)
            self._place = _Place(piece, used)
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


class _Journal:
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
        old = [] if damaged else _journal_lines(folder)
        if not old:
            shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
        lines = [{"format_version": FORMAT_VERSION, "settings": settings}]
        lines += _up_to_damage(folder, old[1:])
        # Written anew: neither a line that a crash cut short nor one of a damaged shard may stand
        # before those to come.
        text = "".join(json.dumps(line) + "\n" for line in lines)
        _write_text(folder / UNFINISHED_FILE, text)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        return cls(folder, lines)

    def whole_shards(self, split: str) -> tuple[list[Shard], _Place]:
        """Return the whole shards of a split, and the place where the last of them ends."""
        lines = [line for line in self._lines[1:] if line["split"] == split]
        place = _Place(**lines[-1]["place"]) if lines else _Place(0, 0)
        return [Shard.from_json(line["shard"]) for line in lines], place

    def note(self, split: str, shard: Shard, place: _Place) -> None:
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


def _journal_lines(folder: Path) -> list[dict]:
    """Read a journal up to a line that was cut short; empty if there is none."""
    lines = []
    try:
        for text in (folder / UNFINISHED_FILE).read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(text))
    except (FileNotFoundError, ValueError):
        pass
    return lines


def _check_output(out: Path, settings: dict) -> None:
    """Make the folder, or find that what is in it was begun with these settings.

    Raises:
        UserError: if it cannot be made, holds other things, or was prepared in another way.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in out.iterdir() if path.suffix != ".part"}
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{out}: cannot be written as a folder ({error.strerror})") from None
    if INDEX_FILE in names:
        try:
            found = Index.load(out).settings
        except UserError as error:
            raise UserError(f"{error} (into another folder, or delete this one)") from None
    elif lines := _journal_lines(out):
        if lines[0].get("format_version") != FORMAT_VERSION:
            raise UserError(f"{out}: begun by another version of h3lm: delete it or take another")
        found = lines[0]["settings"]
    elif names - {UNFINISHED_FILE}:
        raise UserError(
            f"{out}: is not empty and holds no prepared data: take a new folder, or empty it"
        )
    else:
        return
    differences = list(_differences(found, settings))
    if differences:
        raise UserError(
            f"{out}: prepared with other settings: {'; '.join(differences)}: take another folder, "
            "or delete this one"
        )


def _differences(found: dict, wanted: dict, name: str = "") -> Iterator[str]:
    """Say for every setting of both sides that differs what it is there and now."""
    for key in [key for key in found if key in wanted] if not name else {**found, **wanted}:
        there, now = found.get(key), wanted.get(key)
        if isinstance(there, dict) and isinstance(now, dict):
            yield from _differences(there, now, f"{name}{key} ")
        elif there != now:
            yield f"{name}{key} is {there} there and {now} now"


def _finished(out: Path, block_length: int) -> Index | None:
    """Return the index of a whole folder; of a damaged one take the index away."""
    path = out / INDEX_FILE
    if not path.exists():
        return None
    index = Index.load(out)
    try:
        index.verify(out)
    except UserError:
        return None
    (out / UNFINISHED_FILE).unlink(missing_ok=True)  # left by a crash at the very end
    if index.block_length != block_length:
        fields = {name: getattr(index, name) for name in Index.__dataclass_fields__}
        index = Index(**(fields | {"block_length": block_length}))
        _check_lengths(index)
        _write_text(path, index.to_json())
    return index


def _check_lengths(index: Index) -> None:
    for split in index.splits:
        if index.num_tokens(split) <= index.block_length:
            more = ", or hold out more with --valid-fraction" if split == "valid" else ""
            raise UserError(too_short(split, index.num_tokens(split), index.block_length) + more)


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _room_on_disk(out: Path) -> Iterator[None]:
    """Turn a failure to write into one line that says what to do."""
    try:
        yield
    except OSError as error:
        what = "no space left" if error.errno in _NO_SPACE else "cannot be written"
        raise UserError(
            f"{out}: {what} ({error.strerror or error}); the finished shards are kept: make room "
            "and run the same again"
        ) from error


@contextmanager
def _progress_line(show: bool) -> Iterator["Progress"]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class Characters(ProgressColumn):
        """Millions of characters, and how many a second on the average."""

        def render(self, task: Task) -> Text:
            speed = task.completed / task.elapsed if task.elapsed else 0.0
            return Text(f"{task.completed / 1e6:,.1f} M chars {speed / 1e6:,.1f} M/s")

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        Characters(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show,
    ) as line:
        yield line
