"""From a text collection to a prepared folder: tokens in shards, with an index.

The source is read first whole, to count, to hash and to find what is wrong with it before any work
is done, and then once for each thing made of it; reading is far cheaper than encoding. Pieces are
encoded by threads (the tokenizers' library lets go of Python's lock; of 400 ms for a MB of text, 8
are spent in Python) and written in their order, so that the bytes depend on neither the number of
workers nor interruptions.
"""

import errno
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

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
)
from h3lm.data.lock import LOCK_FILE, only_writer
from h3lm.data.shards import Journal, ShardWriter, journal_lines, write_text
from h3lm.data.sources import Piece, open_source
from h3lm.data.splits import Part, Survey, plan_splits, survey_split
from h3lm.data.tokenizers import END_OF_TEXT, Encoder, load_tokenizer, train_bpe
from h3lm.errors import NO_SPACE, UserError

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedTokenizerFast

# Texts for the training of a BPE, which holds 256 of them in memory.
_TRAINING_CHARACTERS = 2**14


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
        workers: Threads that encode, about 40 MB each; as many as there are processors for this
            process if None, but 32 at most.
        progress: Whether to show a progress line on standard error.

    Returns:
        The index, as written to `index.json`.

    Raises:
        UserError: for whatever is wrong with the source, the settings, the output folder or the
            room on the disk, or if another process prepares there. Finished shards are kept.
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

    place = Path(source).expanduser()
    if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
        raise UserError(f"{out}: lies in the source, and would be read as text: take another place")
    text = open_source(source, text_field=text_field, subset=subset)
    separator = given.eos_token if given is not None else END_OF_TEXT
    with (
        _progress_line(progress) as line,
        _room_on_disk(out),
        only_writer(out, "another h3lm prepare"),
    ):
        surveys = {
            split: survey_split(text, split, separator, learned == "characters", line)
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

        journal = Journal.open(out, settings)
        plan = plan_splits(text, surveys, separator, valid_fraction, seed)
        if learned is not None:
            line.add_task(f"learning the tokenizer ({learned})", total=None)
            given = _learned_tokenizer(out, learned, vocab_size, surveys, plan)
        assert given is not None
        files = _save_tokenizer(out, given)
        ids = _vocabulary_size(given)
        dtype = np.dtype(np.uint16 if ids <= 2**16 else np.uint32)
        threads = workers or _processors()
        splits = {
            split: _encode_split(
                part, journal, _PieceEncoder(given, dtype), shard_tokens, threads, line
            )
            for split, part in plan.items()
        }
        index = Index(settings, block_length, dtype.name, ids, files, splits)
        _check_lengths(index)
        write_text(out / INDEX_FILE, index.to_json())
        journal.close()
    return index


def _processors() -> int:
    """Threads that encode by default: with many more, Python's lock is what they wait for."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(found or 1, 32)


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


def _learned_tokenizer(
    out: Path,
    name: str,
    vocab_size: int | None,
    surveys: dict[str, Survey],
    plan: dict[str, Part],
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


def _encode_split(
    part: Part,
    journal: Journal,
    encode: _PieceEncoder,
    shard_tokens: int,
    threads: int,
    line: "Progress",
) -> tuple[Shard, ...]:
    """Encode what of a split is not in whole shards yet."""
    shards, place = journal.whole_shards(part.name)
    writer = ShardWriter(part.name, journal, shard_tokens, shards)
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
    elif lines := journal_lines(out):
        if len(lines) == 1:
            return  # begun, but nothing is finished that other settings would lose
        if lines[0].get("format_version") != FORMAT_VERSION:
            raise UserError(f"{out}: begun by another version of h3lm: delete it or take another")
        found = lines[0]["settings"]
    elif names - {UNFINISHED_FILE, LOCK_FILE}:
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
            there, now = ("not set" if value is None else value for value in (there, now))
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
        write_text(path, index.to_json())
    return index


def _check_lengths(index: Index) -> None:
    for split in index.splits:
        if index.num_tokens(split) <= index.block_length:
            more = ", or hold out more with --valid-fraction" if split == "valid" else ""
            raise UserError(too_short(split, index.num_tokens(split), index.block_length) + more)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _room_on_disk(out: Path) -> Iterator[None]:
    """Turn a failure to write into one line that says what to do."""
    try:
        yield
    except OSError as error:
        what = "no space left" if error.errno in NO_SPACE else "cannot be written"
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
