"""How well a model predicts a text, with context and stride stated."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from h3lm.errors import UserError
from h3lm.evals.figures import figure
from h3lm.evals.kept import is_known

# Logits of a batch: 1 GiB in float32, of which about three are held at once
BATCH_LOGITS = 2**28


class Tokens(Protocol):
    """A sequence of token ids that gives stretches as arrays."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: slice, /) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class TextScore:
    """Negative log-likelihood of a stretch of tokens.

    Attributes:
        nats: Sum over the predicted tokens, in nats.
        tokens: Number of predicted tokens.
        context: Tokens that a window holds in front of its last prediction, at most.
        stride: New predictions of each window.
    """

    nats: float
    tokens: int
    context: int
    stride: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the mean over all tokens; never a mean of perplexities."""
        return figure("perplexity", self.nats, self.tokens)

    def bits_per(self, units: int) -> float:
        """Bits for each of so many units that the tokens stand for: bytes, characters, words."""
        return self.nats / math.log(2) / units


def windows_at_once(wanted: int, stride: int, vocab_size: int) -> int:
    """Windows of a batch: as many as wanted, unless their logits would be too many."""
    return max(1, min(wanted, BATCH_LOGITS // (stride * vocab_size)))


def score_tokens(
    model: torch.nn.Module,
    tokens: Tokens,
    *,
    context: int,
    stride: int | None = None,
    first: int = 1,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
    share: tuple[int, int] = (0, 1),
    each: NDArray[np.floating] | None = None,
) -> TextScore:
    """Predict every token from `first` on once, in windows of `context` inputs.

    A window of inputs predicts its last `stride` next tokens, so each has between
    context - stride + 1 and context tokens in front of it (fewer only where the text begins).
    Nothing behind a token is ever seen.

    Args:
        model: Language model; called in eval mode without gradients, in its own dtype.
        tokens: The text.
        context: Longest context.
        stride: New predictions of each window, 1 <= stride <= context; `context` if None, which
            is the usual non-overlapping evaluation.
        first: First predicted position, at least 1; what stands before it is context only.
        batch_size: Windows at a time; fewer where their logits would be too many.
        progress: Called with the number of predicted tokens of each batch.
        share: (i, n) to score only every n-th batch from the i-th on, as the i-th of n processes
            that sum their `nats` and `tokens`. All n call the model equally often, as one that is
            sharded between them needs.
        each: (tokens,), filled with the nats of each predicted token, at its position. Batches
            whose nats are all there already, and not NaN, are not run again.

    Raises:
        UserError: if there is nothing to predict or the sizes make no sense.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"stride={stride} must be from 1 to the context, {context}")
    if not 1 <= first < len(tokens):
        raise UserError(f"a text of {len(tokens)} tokens has nothing to predict from {first} on")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, counted = 0.0, 0
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", 1)
    batch_size = windows_at_once(batch_size, stride, vocab_size)
    batches = list(_batches(list(_windows(first, len(tokens), context, stride)), batch_size))
    number, of = share
    # not inference_mode: what a sharded model gathers in it could not be trained with afterwards
    with torch.no_grad():
        for i in range(number, -(-len(batches) // of) * of, of):
            batch = batches[min(i, len(batches) - 1)]
            predicted = sum(end - begin for _, begin, end in batch)
            if each is not None:
                known = np.concatenate([each[begin + 1 : end + 1] for _, begin, end in batch])
                if is_known(known):
                    nats += float(known.sum(dtype=np.float64))
                    counted += predicted
                    if progress is not None:
                        progress(predicted)
                    continue
            ids = [torch.from_numpy(tokens[start : end + 1]) for start, _, end in batch]
            inputs = torch.stack([x[:-1] for x in ids]).to(device)
            targets = torch.stack([x[1:] for x in ids]).to(device)
            scored = max(end - begin for _, begin, end in batch)
            logits = model(input_ids=inputs, use_cache=False, logits_to_keep=scored).logits
            if i >= len(batches):
                break
            losses = _token_losses(logits, targets[:, -scored:])
            for row, (_, begin, end) in zip(losses, batch, strict=True):
                mine = row[scored - (end - begin) :].double()
                nats += float(mine.sum())
                if each is not None:
                    each[begin + 1 : end + 1] = mine.cpu().numpy()
            counted += predicted
            if progress is not None:
                progress(predicted)
    model.train(was_training)
    return TextScore(nats, counted, context, stride)


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def _windows(first: int, last: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, begin, end): inputs are start .. end - 1 and predict positions begin + 1 .. end."""
    begin = first - 1
    while begin < last - 1:
        end = min(begin + stride, last - 1)
        yield max(0, end - context), begin, end
        begin = end


def _batches(
    windows: Sequence[tuple[int, int, int]], size: int
) -> Iterator[Sequence[tuple[int, int, int]]]:
    """Windows of one length, a few at a time."""
    group: list[tuple[int, int, int]] = []
    for window in windows:
        same = not group or window[2] - window[0] == group[0][2] - group[0][0]
        if len(group) == size or not same:
            yield group
            group = []
        group.append(window)
    if group:
        yield group
