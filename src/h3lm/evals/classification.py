"""How good a classifier is."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Classified:
    """What a model said of labelled examples.

    Attributes:
        logits: (n, classes), float32.
        labels: (n,), the classes that they have.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """Part of the examples whose class has the largest logit."""
        return float((self.logits.argmax(1) == self.labels).mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        wide = self.logits.astype(np.float64)
        highest = wide.max(1)
        total = highest + np.log(np.exp(wide - highest[:, None]).sum(1))
        return float((total - wide[np.arange(len(wide)), self.labels]).mean())

    def confusion(self) -> NDArray[np.int64]:
        """How often class i was called class j, (classes, classes)."""
        classes = self.logits.shape[1]
        table = np.zeros((classes, classes), np.int64)
        np.add.at(table, (self.labels, self.logits.argmax(1)), 1)
        return table

    @property
    def macro_f1(self) -> float:
        """F1 of each class, averaged; a class that neither occurs nor is called counts 0."""
        table = self.confusion()
        right = table.diagonal()
        total = table.sum(0) + table.sum(1)
        return float(np.mean(2 * right / np.maximum(total, 1)))

    @property
    def roc_auc(self) -> float | None:
        """Area under the ROC curve; None unless there are two classes and both occur."""
        if self.logits.shape[1] != 2:
            return None
        return roc_auc(self.logits[:, 1] - self.logits[:, 0], self.labels)


def roc_auc(scores: NDArray, labels: NDArray) -> float | None:
    """The chance that a positive scores above a negative, ties counting half.

        (sum of the positives' ranks - P (P + 1) / 2) / (P N)

    Source: the Mann-Whitney statistic.

    Args:
        scores: (n,), higher for the positive class.
        labels: (n,), 1 for positive, 0 for negative.

    Returns:
        From 0 to 1; None if only one class occurs.
    """
    positive = labels == 1
    P, N = int(positive.sum()), int((~positive).sum())
    if not P or not N:
        return None
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks = (last - (count - 1) / 2)[place]  # the mean rank of each group of ties
    return float((ranks[positive].sum() - P * (P + 1) / 2) / (P * N))


@torch.no_grad()
def classify(
    model: nn.Module, batches: Iterable[Batch], autocast: AbstractContextManager | None = None
) -> Classified:
    """Run a model over labelled batches, in eval mode.

    Args:
        model: Returns `logits`.
        batches: Inputs of the model with `labels`.
        autocast: Context of each forward pass.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    with autocast or nullcontext():
        for batch in batches:
            inputs = {k: v.to(device, non_blocking=True) for k, v in batch.items() if k != "labels"}
            logits.append(model(**inputs).logits.float())
            labels.append(batch["labels"])
    model.train(was_training)
    return Classified(torch.cat(logits).cpu().numpy(), torch.cat(labels).cpu().numpy())
