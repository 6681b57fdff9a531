"""A linear classifier on random convolutions beside our models: same data, same split, same seeds.

MiniRocket of Dempster et al. 2021, from the library aeon; on the CPU.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h3lm.data.labelled import Labelled
from h3lm.errors import UserError

SHORTEST = 9  # MiniRocket's kernels


def run(data: str | Path, seeds: int = 5, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Fit and score MiniRocket once for each of the seeds 0, 1, ...

    Args:
        data: Prepared labelled signals.
        seeds: How many.
        say: Where lines for people go.

    Returns:
        `split`, `accuracies`, their mean `accuracy` and deviation `accuracy_sd`, and versions.

    Raises:
        UserError: if the data are no signals of one length, or aeon is missing.
    """
    if seeds < 1:
        raise UserError(f"seeds={seeds} must be at least 1")
    classifier, version = _classifier()
    x, labels = _signals(data, "train")
    split = "test" if "test" in Labelled(data).index.splits else "valid"
    x_test, labels_test = _signals(data, split)
    if x.shape[1:] != x_test.shape[1:]:
        raise UserError(f"{data}: rows of {split} are not as long as those of train")
    accuracies = []
    for seed in range(seeds):
        began = time.monotonic()
        fitted = classifier(random_state=seed, n_jobs=-1).fit(x, labels)
        accuracies.append(float(np.mean(fitted.predict(x_test) == labels_test)))
        say(f"seed {seed}: {split} accuracy {accuracies[-1]:.4f}, {time.monotonic() - began:.1f} s")
    spread = statistics.stdev(accuracies) if seeds > 1 else 0.0
    mean = statistics.fmean(accuracies)
    say(f"MiniRocket: {split} accuracy {mean:.4f} ± {spread:.4f} of {len(labels_test):,}")
    return {
        "classifier": f"MiniRocketClassifier of aeon {version}", "split": split,
        "examples": len(labels_test), "accuracies": accuracies, "accuracy": mean,
        "accuracy_sd": spread,
    }  # fmt: skip


def write(summary: dict[str, Any], path: Path) -> None:
    """Write a summary as JSON."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _classifier() -> tuple[Any, str]:
    try:
        from aeon import __version__
        from aeon.classification.convolution_based import MiniRocketClassifier
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the baseline is aeon's MiniRocket: pip install 'h3lm[baseline]' ({reason})"
        ) from None
    return MiniRocketClassifier, __version__


def _signals(data: str | Path, split: str) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Signals (n, C, L) and labels of a split."""
    labelled = Labelled(data, split)
    if labelled.kind.num_channels is None or labelled.kind.rows_per_example != 1:
        raise UserError(f"{data}: MiniRocket takes signals, one of each example")
    rows = [labelled[i].rows[0] for i in range(len(labelled))]
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or min(lengths) < SHORTEST:
        raise UserError(
            f"{data}: MiniRocket takes rows of one length of at least {SHORTEST}, {split} has "
            f"{min(lengths):,} to {max(lengths):,}"
        )
    return np.stack(rows).transpose(0, 2, 1), labelled.labels
