"""The paper's protocol: its columns in its order, and its rows beside ours.

Source: Fu et al. 2023 (arXiv 2212.14052v3), Tables 5 and 6: SuperGLUE by rank classification on
logits, zero-shot and 3-shot. Averages there are plain means of the columns. The paper gives no
prompts; the harness's follow GPT-3's style but need not be the same.
"""

from collections.abc import Mapping

from h3lm.evals.harness import SUPERGLUE, TaskResult

COLUMNS = dict(
    zip(SUPERGLUE, ("WSC", "WIC", "RTE", "CB", "MultiRC", "ReCoRD", "BoolQ", "COPA"), strict=True)
)
METRICS = {"multirc": "acc_right", "record": "f1"}  # accuracy everywhere else
PROMPTS = (
    "The paper's rows were made with prompts that it does not print; ours are those of "
    "lm-eval's task definitions, so figures are not expected to agree digit for digit."
)

_Rows = dict[str, tuple[float, ...]]
ZERO_SHOT: dict[str, _Rows] = {
    "125m": {
        "OPT-125M": (39.4, 52.0, 48.7, 37.4, 58.9, 44.9, 59.6, 60.0),
        "GPT-Neo-125M": (36.5, 53.6, 53.1, 41.1, 59.9, 39.6, 62.2, 60.0),
        "Hybrid H3-125M": (39.4, 51.4, 59.2, 48.2, 51.4, 55.0, 59.6, 67.0),
    },
    "355m": {
        "GPT-2 medium (355M)": (50.0, 52.0, 51.3, 28.6, 59.5, 53.3, 61.0, 65.0),
        "OPT-350M": (53.5, 50.8, 53.4, 35.7, 58.9, 51.4, 60.9, 60.0),
        "Hybrid H3-355M": (37.5, 51.7, 55.2, 41.1, 59.5, 62.3, 61.5, 69.0),
    },
    "1.3b": {
        "OPT-1.3B": (36.5, 49.5, 53.4, 39.3, 58.3, 61.8, 55.0, 69.0),
        "GPT-Neo-1.3B": (41.3, 50.0, 52.3, 33.9, 57.9, 55.5, 59.9, 66.0),
        "Hybrid H3-1.3B": (52.9, 50.3, 53.4, 33.9, 58.2, 67.8, 61.7, 74.0),
    },
    "2.7b": {
        "OPT-2.7B": (51.0, 50.8, 50.5, 41.1, 57.4, 65.9, 60.9, 66.0),
        "Hybrid H3-2.7B": (36.5, 51.3, 57.0, 37.5, 58.7, 71.3, 61.1, 81.0),
    },
}
THREE_SHOT: dict[str, _Rows] = {
    "125m": {
        "OPT-125M": (36.5, 50.2, 47.3, 44.6, 57.9, 44.9, 41.9, 60.0),
        "GPT-Neo-125M": (38.5, 50.0, 53.1, 17.9, 56.3, 39.6, 62.1, 60.0),
        "Hybrid H3-125M": (43.3, 49.1, 58.1, 51.8, 48.9, 55.0, 56.1, 67.0),
    },
    "355m": {
        "GPT-2 medium (355M)": (36.5, 50.5, 48.0, 8.9, 43.5, 53.3, 58.8, 65.0),
        "OPT-350M": (37.5, 50.0, 45.8, 44.6, 49.8, 51.4, 61.7, 60.0),
        "Hybrid H3-355M": (42.3, 47.5, 50.5, 28.6, 59.7, 62.3, 60.5, 69.0),
    },
    "1.3b": {
        "OPT-1.3B": (44.2, 51.1, 53.4, 16.1, 59.9, 62.1, 38.3, 70.0),
        "GPT-Neo-1.3B": (35.6, 50.6, 47.3, 32.1, 59.9, 55.7, 61.2, 67.0),
        "Hybrid H3-1.3B": (36.5, 49.2, 55.2, 23.2, 59.3, 67.6, 56.9, 76.0),
    },
    "2.7b": {
        "OPT-2.7B": (44.2, 50.5, 53.4, 17.9, 59.2, 66.0, 62.0, 71.0),
        "GPT-Neo-2.7B": (49.0, 51.9, 51.6, 21.4, 57.0, 60.0, 56.0, 68.0),
        "Hybrid H3-2.7B": (36.5, 45.6, 47.3, 46.4, 59.4, 71.1, 60.6, 77.0),
    },
}
_SIZES = {"125m": 125e6, "355m": 355e6, "1.3b": 1.3e9, "2.7b": 2.7e9}


def nearest_size(num_parameters: int) -> str:
    """The paper's size whose number of parameters is nearest, as a ratio."""
    return min(_SIZES, key=lambda s: max(_SIZES[s] / num_parameters, num_parameters / _SIZES[s]))


def superglue_table(
    results: Mapping[str, TaskResult], *, num_fewshot: int, num_parameters: int, model: str
) -> list[list[str]]:
    """SuperGLUE as the paper prints it, in per cent; the first row is the head.

    Columns that were not scored, or not on the official split, are in no average: neither in
    ours nor in the paper's rows, so that averages compare.

    Returns:
        Rows of cells: ours with standard errors, the majority class, and the paper's rows of the
        nearest size where it has them (0 and 3 shots). Empty if no task of SuperGLUE was scored.
    """
    if not set(results) & set(COLUMNS):
        return []
    counted = [t for t in COLUMNS if t in results and not _unofficial(results[t])]
    head = ["", *COLUMNS.values(), f"average of {len(counted)}"]
    ours, majority = [model], ["majority class"]
    for task in COLUMNS:
        figure, error = figure_of(task, results[task]) if task in results else (None, None)
        mark = "†" if task in results and _unofficial(results[task]) else ""
        ours.append(_percent(figure, error) + mark)
        majority.append(_percent(results[task].majority if task in results else None))
    figures = [figure_of(t, results[t]) for t in counted]
    if figures:
        squares = sum((error or 0.0) ** 2 for _, error in figures)
        ours.append(
            _percent(sum(f for f, _ in figures) / len(figures), squares**0.5 / len(figures))
        )
    else:
        ours.append("")
    known = [results[t].majority for t in counted]
    majority.append(
        _percent(sum(x or 0.0 for x in known) / len(known)) if known and all(known) else ""
    )
    table = [head, ours, majority]
    rows = {0: ZERO_SHOT, 3: THREE_SHOT}.get(num_fewshot, {})
    for name, values in rows.get(nearest_size(num_parameters), {}).items():
        cells = dict(zip(COLUMNS, values, strict=True))
        mean = sum(cells[t] for t in counted) / len(counted) if counted else None
        table.append(
            [
                f"{name} (paper)",
                *(f"{v:.1f}" for v in values),
                "" if mean is None else f"{mean:.1f}",
            ]
        )
    return table


def figure_of(task: str, result: TaskResult) -> tuple[float, float | None]:
    """The one figure of a task that tables show, and its standard error."""
    preferred = (METRICS.get(task, "acc"), "acc", *result.metrics)
    return result.metrics[next(m for m in preferred if m in result.metrics)]


def _unofficial(result: TaskResult) -> bool:
    return any(note.startswith("NO ") for note in result.notes)


def _percent(figure: float | None, error: float | None = None) -> str:
    if figure is None:
        return ""
    return f"{100 * figure:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
