"""Many texts that share much, tokenised once where the tokenizer allows it."""

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from h3lm.evals.prefix_tree import Ints


def encode_all(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], **options: bool
) -> dict[str, Ints]:
    """Token ids of each text, as the tokenizer makes them.

    The texts of an evaluation repeat: a document stands in front of each of its questions, a
    few-shot prefix in front of all. Where lines can be tokenised by themselves
    (`splits_at_newlines`), each distinct line is tokenised once.

    Args:
        tokenizer: A fast one.
        texts: Some may be equal.
        options: For the tokenizer.
    """
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    if not splits_at_newlines(tokenizer):
        ids = tokenizer(unique, return_attention_mask=False, return_token_type_ids=False, **options)
        rows = (np.array(x, dtype=np.int64) for x in ids["input_ids"])
        return dict(zip(unique, rows, strict=True))
    lines = [_lines(text) for text in unique]
    each = list(dict.fromkeys(chain.from_iterable(lines)))
    # without the offsets that the tokenizer's own call works out; there are no options left
    found = tokenizer.backend_tokenizer.encode_batch_fast(each)
    known = {line: np.array(x.ids, dtype=np.int64) for line, x in zip(each, found, strict=True)}
    return {
        text: known[parts[0]] if len(parts) == 1 else np.concatenate([known[x] for x in parts])
        for text, parts in zip(unique, lines, strict=True)
    }


def stands_alone(text: str) -> bool:
    """Whether a text's ids are its own behind any text that does not end in white space.

    Where `splits_at_newlines`: a space in front of a word or mark begins a token.
    """
    return text[:1] == " " and text[1:2] != "" and not text[1].isspace()


def splits_at_newlines(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the ids of a text are those of its lines, each with the newline before it.

    True for GPT-2's tokenizer and those made like it: its pattern never joins a newline to what
    stands before it but white space, nor to that if a word follows, and neither looks back nor
    ahead across that border (added tokens would, if they began like words). Others do: Llama's
    joins newlines to punctuation, and SentencePiece marks where a text begins.
    """
    backend = tokenizer.backend_tokenizer
    before, behind = _described(backend.pre_tokenizer), _described(backend.post_processor)
    return (
        isinstance(backend.model, BPE)
        and not backend.model.dropout
        and backend.normalizer is None
        and before.get("type") == "ByteLevel"
        and before["use_regex"]
        and not before["add_prefix_space"]
        and (behind.get("type", "ByteLevel") == "ByteLevel" or behind.get("special_tokens") == {})
        and backend.truncation is None
        and backend.padding is None
        and not any(
            token.lstrip or token.rstrip or "\n" in token.content or token.content[:1].isalnum()
            for token in tokenizer.added_tokens_decoder.values()
        )
    )


def _described(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as its file has it; all of the file has the vocabulary, and is slow."""
    return {} if part is None else dict(json.loads(part.__getstate__()))


def _lines(text: str) -> list[str]:
    """A text cut in front of each newline behind no white space, or in front of a word."""
    lines, begin = [], 0
    at = text.find("\n", 1)
    while at > 0:
        if not text[at - 1].isspace() or text[at + 1 : at + 2].isalnum():
            lines.append(text[begin:at])
            begin = at
        at = text.find("\n", at + 1)
    lines.append(text[begin:])
    return lines
