"""Perplexity of a model on a text: per token, per word, and bits per byte."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from h3lm.data.blocks import TokenStream
from h3lm.data.tokenizers import encode
from h3lm.errors import UserError
from h3lm.evals.perplexity import Tokens, score_tokens
from h3lm.models.folders import load_model
from h3lm.models.generation import load_tokenizer_of, pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_CONTEXT = 1024


@dataclass(frozen=True)
class Report:
    """What a model is worth on a text, and how that was measured.

    Attributes:
        model: The model.
        data: The text: a file, or a prepared folder.
        split: Split of the prepared folder.
        tokens: Predicted tokens, ends of text included.
        words: Words of the text, as white space separates them.
        bytes: Bytes of the text in UTF-8.
        nats_per_token: Mean negative log-likelihood of a token.
        perplexity: Its exponential.
        perplexity_per_word: The exponential of all nats divided by the words.
        bits_per_byte: All nats in bits, divided by the bytes.
        context: Tokens that a prediction sees, at most.
        stride: New predictions of each window: each sees at least context - stride + 1 tokens.
        precision: What the model computed in.
        device: Where.
    """

    model: str
    data: str
    split: str | None
    tokens: int
    words: int
    bytes: int
    nats_per_token: float
    perplexity: float
    perplexity_per_word: float
    bits_per_byte: float
    context: int
    stride: int
    precision: str
    device: str

    def to_dict(self) -> dict[str, str | int | float | None]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> str:
        """For people."""
        where = self.data if self.split is None else f"{self.data}, {self.split}"
        return (
            f"{self.model} on {where}\n"
            f"perplexity          {self.perplexity:.4f} per token ({self.nats_per_token:.4f} "
            f"nats), {self.perplexity_per_word:.4f} per word\n"
            f"bits per byte       {self.bits_per_byte:.4f}\n"
            f"text                {self.tokens:,} tokens, {self.words:,} words, "
            f"{self.bytes:,} bytes\n"
            f"context, stride     {self.context:,}, {self.stride:,} tokens; {self.precision} on "
            f"{self.device}"
        )


def evaluate_text(
    model: str,
    data: str | Path,
    *,
    split: str = "valid",
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Score a model on a text file, or on a split of a prepared folder.

    Every token is predicted once. In front of the first stands an end of text, if the tokenizer
    has one; else the first is context only.

    Args:
        model: Model folder, or a model of the hub.
        data: A UTF-8 text file, tokenised with the model's tokenizer, or a prepared folder.
        split: Which split of the folder.
        context: Longest context; that of the folder's blocks, or 1,024 for a file, if None.
        stride: New predictions of each window; `context` if None, which is the usual evaluation.
        batch_size: Windows at a time.
        precision: fp32 or bf16; SSM parameters stay in fp32.
        device: auto, cpu, cuda or mps.
        progress: Called with the tokens done and their total.

    Raises:
        UserError: if model or text cannot be used, or do not belong together.
    """
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision={precision!r} is not one of fp32, bf16")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be positive")
    where = pick_device(device)
    path = Path(data)
    if path.is_dir():
        stream = TokenStream(path, split)
    elif not path.exists():
        raise UserError(f"{data}: no such text file or prepared folder")
    loaded = load_model(
        model, device=where, dtype=torch.float32 if precision == "fp32" else torch.bfloat16
    )
    tokenizer = load_tokenizer_of(model)
    tokens: Tokens
    if path.is_dir():
        _check_same_tokenizer(stream, tokenizer, model)
        tokens, (words, size) = stream, _count_stream(stream, tokenizer)
        context = context or stream.index.block_length
    else:
        text = _read(path)
        tokens = encode(tokenizer, text).astype(np.int64)
        words, size = len(text.split()), len(text.encode())
        context = context or DEFAULT_CONTEXT
    limit = loaded.config.num_learned_positions
    if limit and context > limit:
        raise UserError(f"context={context} exceeds the model's {limit} learned positions")
    if tokenizer.eos_token_id is not None:
        tokens = Prefixed(tokenizer.eos_token_id, tokens)
    if not words:
        raise UserError(f"{data}: there is no text to predict")
    total, done = len(tokens) - 1, 0

    def count(predicted: int) -> None:
        nonlocal done
        done += predicted
        if progress is not None:
            progress(done, total)

    score = score_tokens(
        loaded, tokens, context=context, stride=stride, batch_size=batch_size, progress=count
    )
    return Report(
        model=str(model),
        data=str(data),
        split=split if path.is_dir() else None,
        tokens=score.tokens,
        words=words,
        bytes=size,
        nats_per_token=score.loss,
        perplexity=score.perplexity,
        perplexity_per_word=float(np.exp(score.nats / words)),
        bits_per_byte=score.bits_per(size),
        context=score.context,
        stride=score.stride,
        precision=precision,
        device=str(where),
    )


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


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start:,}, 0x{error.object[error.start]:02x}, is not UTF-8"
        ) from None


def _check_same_tokenizer(
    stream: TokenStream, tokenizer: "PreTrainedTokenizerFast", model: str
) -> None:
    theirs = load_tokenizer_of(str(stream.tokenizer_folder))
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{stream.folder} was prepared with another tokenizer than that of {model}: prepare "
            f"the text with --tokenizer {model}, or give the text file itself"
        )


def _count_stream(stream: TokenStream, tokenizer: "PreTrainedTokenizerFast") -> tuple[int, int]:
    """Words and bytes of the text that the tokens stand for, a document at a time."""
    ends = [*stream.document_ends(0, len(stream)).tolist(), len(stream)]
    words = size = start = 0
    for end in ends:
        ids = stream[start:end]
        text = tokenizer.decode(
            ids[ids != tokenizer.eos_token_id].tolist(), clean_up_tokenization_spaces=False
        )
        words, size, start = words + len(text.split()), size + len(text.encode()), end
    return words, size


def write_json(report: Report, path: Path) -> None:
    """Write a report.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        path.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
