"""Pictures of the lab."""

import re
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from h3lm.synthetics.report import CUT
from h3lm.synthetics.settings import known_setting

if TYPE_CHECKING:
    from h3lm.synthetics.report import Report, Run
    from h3lm.synthetics.trace import LayerTrace, Trace

_CHANNELS = 12  # rows of a trace: those that matter most for the answer
_SHOWN_TAPS = 8
_PANELS = 4  # side by side


def plot_report(report: "Report", out: Path) -> list[Path]:
    """Draw everything that a report holds.

    Returns:
        The files written.
    """
    written = []
    if report.runs:
        written.append(_save(_accuracy(report), out / "accuracy.png"))
        written.append(_save(_curves(report), out / "curves.png"))
    if any(run.longer for run in report.runs):
        written.append(_save(_lengths(report), out / "lengths.png"))
    mqar = [s for s in report.settings() if s.startswith("mqar")]
    if mqar:
        written.append(_save(_pairs(report, mqar), out / "mqar.png"))
    return written


def plot_trace(trace: "Trace", path: Path) -> Path:
    """Draw what an H3 model does along one row: a line of panels for each layer."""
    count = len(trace.layers)
    figure = Figure(figsize=(17, 0.6 + 3.2 * count), layout="constrained")
    figure.suptitle(
        f"One row through a trained H3: ... {' '.join(trace.tokens[-3:])} → {trace.answer}"
        f" (probability {float(trace.probabilities.max()):.2f}); "
        "red: the query, green: what followed it"
    )
    grid = figure.subplots(count, 5, squeeze=False, width_ratios=[1, 2.4, 2.4, 2.4, 2.4])
    for number, (layer, axes) in enumerate(zip(trace.layers, grid, strict=True), 1):
        _draw_layer(layer, axes, number, trace.tokens)
    return _save(figure, path)


def _draw_layer(layer: "LayerTrace", axes: np.ndarray, number: int, tokens: list[str]) -> None:
    order = layer.worth.abs().argsort(descending=True)[:_CHANNELS]
    panels = [
        (layer.taps[:, :_SHOWN_TAPS], "shift filter, by lag", [str(i) for i in range(_SHOWN_TAPS)]),
        (layer.written, "written: shifted k × v", tokens),
        (layer.held, "held by the diagonal SSM", tokens),
        (layer.q, "gate: q", tokens),
        (layer.o, "read: q × held", tokens),
    ]
    for axis, (values, title, labels) in zip(axes, panels, strict=True):
        shown = values[order].numpy()
        # each channel in its own scale: signs and places are the message
        scale = np.abs(shown).max(1, keepdims=True)
        axis.imshow(
            shown / np.where(scale > 0, scale, 1), aspect="auto", cmap="RdBu", vmin=-1, vmax=1
        )
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(shown.shape[1]), labels[: shown.shape[1]], fontsize=7)
        if labels is tokens:
            _mark_query(axis, tokens)
        axis.set_yticks([])
    names = [f"{int(c)} ({float(layer.worth[c]):.1f})" for c in order]
    axes[0].set_yticks(range(len(order)), names, fontsize=6)
    axes[0].set_ylabel(f"layer {number}: channel (log odds lost without it)", fontsize=7)


def _mark_query(axis: Axes, tokens: list[str]) -> None:
    """Colour the query where it was seen before, and what followed it there."""
    for i, label in enumerate(axis.get_xticklabels()):
        if tokens[i] == tokens[-1]:
            label.set(color="crimson", fontweight="bold")
        elif i and tokens[i - 1] == tokens[-1]:
            label.set(color="green", fontweight="bold")


def _accuracy(report: "Report") -> Figure:
    settings = report.settings()
    figure, axes = _panels(len(settings))
    for axis, setting in zip(axes, settings, strict=True):
        mixers = report.mixers(setting)
        both = any(r.setting == setting and r.kind == "search" for r in report.runs)
        for offset, kind in ((-0.2, "recipe"), (0.2, "search")) if both else ((0.0, "recipe"),):
            chosen = [report.select(setting, mixer, kind) for mixer in mixers]
            heights = [100 * fmean(r.accuracy for r in runs) if runs else 0.0 for runs in chosen]
            x = np.arange(len(mixers)) + offset
            axis.bar(x, heights, 0.38, label="one recipe" if kind == "recipe" else "best of search")
            for at, runs in zip(x, chosen, strict=True):
                axis.plot([at] * len(runs), [100 * r.accuracy for r in runs], "k.", markersize=3)
        _paper_marks(axis, setting, mixers)
        for baseline in report.baselines[setting]:
            axis.axhline(100 * baseline["accuracy"], color="0.6", linewidth=0.8, linestyle=":")
        names = [
            mixer if all(r.finished for r in _shown(report, setting, mixer)) else f"{mixer} {CUT}"
            for mixer in mixers
        ]
        axis.set_xticks(range(len(mixers)), names, rotation=30, ha="right", fontsize=8)
        axis.set_title(f"{setting} (dotted: rules that learn nothing)", fontsize=9)
        axis.set_ylabel("accuracy, %")
        axis.set_ylim(0, 103)
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=len(handles), fontsize=8
    )
    return figure


def _paper_marks(axis: Axes, setting: str, mixers: list[str]) -> None:
    known = known_setting(setting)
    paper = known.paper if known else {}
    marks = [(i, paper[mixer]) for i, mixer in enumerate(mixers) if mixer in paper]
    if marks:
        axis.plot(*zip(*marks, strict=True), "D", color="crimson", markersize=5, label="paper")


def _curves(report: "Report") -> Figure:
    settings = report.settings()
    figure, axes = _panels(len(settings))
    for axis, setting in zip(axes, settings, strict=True):
        for color, mixer in enumerate(report.mixers(setting)):
            for i, run in enumerate(_shown(report, setting, mixer)):
                steps, _, accuracies = zip(*run.curve, strict=True)
                label = mixer if i == 0 else None
                axis.plot(
                    steps, [100 * a for a in accuracies],
                    color=f"C{color}", linewidth=0.8, label=label,
                )  # fmt: skip
        axis.set_title(setting, fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylabel("test accuracy, %")
        axis.legend(fontsize=7, loc="lower right")
    return figure


def _lengths(report: "Report") -> Figure:
    settings = [
        s for s in report.settings() if any(r.longer for r in report.runs if r.setting == s)
    ]
    figure, axes = _panels(len(settings))
    for axis, setting in zip(axes, settings, strict=True):
        for mixer in report.mixers(setting):
            runs = _shown(report, setting, mixer)
            lengths = sorted({int(n) for r in runs for n in r.longer})
            means = [100 * fmean(r.longer[str(n)] for r in runs) for n in lengths]
            axis.plot(lengths, means, "o-", label=mixer)
        rules = report.longer_baselines.get(setting, {})
        if rules:
            lengths = sorted(map(int, rules))
            best = [100 * max(b["accuracy"] for b in rules[str(n)]) for n in lengths]
            axis.plot(lengths, best, "k:", label="best rule that learns nothing")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set_title(f"{setting}: tested at other lengths", fontsize=9)
        axis.set_xlabel("length of the test rows")
        axis.set_ylabel("accuracy, %")
        axis.legend(fontsize=7)
    return figure


def _pairs(report: "Report", settings: list[str]) -> Figure:
    figure, (by_pairs, by_size) = _panels(2)
    for mixer in dict.fromkeys(m for s in settings for m in report.mixers(s)):
        points = []
        for setting in settings:
            if runs := _shown(report, setting, mixer):
                size = report.sizes[f"{setting} {mixer}"]["state_floats"]
                points.append((_pairs_of(setting), size, 100 * fmean(r.accuracy for r in runs)))
        pairs, sizes, accuracies = zip(*sorted(points), strict=True)
        by_pairs.plot(pairs, accuracies, "o-", label=mixer)
        by_size.plot(sizes, accuracies, "o", label=mixer)
    rules = sorted(
        (_pairs_of(s), 100 * max(b["accuracy"] for b in report.baselines[s])) for s in settings
    )
    by_pairs.plot(*zip(*rules, strict=True), "k:", label="best rule that learns nothing")
    for axis, name in ((by_pairs, "key-value pairs"), (by_size, "state, floats per sequence")):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(name)
        axis.set_ylabel("accuracy, %")
        axis.legend(fontsize=7)
    by_pairs.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    return figure


def _pairs_of(setting: str) -> int:
    """Pairs of a setting's name: mqar-8, or mqar-8-l128-k16 where they were altered."""
    found = re.search(r"-k(\d+)", setting) or re.search(r"mqar-(\d+)", setting)
    return int(found[1]) if found else 0


def _shown(report: "Report", setting: str, mixer: str) -> "list[Run]":
    return report.select(setting, mixer, "search") or report.select(setting, mixer, "recipe")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, in rows."""
    columns = min(count, _PANELS)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.5 + 4.5 * columns, 0.4 + 3.8 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path
