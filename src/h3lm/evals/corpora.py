"""Texts that the literature knows by name, and folders of text, with the convention of each.

A name says which split is scored, what a figure is counted in (words, tokens, bytes, characters),
and whether documents follow each other with an end of text between.
"""

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import IO

from h3lm.data.sources import Document, FileSource, pieces
from h3lm.errors import UserError

_FORMS = ("", ".txt", ".raw", ".tokens", ".jsonl", ".json", ".parquet", ".zip")
_PACKED = ("", ".xz", ".gz", ".zst")
_ARTICLE = re.compile(r"(?m)^(?= = [^=\s].* = $)")  # a title of the first level


@dataclass(frozen=True)
class Stretch:
    """A part of a text that is tokenised by itself and counted by itself.

    Attributes:
        text: The part.
        ends_document: Whether its document ends with it.
    """

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Text:
    """What is to be predicted.

    Attributes:
        name: For reports.
        stretches: The text in order; read once.
        has_ends: Whether an end of text stands between documents, and is predicted.
        line_ends_are_words: Whether words are counted as of WikiText, with one for each line end.
        metric: The figure that the literature gives for this text.
        notes: What a reader of figures has to know.
        files: SHA-256 of the files read.
    """

    name: str
    stretches: Iterable[Stretch]
    has_ends: bool = True
    line_ends_are_words: bool = False
    metric: str = "perplexity"
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """A text of the literature.

    Attributes:
        metric: As in `Text`.
        convention: How figures of the literature are made, in a sentence.
        files: Where to look in a folder of local files, without what follows the name's stem.
        from_hub: Documents of the split, from the network.
        source: Where that is.
        cut: What becomes of a document that holds all splits or many articles.
        has_ends, line_ends_are_words: As in `Text`.
    """

    metric: str
    convention: str
    files: tuple[str, ...]
    from_hub: Callable[[], Iterator[str]]
    source: str
    cut: Callable[[str], list[str]] | None = None
    has_ends: bool = False
    line_ends_are_words: bool = False


def _hub_rows(name: str, subset: str | None = None, **options: str) -> Iterator[str]:
    from datasets import load_dataset

    for row in load_dataset(name, subset, **options):
        yield row["text"]


def _wikitext(subset: str) -> Callable[[], Iterator[str]]:
    def read() -> Iterator[str]:
        # the hub's rows are lines, and its empty ones were a space
        rows = _hub_rows("Salesforce/wikitext", subset, split="test")
        yield "".join(row or " \n" for row in rows)

    return read


def _pile() -> Iterator[str]:
    return _hub_rows("monology/pile-uncopyrighted", data_files="test.jsonl.zst", split="train")


def _openwebtext() -> Iterator[str]:
    from datasets import load_dataset

    every = load_dataset("Skylion007/openwebtext", split="train")
    held_out = every.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]
    for row in held_out:
        yield row["text"]


def _hutter(name: str) -> Callable[[], Iterator[str]]:
    def read() -> Iterator[str]:
        import fsspec

        address = f"zip://{name}::simplecache::http://mattmahoney.net/dc/{name}.zip"
        with fsspec.open(address, "rb") as file:
            yield file.read().decode("utf-8")

    return read


def articles(text: str) -> list[str]:
    """The articles of WikiText, each with its title."""
    return [part for part in _ARTICLE.split(text) if part]


def last_twentieth(text: str) -> list[str]:
    """The test split of enwik8 and text8: of 100 million bytes the last 5."""
    data = text.encode()
    begin = len(data) - len(data) // 20
    while begin < len(data) and data[begin] & 0xC0 == 0x80:  # within a character
        begin += 1
    return [data[begin:].decode()]


_WORDS = (
    "perplexity per word: all nats divided by words and line ends, as word-level models are "
    "compared; per token of the tokenizer is the figure of the H3 paper. One stream without ends "
    "of text, articles tokenised one by one"
)
_HUTTER = "of the last 5 of 100 million bytes, the usual test split, as one stream"

CORPORA: dict[str, Corpus] = {
    "wikitext103": Corpus(
        "perplexity_per_word",
        _WORDS,
        ("wikitext-103/test", "wikitext-103/wiki.test", "wikitext103/test", "wikitext103/wiki.test",
         "wikitext-103-raw/wiki.test"),
        _wikitext("wikitext-103-raw-v1"),
        "Salesforce/wikitext, wikitext-103-raw-v1, test",
        articles,
        line_ends_are_words=True,
    ),
    "wikitext2": Corpus(
        "perplexity_per_word",
        _WORDS,
        ("wikitext-2/test", "wikitext-2/wiki.test", "wikitext2/test", "wikitext2/wiki.test",
         "wikitext-2-raw/wiki.test"),
        _wikitext("wikitext-2-raw-v1"),
        "Salesforce/wikitext, wikitext-2-raw-v1, test",
        articles,
        line_ends_are_words=True,
    ),
    "pile": Corpus(
        "perplexity",
        "perplexity per token, ends of text between documents and predicted; bits per byte is the "
        "figure of the Pile's makers",
        ("pile/test", "pile/val", "pile/valid"),
        _pile,
        "monology/pile-uncopyrighted, test: the Pile without what was withdrawn",
        has_ends=True,
    ),
    "openwebtext": Corpus(
        "perplexity",
        "perplexity per token, ends of text between documents and predicted",
        ("openwebtext/val", "openwebtext/valid", "openwebtext/validation", "openwebtext/test"),
        _openwebtext,
        "Skylion007/openwebtext, of which 0.05 % drawn with seed 2357 are held out, as by the "
        "authors of H3",
        has_ends=True,
    ),
    "enwik8": Corpus(
        "bits_per_byte",
        f"bits per byte {_HUTTER}",
        ("enwik8", "enwik8/enwik8"),
        _hutter("enwik8"),
        "mattmahoney.net/dc/enwik8.zip",
        last_twentieth,
    ),
    "text8": Corpus(
        "bits_per_character",
        f"bits per character {_HUTTER}",
        ("text8", "text8/text8"),
        _hutter("text8"),
        "mattmahoney.net/dc/text8.zip",
        last_twentieth,
    ),
}  # fmt: skip


def open_corpus(name: str, data_dir: Path | None = None, *, limit: int | None = None) -> Text:
    """A text of `CORPORA`.

    Args:
        name: Its name.
        data_dir: Folder of local files; the network if None.
        limit: First documents only.

    Raises:
        UserError: if there is no such name, or no such files.
    """
    if name not in CORPORA:
        near = get_close_matches(name, CORPORA, n=3, cutoff=0.4)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise UserError(f"there is no corpus {name!r}, only {', '.join(CORPORA)}{hint}")
    corpus = CORPORA[name]
    notes, files = [corpus.convention], dict[str, str]()
    if data_dir is None:
        notes.append(f"from {corpus.source}")
        documents = _from_network(name, corpus)
    else:
        path = _find(name, corpus, data_dir)
        files[str(path.relative_to(data_dir))] = _hash(path)
        notes.append(f"from {path.relative_to(data_dir)}")
        documents = _from_file(path)
    parts = (Document(name, [part]) for d in documents for part in _cut(d, corpus, name))
    if limit is not None:
        notes.append(f"the first {limit:,} documents only")
    return Text(
        name,
        _stretches(islice(parts, limit)),
        corpus.has_ends,
        corpus.line_ends_are_words,
        corpus.metric,
        notes,
        files,
    )


def open_files(data: Path, *, limit: int | None = None) -> Text:
    """A file of text, or all files of a folder, one after the other by their names.

    A text file is a document, as is a line of JSON lines and a row of Parquet; plain or packed.

    Raises:
        UserError: if there are none.
    """
    if data.is_dir():
        found = sorted(p for p in data.rglob("*") if p.is_file() and _is_text(p))
        if not found:
            raise UserError(
                f"{data}: no text in this folder: files end in .txt, .jsonl or .parquet, packed "
                "or not (.xz, .gz, .zst)"
            )
        files = {str(p.relative_to(data)): _hash(p) for p in found}
    else:
        found, files = [data], {data.name: _hash(data)}
    documents = islice(FileSource({"test": found}, "text").documents("test"), limit)
    notes = [] if limit is None else [f"the first {limit:,} documents only"]
    return Text(str(data), _stretches(documents), notes=notes, files=files)


def _stretches(documents: Iterable[Document]) -> Iterator[Stretch]:
    for piece in pieces(documents, None):
        yield Stretch(piece.text, piece.ends_document)


def _cut(document: str, corpus: Corpus, name: str) -> list[str]:
    if corpus.cut is None:
        return [document]
    if name == "text8" and not document.isascii():
        raise UserError("text8: holds more than the letters a to z and spaces: not text8")
    return corpus.cut(document)


def _from_network(name: str, corpus: Corpus) -> Iterator[str]:
    try:
        yield from corpus.from_hub()
    except ImportError as error:
        raise UserError(
            f"{name}: reading it needs {error.name}: install it with: pip install 'h3lm[data]'"
        ) from None
    except Exception as error:  # of many kinds, for names, networks and formats
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: cannot be had from {corpus.source.split(',')[0]} ({said}); without a "
            "network, name a folder of local files with --data-dir"
        ) from error


def _find(name: str, corpus: Corpus, folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of texts")
    for stem in corpus.files:
        for ending in (form + packed for form in _FORMS for packed in _PACKED):
            path = folder / f"{stem}{ending}"
            if path.is_file():
                return path
    looked = " or ".join(corpus.files)
    raise UserError(
        f"{folder}: has no files for {name}: looked for {looked}, as .txt, .jsonl, .parquet or "
        "without an ending, also packed (.xz, .gz, .zst)"
    )


def _from_file(path: Path) -> Iterator[str]:
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
                yield file.read().decode("utf-8")
        except (zipfile.BadZipFile, UnicodeDecodeError, IndexError) as error:
            raise UserError(f"{path}: is damaged, or no text ({error})") from None
        return
    for document in FileSource({"test": [path]}, "text").documents("test"):
        yield "".join(document.parts)


def _is_text(path: Path) -> bool:
    endings = [s for s in path.suffixes if s not in _PACKED]
    return bool(endings) and endings[-1] in (".txt", ".text", ".jsonl", ".ndjson", ".json",
                                             ".parquet")  # fmt: skip


def _hash(path: Path) -> str:
    digest = sha256()
    try:
        with path.open("rb") as file:
            _feed(digest.update, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _feed(update: Callable[[bytes], None], file: IO[bytes]) -> None:
    while block := file.read(2**20):
        update(block)
