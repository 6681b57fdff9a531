"""Finished training runs side by side: a row for each recipe, over its seeds, and their curves."""

import json
import textwrap
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from h3lm.errors import UserError
from h3lm.train.recipe import Recipe

SUMMARY, RECIPE, LOG = "summary.json", "recipe.yaml", "log.jsonl"
MEANS = {
    "val_loss": "validation loss, nats",
    "val_perplexity": "validation perplexity",
    "test_loss": "test loss, nats",
    "test_perplexity": "test perplexity",
    "accuracy": "accuracy",
}


@dataclass(frozen=True)
class Run:
    """A training run's folder.

    Attributes:
        recipe: Its recipe, whole.
        summary: What it left behind.
        curve: Tokens (or examples) seen and validation loss, at each evaluation.
    """

    recipe: dict[str, Any]
    summary: dict[str, Any]
    curve: list[tuple[int, float]]


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in their seed at most.

    Attributes:
        name: The recipe's name; where several recipes share it, with what tells them apart.
        runs: The runs, by seed.
    """

    name: str
    runs: list[Run]

    def mean(self, key: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation (None of a single run) of a figure that all runs have."""
        if any(run.summary.get(key) is None for run in self.runs):
            return None
        values = [float(run.summary[key]) for run in self.runs]
        return fmean(values), stdev(values) if len(values) > 1 else None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a finished training run."""
    return all((folder / name).is_file() for name in (SUMMARY, RECIPE))


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: if it is no finished run, or a file of it cannot be read.
    """
    if not is_run(folder):
        raise UserError(f"{folder}: no finished training run: it has no {SUMMARY} or no {RECIPE}")
    try:
        recipe = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        log = folder / LOG
        entries = [json.loads(x) for x in log.read_text().splitlines()] if log.is_file() else []
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: cannot be read: {' '.join(str(error).split())}") from None
    step = recipe["batch_size"] * (recipe["block_length"] if recipe["task"] == "language" else 1)
    curve = [(x["step"] * step, x["eval_loss"]) for x in entries if "eval_loss" in x]
    return Run(recipe, summary, curve)


def side_by_side(folders: list[Path]) -> list[Group]:
    """Runs by recipe, in the order in which the recipes are first met.

    Raises:
        UserError: if a folder is no finished run, or is named twice.
    """
    for i, folder in enumerate(folders):
        if folder.resolve() in (other.resolve() for other in folders[:i]):
            raise UserError(f"{folder}: named twice; a run counts once")
    found: dict[str, list[Run]] = {}
    for folder in folders:
        run = read_run(folder)
        found.setdefault(json.dumps(_what_decides(run), sort_keys=True), []).append(run)
    groups = [sorted(runs, key=lambda run: run.recipe["seed"]) for runs in found.values()]
    return [Group(_name(runs[0], groups), runs) for runs in groups]


def table(groups: list[Group]) -> list[dict[str, Any]]:
    """A row of figures for each recipe; a mean stands before its standard deviation."""
    rows = []
    for group in groups:
        first = group.runs[0].summary
        row: dict[str, Any] = {
            "recipe": group.name,
            "seeds": ", ".join(str(run.recipe["seed"]) for run in group.runs),
            "parameters": f"{first['parameters']:,}",
            "tokens": f"{first['tokens_seen']:,}" if "tokens_seen" in first else "-",
        }
        for key, label in MEANS.items():
            if found := group.mean(key):
                mean, spread = found
                row[label] = f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"
        rows.append(row)
    return rows


def plot(groups: list[Group], path: Path) -> None:
    """Validation loss of every run, one colour for a recipe, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    language = all(run.recipe["task"] == "language" for group in groups for run in group.runs)
    seen = "tokens seen, millions" if language else "examples seen, millions"
    axes = figure.add_subplot(xlabel=seen, ylabel="validation loss, nats")
    for i, group in enumerate(groups):
        curves = [run.curve for run in group.runs if run.curve]
        for j, curve in enumerate(curves):
            points = [(tokens / 1e6, loss) for tokens, loss in curve]
            label = textwrap.fill(group.name, 60) if j == 0 else None
            axes.plot(*zip(*points, strict=True), "-", color=f"C{i % 10}", label=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, for people."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write(groups: list[Group], folder: Path) -> str:
    """Write runs.md, runs.json and runs.png into a folder; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = table(groups)
    content = [
        {"recipe": group.name, "runs": [{"seed": r.recipe["seed"]} | r.summary for r in group.runs],
         "curves": [run.curve for run in group.runs], "settings": group.runs[0].recipe}
        for group in groups
    ]  # fmt: skip
    (folder / "runs.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "runs.md").write_text(markdown(rows), encoding="utf-8")
    if any(run.curve for group in groups for run in group.runs):
        plot(groups, folder / "runs.png")
    return markdown(rows)


# What a run computes does not depend on these; how its loss was taken may
FREE = {f.name for f in fields(Recipe) if f.metadata["free"]} - {"eval_stride"} | {"seed"}
DEFAULTS = asdict(Recipe(steps=1)) | {"steps": None}


def _what_decides(run: Run) -> dict[str, Any]:
    recipe = DEFAULTS | run.recipe  # one of before a key was known has its default
    kept = {key: value for key, value in recipe.items() if key not in FREE}
    return kept | {"name": recipe["name"], "data": run.summary.get("data")}


def _name(run: Run, groups: list[list[Run]]) -> str:
    """The recipe's name, and the values by which it differs from others of that name."""
    name = str(run.recipe.get("name"))
    others = [DEFAULTS | g[0].recipe for g in groups if g[0].recipe.get("name") == name]
    if len(others) == 1:
        return name
    mine, told = _flat(DEFAULTS | run.recipe), []
    for key in mine.keys() | {k for other in others for k in _flat(other)}:
        values = {json.dumps(_flat(other).get(key)) for other in others}
        if len(values) > 1 and key not in FREE:
            told.append(f"{key.removeprefix('model.')}={mine.get(key, 'default')}")
    return f"{name} ({', '.join(sorted(told))})"


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": x for inner, x in value.items()}
        else:
            flat[key] = value
    return flat
