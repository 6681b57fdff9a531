"""Two reports side by side, and what differs by more than chance."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from h3lm.errors import UserError
from h3lm.evals.figures import UNITS, influence, parts_of, standard_error
from h3lm.evals.run_folder import DOCUMENTS, REPORT


@dataclass(frozen=True)
class Difference:
    """One figure in two reports.

    Attributes:
        task: The task.
        metric: Its metric.
        first, second: The figures.
        error: Standard error of second - first, None if it cannot be known.
        paired: Number of documents that both scored, where the error is of their differences; 0
            where it is of two figures that know nothing of each other.
    """

    task: str
    metric: str
    first: float
    second: float
    error: float | None
    paired: int

    @property
    def difference(self) -> float:
        """Second less first."""
        return self.second - self.first

    @property
    def is_clear(self) -> bool:
        """Whether they differ by more than two standard errors."""
        return self.error is not None and abs(self.difference) > 2 * self.error


def compare(first: Path, second: Path) -> list[Difference]:
    """Compare the figures that two report folders share.

    Documents, and parts of texts, are paired by task and content: then the error is that of the
    mean of differences, which is smaller than that of two independent figures.

    Raises:
        UserError: if one is no report folder, or they share no figure.
    """
    a, b = _read(first), _read(second)
    if a.get("num_fewshot") != b.get("num_fewshot"):
        if "num_fewshot" not in a or "num_fewshot" not in b:
            raise UserError(f"{first} and {second}: one is of tasks, one of perplexity")
        raise UserError(
            f"{first} is {a['num_fewshot']}-shot, {second} {b['num_fewshot']}-shot: they do not "
            "measure the same"
        )
    documents = [_documents(folder) for folder in (first, second)]
    found = []
    for task in a["tasks"]:
        if task not in b["tasks"]:
            continue
        theirs = b["tasks"][task]["metrics"]
        for metric, mine in a["tasks"][task]["metrics"].items():
            if metric in theirs:
                found.append(_difference(task, metric, mine, theirs[metric], documents))
    if not found:
        raise UserError(f"{first} and {second} have no task or text in common")
    return found


def lines(differences: list[Difference], names: tuple[str, str]) -> str:
    """A table for people."""
    width = max(len(f"{d.task} {d.metric}") for d in differences)
    head = f"{'':{width}}  {names[0][-12:]:>12}  {names[1][-12:]:>12}  {'difference':>20}"
    rows = [head]
    for d in differences:
        error = "" if d.error is None else f" ± {d.error:.4f}"
        said = f"paired by {d.paired:,} documents" if d.paired else "not paired"
        rows.append(
            f"{f'{d.task} {d.metric}':{width}}  {d.first:12.4f}  {d.second:12.4f}  "
            f"{f'{d.difference:+.4f}{error}':>20}  {'*' if d.is_clear else ' '} {said}"
        )
    return "\n".join([*rows, "* differs by more than two standard errors"])


def _difference(
    task: str,
    metric: str,
    mine: dict[str, Any],
    theirs: dict[str, Any],
    documents: list[dict[tuple[str, int, str], dict[str, float]]],
) -> Difference:
    # a text's figures are ratios over all of its parts, a task's are means of its documents
    of_text = "nats" in next((m for k, m in documents[0].items() if k[0] == task), {})
    needed = {"nats", UNITS[metric]} if of_text else {metric}
    shared = [
        key
        for key, metrics in documents[0].items()
        if key[0] == task and needed <= metrics.keys() & documents[1].get(key, {}).keys()
    ]
    every = all(
        sum(key[0] == task for key in side) == len(shared) for side in documents
    )  # a mean over other documents is another figure
    error: float | None = None
    paired = 0
    if every and len(shared) > 1 and of_text:
        sides = (parts_of([side[k] for k in shared], metric) for side in documents)
        ours, others = (influence(metric, *side) for side in sides)
        error, paired = standard_error(others - ours), len(shared)
    elif every and len(shared) > 1:
        apart = np.array([documents[1][k][metric] - documents[0][k][metric] for k in shared])
        if abs(apart.mean() - (theirs["value"] - mine["value"])) < 1e-9:  # a mean of documents
            error, paired = float(apart.std(ddof=1)) / math.sqrt(len(shared)), len(shared)
    if error is None and mine["stderr"] is not None and theirs["stderr"] is not None:
        error = math.hypot(mine["stderr"], theirs["stderr"])
    return Difference(task, metric, mine["value"], theirs["value"], error, paired)


def _read(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{folder}: no report here (no {REPORT}); make one with: h3lm eval MODEL --tasks ... "
            "--output DIR"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / REPORT}: is damaged ({error})") from None
    if "tasks" not in report:
        raise UserError(f"{folder / REPORT}: is no report of an evaluation")
    return report


def _documents(folder: Path) -> dict[tuple[str, int, str], dict[str, float]]:
    try:
        rows = (folder / DOCUMENTS).read_text(encoding="utf-8").splitlines()
        parsed = [json.loads(row) for row in rows]
    except OSError:
        return {}
    except ValueError as error:
        raise UserError(f"{folder / DOCUMENTS}: is damaged ({error})") from None
    return {(d["task"], d["doc_id"], d["doc_hash"]): d["metrics"] for d in parsed}
