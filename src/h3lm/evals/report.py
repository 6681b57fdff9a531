"""A folder that tells what was measured: JSON, Markdown, a picture, every document."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from h3lm.errors import UserError
from h3lm.evals.harness import TaskResult
from h3lm.evals.protocol import COLUMNS, METRICS, PROMPTS, figure_of, superglue_table
from h3lm.evals.run_folder import DOCUMENTS, REPORT, markdown_table, versions
from h3lm.evals.scorer import Work


@dataclass(frozen=True)
class TaskReport:
    """What a run of tasks found, and how.

    Attributes:
        model: As the user named it.
        fingerprint: Hash of configuration and weights.
        num_parameters: Parameters of the model.
        num_fewshot: Examples in front of each document.
        fixed_fewshot: Whether they are the same for a whole task.
        precision: What the model computed in.
        device: Where.
        max_length: Longest input in tokens.
        truncated: Requests whose context was cut from the left to fit.
        results: By task.
        left_out: Tasks of a group that could not be run, and why.
        files: SHA-256 of each local file.
        work: What the prefix tree did.
        command: The command line.
    """

    model: str
    fingerprint: str
    num_parameters: int
    num_fewshot: int
    fixed_fewshot: bool
    precision: str
    device: str
    max_length: int
    truncated: int
    results: dict[str, TaskResult]
    left_out: dict[str, str]
    files: dict[str, str]
    work: Work
    command: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON; documents are in a file of their own."""
        tasks = {
            name: {
                "metrics": {
                    metric: {"value": value, "stderr": error}
                    for metric, (value, error) in result.metrics.items()
                },
                "documents": len(result.documents),
                "majority_class": result.majority,
                "notes": result.notes,
            }
            for name, result in self.results.items()
        }
        plain = {key: value for key, value in vars(self).items() if key not in ("results", "work")}
        return plain | {"tasks": tasks, "work": asdict(self.work), "versions": versions()}

    def markdown(self) -> str:
        """For people."""
        shots = f"{self.num_fewshot}-shot" + (", the same examples" * self.fixed_fewshot)
        lines = [
            f"# {self.model}, {shots}",
            "",
            *markdown_table(
                superglue_table(
                    self.results,
                    num_fewshot=self.num_fewshot,
                    num_parameters=self.num_parameters,
                    model=Path(self.model).name,
                )
            ),
            *([PROMPTS, ""] if set(self.results) & set(COLUMNS) else []),
            *markdown_table(self._every_task()),
        ]
        said = [f"- {name}: {n}" for name, r in self.results.items() for n in r.notes]
        said += [f"- {name}: left out; {why}" for name, why in self.left_out.items()]
        if self.truncated:
            said.append(
                f"- {self.truncated:,} requests were longer than {self.max_length:,} tokens and "
                "were cut from the left"
            )
        work = self.work
        saved = work.asked / work.computed if work.computed else 1.0
        return "\n".join(
            [
                *lines,
                *([*said, ""] if said else []),
                f"Tokens: {work.asked:,} asked, {work.computed:,} computed ({saved:.1f} times "
                f"fewer), {work.run:,} run with padding, in {work.seconds:.1f} s; {self.precision} "
                f"on {self.device}; contexts of at most {self.max_length:,} tokens.",
                "",
                f"`{self.command}`",
                "",
            ]
        )

    def _every_task(self) -> list[list[str]]:
        rows = [["task", "metric", "value", "standard error", "majority class", "documents"]]
        for name, result in self.results.items():
            for metric, (value, error) in result.metrics.items():
                rows.append(
                    [
                        name,
                        metric,
                        f"{value:.4f}",
                        "" if error is None else f"{error:.4f}",
                        "" if result.majority is None else f"{result.majority:.4f}",
                        f"{len(result.documents):,}",
                    ]
                )
        return rows


def write_report(report: TaskReport, folder: Path) -> None:
    """Write report.json, report.md, report.png and documents.jsonl.

    Raises:
        UserError: if they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / DOCUMENTS).open("w", encoding="utf-8") as file:
            for name, result in report.results.items():
                for document in result.documents:
                    file.write(json.dumps({"task": name, **document}) + "\n")
        (folder / "report.md").write_text(report.markdown(), encoding="utf-8")
        _draw(report, folder / "report.png")
        (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None


def _draw(report: TaskReport, path: Path) -> None:
    """Accuracies with two standard errors, and the majority class of each task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.7 * len(report.results), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (name, result) in enumerate(report.results.items()):
        value, error = result.metrics.get(METRICS.get(name, "acc"), figure_of(name, result))
        axes.errorbar(place, value, yerr=2 * (error or 0.0), fmt="o", color="C0", capsize=3)
        if result.majority is not None:
            axes.hlines(result.majority, place - 0.3, place + 0.3, color="C1")
    axes.set_xticks(range(len(report.results)), list(report.results), rotation=45, ha="right")
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy, ± 2 standard errors")
    axes.set_title(f"{Path(report.model).name}; line: majority class", fontsize="medium")
    figure.savefig(path, dpi=130)
