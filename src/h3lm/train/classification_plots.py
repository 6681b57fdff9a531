"""Pictures of a classifier's run."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

History = list[dict[str, Any]]


def plot_curves(histories: list[History], path: Path, title: str) -> None:
    """Loss and accuracy over steps, a line for each run, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, history in enumerate(histories):
        for axes, name, color, label in (
            (left, "loss", "C0", "training"),
            (left, "eval_loss", "C1", "held out"),
            (right, "eval_accuracy", "C1", "held out"),
        ):
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                known = None if number else label
                axes.plot(*zip(*points, strict=True), color=color, label=known, linewidth=1.0)
    left.set(xlabel="step", ylabel="loss, nats", title=title)
    right.set(xlabel="step", ylabel="accuracy", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    figure.savefig(path, dpi=150)


def plot_confusion(table: NDArray[np.int64], names: list[str], path: Path, title: str) -> None:
    """A confusion matrix, rows true and columns called, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(names)
    side = min(12.0, 2.5 + 0.4 * n)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(n), names, rotation=90)
    axes.set_yticks(range(n), names)
    axes.set(xlabel="called", ylabel="is", title=title)
    if n <= 20:
        for i, j in np.ndindex(n, n):
            color = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, str(table[i, j]), ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, label="part of the class")
    figure.savefig(path, dpi=150)
