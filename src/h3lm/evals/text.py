"""Perplexity of a model on texts: per token, per word, and bits per byte."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from h3lm.data.blocks import TokenStream
from h3lm.data.tokenizers import Encoder
from h3lm.errors import UserError
from h3lm.evals.corpora import Text, open_corpus, open_files
from h3lm.evals.figures import UNITS, figure, influence, parts_of, standard_error
from h3lm.evals.kept import KeptArrays
from h3lm.evals.lengths import LengthScores, draw, score_lengths
from h3lm.evals.perplexity import Tokens, score_tokens
from h3lm.evals.run_folder import (
    DOCUMENTS,
    REPORT,
    command_line,
    identity_of,
    markdown_table,
    open_run,
    versions,
)
from h3lm.models.folders import load_model
from h3lm.models.generation import load_tokenizer_of, pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_CONTEXT = 1024
FEW_PARTS = 30  # with fewer documents, chance is told from stretches of the context's length

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TextReport:
    """What a model is worth on a text, and how that was measured.

    Attributes:
        model: The model.
        data: The text: a file, a folder, or a name.
        split: Split of a prepared folder.
        metric: The figure that the literature gives for this text.
        tokens: Predicted tokens, ends of text included.
        words: Words of the text, as white space separates them; of WikiText with its line ends.
        characters: Its code points.
        bytes: Its bytes in UTF-8.
        nats_per_token: Mean negative log-likelihood of a token.
        errors: Standard error of each figure, None where there is too little text.
        context: Tokens that a prediction sees, at most.
        stride: New predictions of each window: each sees at least context - stride + 1 tokens.
        precision: What the model computed in.
        device: Where.
        notes: What a reader has to know.
        documents: Nats and units of each part of the text, and its hash.
        lengths: By test length and by position, if asked for.
    """

    model: str
    data: str
    split: str | None
    metric: str
    tokens: int
    words: int
    characters: int
    bytes: int
    nats_per_token: float
    errors: dict[str, float | None]
    context: int
    stride: int
    precision: str
    device: str
    notes: list[str] = field(default_factory=list)
    documents: list[dict[str, float | str]] = field(default_factory=list)
    lengths: LengthScores | None = None

    def figure(self, metric: str) -> float:
        """One of `UNITS`."""
        units = getattr(self, UNITS[metric])
        return figure(metric, self.nats_per_token * self.tokens, units)

    @property
    def perplexity(self) -> float:
        """Per token."""
        return self.figure("perplexity")

    @property
    def perplexity_per_word(self) -> float:
        """The exponential of all nats divided by the words."""
        return self.figure("perplexity_per_word")

    @property
    def bits_per_byte(self) -> float:
        """All nats in bits, divided by the bytes."""
        return self.figure("bits_per_byte")

    def lines(self) -> str:
        """For people."""
        where = self.data if self.split is None else f"{self.data}, {self.split}"
        told = [
            f"{'* ' if metric == self.metric else '  '}{metric.replace('_', ' '):20}"
            f"{self.figure(metric):.4f}" + ("" if error is None else f" ± {error:.4f}")
            for metric, error in self.errors.items()
        ]
        return "\n".join(
            [
                f"{self.model} on {where}",
                *told,
                f"  {self.nats_per_token:.4f} nats per token; {self.tokens:,} tokens, "
                f"{self.words:,} words, {self.characters:,} characters, {self.bytes:,} bytes",
                f"  context {self.context:,}, stride {self.stride:,} tokens; {self.precision} on "
                f"{self.device}",
                *(f"  {note}" for note in self.notes),
                *([] if self.lengths is None else [self.lengths.lines()]),
            ]
        )


def evaluate_text(model: str, data: str | Path, **options: Any) -> TextReport:
    """Score a model on one text: a file, a folder of text or a prepared folder.

    Options and errors are those of `evaluate_texts`.
    """
    return evaluate_texts(model, data=data, **options)[0]


def evaluate_texts(
    model: str,
    names: Sequence[str] = (),
    *,
    data: str | Path | None = None,
    data_dir: Path | None = None,
    split: str = "valid",
    context: int | None = None,
    stride: int | None = None,
    lengths: Sequence[int] = (),
    limit: int | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
    device: str = "auto",
    output: Path | None = None,
    progress: Progress | None = None,
) -> list[TextReport]:
    """Score a model on texts by name, and on a text of one's own.

    Every token is predicted once. In front of the first stands an end of text, if the tokenizer
    has one; else the first is context only.

    Args:
        model: Model folder, or a model of the hub.
        names: Names of `CORPORA`.
        data: A UTF-8 text file or a folder of them, tokenised with the model's tokenizer, or a
            prepared folder.
        data_dir: Folder of local files for `names`; the network if None.
        split: Which split of a prepared folder.
        context: Longest context; that of a prepared folder's blocks, or 1,024, if None.
        stride: New predictions of each window; `context` if None, which is the usual evaluation.
        lengths: Lengths to test besides, in tokens: windows of each, every one from an empty state,
            in chunks that hand their state on.
        limit: First documents only; not of a prepared folder.
        batch_size: Windows at a time.
        precision: fp32 or bf16; SSM parameters stay in fp32.
        device: auto, cpu, cuda or mps.
        output: Folder for the report. The nats of each token are kept there as they come: a run
            that was killed goes on from them.
        progress: Called with a text's name, the tokens done and their total.

    Raises:
        UserError: if model or text cannot be used, or do not belong together.
    """
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision={precision!r} is not one of fp32, bf16")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be positive")
    where = pick_device(device)
    opened: list[Text | TokenStream] = [open_corpus(n, data_dir, limit=limit) for n in names]
    if data is not None:
        opened.append(_open(Path(data), split, limit))
    if output is not None:
        open_run(
            output,
            identity_of(
                model,
                precision,
                texts=[*names, *([] if data is None else [f"{data}, {split}"])],
                data=[_files(x) for x in opened],
                lengths=list(lengths),
                context=context,
                stride=stride,
                limit=limit,
            ),
        ).close()
    loaded = load_model(
        model, device=where, dtype=torch.float32 if precision == "fp32" else torch.bfloat16
    )
    limit_of_model = loaded.config.num_learned_positions
    for length in (context or 0, *lengths):
        if limit_of_model and length > limit_of_model:
            raise UserError(
                f"context={length} exceeds the model's {limit_of_model} learned positions"
            )
    tokenizer = load_tokenizer_of(model)
    found = []
    for i, text in enumerate(opened):
        stream = _read(text, tokenizer, model)
        own_context = context or (
            text.index.block_length
            if isinstance(text, TokenStream)
            else min(DEFAULT_CONTEXT, limit_of_model or DEFAULT_CONTEXT)
        )
        found.append(
            _score(
                loaded, stream, str(model), own_context, stride, lengths, batch_size, precision,
                progress, KeptArrays(output, f"nats-{i}-"),
            )
        )  # fmt: skip
    if output is not None:
        write_text_reports(found, output)
    return found


def write_text_reports(reports: Sequence[TextReport], folder: Path) -> None:
    """Write report.json, report.md and documents.jsonl, and a picture where lengths were tested.

    Raises:
        UserError: if they cannot be written.
    """
    pictures = {r.data: f"lengths_{Path(r.data).stem}.png" for r in reports if r.lengths}
    whole = {
        "model": reports[0].model,
        "command": command_line(),
        "versions": versions(),
        "tasks": {r.data: _to_dict(r) for r in reports},
    }
    try:
        with (folder / DOCUMENTS).open("w", encoding="utf-8") as file:
            for report in reports:
                for i, part in enumerate(report.documents):
                    metrics = {k: v for k, v in part.items() if k != "hash"}
                    row = {"doc_id": i, "doc_hash": part["hash"], "metrics": metrics}
                    file.write(json.dumps({"task": report.data, **row}) + "\n")
        for report in reports:
            if report.lengths is not None:
                title = f"{Path(report.model).name} on {Path(report.data).name}"
                draw(report.lengths, title, folder / pictures[report.data])
        (folder / "report.md").write_text(_markdown(reports, pictures), encoding="utf-8")
        (folder / REPORT).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None


def _to_dict(report: TextReport) -> dict[str, Any]:
    plain = {k: v for k, v in vars(report).items() if k not in ("documents", "errors", "lengths")}
    metrics = {
        metric: {"value": report.figure(metric), "stderr": error}
        for metric, error in report.errors.items()
    }
    lengths = None if report.lengths is None else asdict(report.lengths)
    return plain | {"metrics": metrics, "documents": len(report.documents), "lengths": lengths}


def _markdown(reports: Sequence[TextReport], pictures: dict[str, str]) -> str:
    rows = [["text", *UNITS, "tokens", "context", "stride"]]
    for r in reports:
        cells = []
        for metric in UNITS:
            mark = "**" if metric == r.metric else ""
            error = r.errors.get(metric)
            told = "" if error is None else f" ± {error:.4f}"
            cells.append(f"{mark}{r.figure(metric):.4f}{mark}{told}" if metric in r.errors else "")
        rows.append([r.data, *cells, f"{r.tokens:,}", f"{r.context:,}", f"{r.stride:,}"])
    first = reports[0]
    lines = [
        f"# {first.model}, perplexity",
        "",
        *markdown_table(rows),
        f"Bold: what the literature gives. ±: standard error. {first.precision} on {first.device}.",
        "",
        *(f"- {r.data}: {note}" for r in reports for note in r.notes),
        "",
    ]
    for r in reports:
        if r.lengths is not None:
            lines += ["```", r.lengths.lines(), "```", "", f"![]({pictures[r.data]})", ""]
    return "\n".join([*lines, f"`{command_line()}`", ""])


@dataclass
class _Stream:
    """A text as tokens, and what each of its parts holds."""

    name: str
    split: str | None
    text: Text | None
    tokens: Tokens
    ends: list[int]  # of parts, in `tokens`
    parts: list[dict[str, float | str]]


def _open(path: Path, split: str, limit: int | None) -> Text | TokenStream:
    if (path / "index.json").is_file():
        if limit is not None:
            raise UserError(f"{path}: a limit is for texts; a prepared folder is scored whole")
        return TokenStream(path, split)
    if not path.exists():
        raise UserError(f"{path}: no such text file or prepared folder")
    return open_files(path, limit=limit)


def _files(text: Text | TokenStream) -> dict[str, str]:
    """SHA-256 of the files that a text comes from."""
    if isinstance(text, Text):
        return text.files
    return {shard.tokens.name: shard.tokens.sha256 for shard in text.shards}


def _read(text: Text | TokenStream, tokenizer: "PreTrainedTokenizerFast", model: str) -> _Stream:
    """Tokenise a text, or open its tokens, and count its parts."""
    if isinstance(text, TokenStream):
        check_same_tokenizer(text, tokenizer, model)
        ends = [*text.document_ends(0, len(text)).tolist(), len(text)]
        ends = [e for e, before in zip(ends, [0, *ends], strict=False) if e > before]
        parts = [
            _counts(_decoded(text[start:end], tokenizer), line_ends=False)
            for start, end in pairwise([0, *ends])
        ]
        stream = _Stream(str(text.folder), text.split, None, text, ends, parts)
    else:
        stream = _tokenise(text, tokenizer)
    if not sum(float(part["words"]) for part in stream.parts):
        raise UserError(f"{stream.name}: there is no text to predict")
    if tokenizer.eos_token_id is not None:
        stream.tokens = Prefixed(tokenizer.eos_token_id, stream.tokens)
        stream.ends = [end + 1 for end in stream.ends]
    return stream


def _tokenise(text: Text, tokenizer: "PreTrainedTokenizerFast") -> _Stream:
    encoder, end_of_text = Encoder(tokenizer), tokenizer.eos_token_id
    arrays: list[NDArray[np.int64]] = []
    ends: list[int] = []
    parts, length, ended = [], 0, False
    for stretch in text.stretches:
        try:
            ids = encoder(stretch.text).astype(np.int64)
        except UserError as error:
            raise UserError(f"{text.name}: {error}") from None
        if ended and text.has_ends and end_of_text is not None:  # predicted as the last one's
            arrays.append(np.array([end_of_text], np.int64))
            length += 1
            ends[-1] = length
        ended = stretch.ends_document
        if not len(ids):
            continue
        arrays.append(ids)
        length += len(ids)
        ends.append(length)
        parts.append(_counts(stretch.text, line_ends=text.line_ends_are_words))
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
    return _Stream(text.name, None, text, tokens, ends, parts)


def _counts(text: str, *, line_ends: bool) -> dict[str, float | str]:
    data = text.encode()
    return {
        "words": len(text.split()) + (text.count("\n") if line_ends else 0),
        "characters": len(text),
        "bytes": len(data),
        "hash": blake2b(data, digest_size=8).hexdigest(),
    }


def _decoded(ids: NDArray[np.int64], tokenizer: "PreTrainedTokenizerFast") -> str:
    kept = ids[ids != tokenizer.eos_token_id].tolist()
    return str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))


def _score(
    model: torch.nn.Module,
    stream: _Stream,
    model_name: str,
    context: int,
    stride: int | None,
    lengths: Sequence[int],
    batch_size: int,
    precision: str,
    progress: Progress | None,
    kept: KeptArrays,
) -> TextReport:
    tokens = stream.tokens
    total, done = len(tokens) - 1, 0

    def count(predicted: int) -> None:
        nonlocal done
        done += predicted
        if progress is not None:
            progress(stream.name, done, total)

    nats = kept("tokens", (len(tokens),), np.float32)
    score = score_tokens(
        model, tokens, context=context, stride=stride, batch_size=batch_size, progress=count,
        each=nats,
    )  # fmt: skip
    each = np.asarray(nats, np.float64)
    each[0] = 0.0  # the first of all is not predicted
    for part, start, end in zip(stream.parts, [0, *stream.ends], stream.ends, strict=False):
        part["nats"] = float(each[start:end].sum())
        part["tokens"] = end - max(1, start)
    text = stream.text
    metrics = [m for m in UNITS if m != "bits_per_character" or (text and text.metric == m)]
    report = TextReport(
        model=model_name,
        data=stream.name,
        split=stream.split,
        metric="perplexity" if text is None else text.metric,
        tokens=score.tokens,
        words=sum(int(part["words"]) for part in stream.parts),
        characters=sum(int(part["characters"]) for part in stream.parts),
        bytes=sum(int(part["bytes"]) for part in stream.parts),
        nats_per_token=float(each.sum()) / score.tokens,
        errors={},
        context=score.context,
        stride=score.stride,
        precision=precision,
        device=str(next(model.parameters()).device),
        notes=[] if text is None else list(text.notes),
        documents=stream.parts,
        lengths=score_lengths(model, tokens, lengths, progress=progress, kept=kept)
        if lengths
        else None,
    )
    for metric in metrics:
        report.errors[metric] = _error(report, metric, each[1:])
    return report


def _error(report: TextReport, metric: str, each: NDArray[np.float64]) -> float | None:
    """By documents where there are enough of them, else by stretches of the context's length."""
    if len(report.documents) >= FEW_PARTS:
        nats, units = parts_of(report.documents, metric)  # type: ignore[arg-type]
        return standard_error(influence(metric, nats, units))
    starts = np.arange(0, len(each), report.context)
    nats = np.add.reduceat(each, starts)
    tokens = np.diff([*starts, len(each)]).astype(float)
    share = getattr(report, UNITS[metric]) / report.tokens  # units of a token
    return standard_error(influence(metric, nats, tokens * share))


class Prefixed:
    """A sequence of tokens with one more in front.

    Args:
        first: That token.
        tokens: The others.
    """

    def __init__(self, first: int, tokens: Tokens) -> None:
        self.first, self.tokens = first, tokens

    def __len__(self) -> int:
        return 1 + len(self.tokens)

    def __getitem__(self, position: slice, /) -> NDArray[np.int64]:
        """A stretch of them, of step 1."""
        start, stop, _ = position.indices(len(self))
        rest = self.tokens[max(0, start - 1) : max(0, stop - 1)]
        if start > 0 or stop == 0:
            return rest
        return np.concatenate([np.array([self.first], np.int64), rest])


def check_same_tokenizer(
    stream: TokenStream, tokenizer: "PreTrainedTokenizerFast", model: str
) -> None:
    """Check that prepared text has the tokens of a model's tokenizer.

    Raises:
        UserError: if it was made with another one.
    """
    theirs = load_tokenizer_of(str(stream.tokenizer_folder))
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{stream.folder} was prepared with another tokenizer than that of {model}: prepare "
            f"the text with --tokenizer {model}, or give the text file itself"
        )
