"""Results of benchmarks as JSON and Markdown."""

import json
from pathlib import Path

import numpy as np

Row = dict[str, str | float]


def write(
    name: str, folder: Path, environment: dict[str, str], notes: str, rows: list[Row]
) -> Path:
    """Write `name`.json and `name`.md into a folder and return the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "notes": notes, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    path = folder / f"{name}.md"
    path.write_text(markdown(name, environment, notes, rows))
    return path


def markdown(name: str, environment: dict[str, str], notes: str, rows: list[Row]) -> str:
    """One table, under what it was measured on."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"# {name}", "", *(f"- {key}: {value}" for key, value in environment.items()), ""]
    lines += [notes, "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"


def exponent(points: list[tuple[float, float]], last: int = 4) -> float:
    """The power of x that y grows with, fitted to the last points in logarithms; NaN if too few."""
    if len(points) < 2:
        return float("nan")
    x, y = np.log(np.array(sorted(points)[-last:])).T
    return float(np.polyfit(x, y, 1)[0])


def plot_log_log(
    path: Path, curves: dict[str, list[tuple[float, float]]], x_label: str, y_label: str
) -> None:
    """Curves over two logarithmic axes, as a PNG; one called "roof" is dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
    axes.set_xscale("log", base=2)
    for name, points in curves.items():
        style = "k--" if name == "roof" else ".-"
        axes.plot(*zip(*sorted(points), strict=True), style, label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
