"""Which token comes next, chosen on the device from fixed memory, as a CUDA graph needs it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# They look at nothing but the scores, and at no value of them from the host
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
KNOWN = (*WARPERS, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor)


def unknown_processor(processors: Iterable[Any]) -> str | None:
    """The name of the first processor that `Chooser` cannot run, or None."""
    return next((type(p).__name__ for p in processors if type(p) not in KNOWN), None)


class Chooser:
    """Greedy choice or sampling behind the library's own processors.

    The repetition penalty is the library's formula over a table of tokens that were seen: looking
    at the ids themselves would need a tensor that grows. Samples are drawn as the library draws
    them, from torch's generator of the device, so the same seed gives the same tokens.

    Args:
        processors: The library's, in its order, each of a type in `KNOWN`.
        do_sample: Whether to sample; else the likeliest token is taken.
        rows: Rows of the batch.
        vocab_size: Logits of a row.
        device: Of the logits.
    """

    def __init__(
        self,
        processors: Iterable[Any],
        do_sample: bool,
        rows: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.processors, self.do_sample = list(processors), do_sample
        self.suppressed = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.seen: Tensor | None = None
        for processor in self.processors:
            if isinstance(processor, SuppressTokensLogitsProcessor):
                probe = torch.zeros(1, vocab_size, device=device)
                self.suppressed |= processor(None, probe)[0].isinf()
            elif isinstance(processor, RepetitionPenaltyLogitsProcessor):
                self.seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        # one sum over the logits where nothing else is asked for
        self.plain = not do_sample and all(
            isinstance(p, SuppressTokensLogitsProcessor) for p in self.processors
        )
        self.known = _tail(self.suppressed) if self.plain else None

    def start(self, prompt: Tensor) -> None:
        """Look at the prompt (rows, L) as the library's processors do."""
        if self.seen is None:
            return
        self.seen.zero_()
        ones = torch.ones(self.seen.shape, device=self.seen.device)
        for processor in self.processors:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                self.seen |= processor(prompt.to(self.seen.device), ones) != 1

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each row, (rows,), from logits (rows, vocab_size) of any dtype."""
        if self.known is not None:
            return logits[:, : self.known].argmax(-1)
        scores = logits.float()
        for processor in self.processors:
            if isinstance(processor, SuppressTokensLogitsProcessor):
                scores = scores.masked_fill(self.suppressed, -torch.inf)
            elif isinstance(processor, RepetitionPenaltyLogitsProcessor):
                assert self.seen is not None
                penalty = processor.penalty
                less = torch.where(scores < 0, scores * penalty, scores / penalty)
                scores = torch.where(self.seen, less, scores)
            else:
                scores = processor(None, scores)
        if self.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            token = scores.argmax(-1)
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        return token


def _tail(suppressed: Tensor) -> int | None:
    """How many tokens stay in front, if all suppressed ones are the last."""
    known = int((~suppressed).sum())
    return None if bool(suppressed[:known].any()) else known
