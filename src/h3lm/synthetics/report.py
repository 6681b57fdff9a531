"""What the lab has run in a folder, as JSON and as tables."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from h3lm.errors import UserError
from h3lm.synthetics.settings import (
    MIXERS_BY_DEFAULT,
    PAPER_LONGER,
    SETTINGS,
    TO_THE_END,
    known_setting,
)

CUT = "†"  # marks what the time allowed cut short
TIED = 0.002  # of accuracies: one of a task's 500 test rows
CURVE_POINTS = 40  # the whole grid of seven tasks stays below a megabyte
_COLUMNS = (
    "mixer", "paper", "one recipe", "lr", "best of the search", "lr", "best look", "steps", "loss",
    "parameters", "state, floats",
)  # fmt: skip


@dataclass
class Run:
    """One trained model, as it is written to the report.

    Attributes:
        setting: Name of the setting.
        mixer: The mixer, as it was asked for.
        kind: "recipe" or "search".
        seed: Of data and start.
        learning_rate: Peak rate.
        planned_steps: Steps of its schedule.
        steps: Steps taken; fewer where it had solved the task.
        accuracy: Test accuracy at the end.
        best_accuracy: Best test accuracy at any look.
        test_loss: Loss of the answers at the end, nats.
        longer: Accuracy at further lengths.
        curve: (step, training loss, test accuracy) at each look.
        finished: Whether its schedule was over, or it stopped as a model that solved its task;
            False where the time allowed was over first.
    """

    setting: str
    mixer: str
    kind: str
    seed: int
    learning_rate: float
    planned_steps: int
    steps: int
    accuracy: float
    best_accuracy: float
    test_loss: float
    longer: dict[str, float]
    curve: list[tuple[int, float, float]]
    finished: bool = True

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from other runs: setting, mixer, kind, seed, rate and schedule."""
        return (
            self.setting, self.mixer, self.kind, self.seed, self.learning_rate, self.planned_steps,
        )  # fmt: skip

    def to_json(self) -> str:
        """One line of at most `CURVE_POINTS` looks; null for NaN, which JSON does not know."""
        every = -(-len(self.curve) // CURVE_POINTS) or 1
        kept = self.curve[::-1][::every][::-1]  # the last among them
        curve = [(step, _or_null(round(loss, 4)), round(right, 4)) for step, loss, right in kept]
        return json.dumps(asdict(self) | {"test_loss": _or_null(self.test_loss), "curve": curve})

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Run":
        """Inverse of `to_json`, of parsed text."""
        curve = [(step, _or_nan(loss), accuracy) for step, loss, accuracy in fields["curve"]]
        return cls(**fields | {"test_loss": _or_nan(fields["test_loss"]), "curve": curve})


def merit(finished: bool, accuracy: float, test_loss: float) -> tuple[bool, float, float]:
    """By what the best of several models is chosen: the largest."""
    return finished, _or_least(accuracy), _or_least(-test_loss)


class Report:
    """Everything that was run in a folder, and its tables."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[Run] = []
        self.baselines: dict[str, list[dict[str, Any]]] = {}
        self.longer_baselines: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.sizes: dict[str, dict[str, int]] = {}
        self.calls: list[str] = []  # what was trained when and where, a line each

    @classmethod
    def open(cls, folder: Path) -> "Report":
        """The report of a folder, empty if it has none.

        Raises:
            UserError: if the folder cannot be made or its report cannot be read.
        """
        report = cls(folder / "report.json")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            exists = report.path.exists()
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from None
        return cls.of(folder) if exists else report

    @classmethod
    def of(cls, folder: Path) -> "Report":
        """The report that a folder holds.

        Raises:
            UserError: if there is none.
        """
        report = cls(folder / "report.json")
        try:
            stored = json.loads(report.path.read_text())
            report.runs = [Run.from_json(run) for run in stored["runs"]]
            report.baselines, report.sizes = stored["baselines"], stored["sizes"]
            report.longer_baselines = stored.get("longer_baselines", {})
            report.calls = stored.get("calls", [])
        except OSError as error:
            raise UserError(f"cannot read {report.path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{report.path} is not a report of this lab: move it away or choose another folder"
            ) from None
        return report

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        """Whether there is a finished run of this `Run.key`."""
        return any(run.key == key and run.finished for run in self.runs)

    def add(self, setting: str, mixer: str, runs: list[Run], size: dict[str, int]) -> None:
        """Take up the runs of a setting and mixer."""
        self._take(runs)
        self.sizes[f"{setting} {mixer}"] = size

    def merge(self, other: "Report") -> None:
        """Take up what another report holds and this one lacks."""
        self._take(other.runs)
        self.sizes = other.sizes | self.sizes
        self.baselines = other.baselines | self.baselines
        self.longer_baselines = other.longer_baselines | self.longer_baselines
        self.calls += [call for call in other.calls if call not in self.calls]

    def _take(self, runs: list[Run]) -> None:
        """Add runs; of two of the same key the one that came further stays."""
        kept = {run.key: run for run in self.runs}
        for run in runs:
            held = kept.get(run.key)
            if held is None or (run.finished, run.steps) > (held.finished, held.steps):
                kept[run.key] = run
        self.runs = list(kept.values())

    def write(self) -> None:
        """Write the JSON and the tables."""
        # one run to a line: thousands of numbers on lines of their own would be the larger file
        runs = ",\n".join(run.to_json() for run in self.runs)
        names = ("baselines", "longer_baselines", "sizes", "calls")
        rest = ",\n".join(f'"{name}": {json.dumps(getattr(self, name))}' for name in names)
        text = f'{{"runs": [\n{runs}\n],\n{rest}}}\n'
        partial = self.path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(self.path)  # never half a report
        self.path.with_suffix(".md").write_text(self.markdown())

    def settings(self) -> list[str]:
        """Settings in the order in which they were run."""
        return list(dict.fromkeys(run.setting for run in self.runs))

    def mixers(self, setting: str) -> list[str]:
        """Mixers of a setting, the default ones first, others by name."""
        found = dict.fromkeys(r.mixer for r in self.runs if r.setting == setting)
        known = {mixer: i for i, mixer in enumerate(MIXERS_BY_DEFAULT)}
        return sorted(found, key=lambda mixer: (known.get(mixer, len(known)), mixer))

    def select(self, setting: str, mixer: str, kind: str) -> list[Run]:
        """Runs of one kind: those of the recipe, or those of the search's best rate.

        The rate (and the schedule, where a folder holds several) is chosen by what came out at
        the task's own length only: by the mean test accuracy at the end, where rates that are not
        more than `TIED` behind the best are equal to it; of these by how many are finished, and
        then by the mean test loss.
        """
        runs = [r for r in self.runs if (r.setting, r.mixer, r.kind) == (setting, mixer, kind)]
        if not runs:
            return []

        groups: dict[tuple[float, int], list[Run]] = {}
        for run in runs:
            groups.setdefault((run.learning_rate, run.planned_steps), []).append(run)

        def merit(same: list[Run]) -> tuple[float, float]:
            loss, finished = fmean(r.test_loss for r in same), fmean(r.finished for r in same)
            return finished, -math.inf if math.isnan(loss) else -loss

        means = [fmean(_or_least(r.accuracy) for r in same) for same in groups.values()]
        equal = [
            g for g, m in zip(groups.values(), means, strict=True) if m >= max(means) - TIED - 1e-9
        ]
        best = max(equal, key=merit)
        return sorted(best, key=lambda run: run.seed)

    def summary(self, setting: str, mixer: str) -> str:
        """One line of what came out."""
        parts = []
        for kind in ("recipe", "search"):
            if runs := self.select(setting, mixer, kind):
                parts.append(f"{kind} {_spread([r.accuracy for r in runs])} %")
        return ", ".join(parts)

    def markdown(self) -> str:
        """All tables, under what they were made by."""
        calls = [f"- {call}" for call in self.calls]
        tables = [self._table(setting) for setting in self.settings()]
        head = ["# Expressivity lab", "", *calls, *([""] if calls else [])]
        return "\n".join([*head, *self._beside_the_paper(), *tables])

    def _beside_the_paper(self) -> list[str]:
        """One table of the settings of which the paper has figures; none for fewer than two."""
        names = self.settings()  # of those to the end only where they stand alone
        found = [
            (s, known_setting(s))
            for s in names
            if s.removesuffix(TO_THE_END) not in names or s in SETTINGS
        ]
        papers = {s: known.paper for s, known in found if known and known.paper}
        settings = list(papers)
        if len(settings) < 2:
            return []
        kinds = ("paper", "one recipe", "best of the search")
        columns = [f"{setting}, {kind}" for setting in settings for kind in kinds]
        lines = [
            "## Beside the paper's table",
            "",
            f"| mixer | {' | '.join(columns)} |",
            "|---" * (1 + len(columns)) + "|",
        ]
        for mixer in dict.fromkeys(m for s in settings for m in self.mixers(s)):
            cells = [mixer]
            for setting in settings:
                paper = papers[setting]
                seeds = len({run.seed for run in self.runs if run.setting == setting})
                cells.append(f"{paper[mixer]:.1f}" if mixer in paper else "-")
                for kind in ("recipe", "search"):
                    cells.append(_cells(self.select(setting, mixer, kind), seeds)[0])
            lines.append(f"| {' | '.join(cells)} |")
        return [*lines, ""]

    def _table(self, setting: str) -> str:
        known = known_setting(setting)
        paper = known.paper if known else {}
        lines = [
            f"## {setting}",
            "",
            "Accuracy in per cent at the last step, mean over seeds (spread: standard deviation). "
            "The columns from the best look at the test rows on are of the search if there is one.",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            "|---" * len(_COLUMNS) + "|",
        ]
        seeds = len({run.seed for run in self.runs if run.setting == setting})
        for mixer in self.mixers(setting):
            recipe, search = (self.select(setting, mixer, kind) for kind in ("recipe", "search"))
            shown = search or recipe
            size = self.sizes[f"{setting} {mixer}"]
            cells = [
                mixer,
                f"{paper[mixer]:.1f}" if mixer in paper else "-",
                *(cell for runs in (recipe, search) for cell in _cells(runs, seeds)),
                _spread([r.best_accuracy for r in shown]),
                f"{fmean(r.steps for r in shown):,.0f}",
                _loss(shown),
                f"{size['parameters']:,}",
                f"{size['state_floats']:,}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += self._unfinished(setting)
        lines += ["", "Rules that learn nothing, on the same test rows:", ""]
        lines += ["| rule | accuracy | loss |", "|---|---|---|"]
        for b in self.baselines[setting]:
            loss = "-" if b["loss"] is None else f"{b['loss']:.3f}"
            lines.append(f"| {b['rule']} | {100 * b['accuracy']:.1f} | {loss} |")
        return "\n".join([*lines, "", *self._longer(setting)])

    def _unfinished(self, setting: str) -> list[str]:
        """What the time allowed cut short, of what the table shows and what it chose among."""
        lines = []
        for mixer in self.mixers(setting):
            runs = [r for r in self.runs if (r.setting, r.mixer) == (setting, mixer)]
            cut = [r for r in runs if not r.finished]
            if cut:
                lines.append(
                    f"{CUT} {mixer}: {len(cut)} of {len(runs)} trainings were cut short by the "
                    f"time allowed, at step {max(r.steps for r in cut):,} of "
                    f"{max(r.planned_steps for r in cut):,}, their rate still high."
                )
        return ["", *lines] if lines else []

    def _longer(self, setting: str) -> list[str]:
        lengths = sorted({int(n) for r in self.runs if r.setting == setting for n in r.longer})
        if not lengths:
            return []
        lines = [
            "Accuracy at other test lengths, same models:",
            "",
            f"| mixer | {' | '.join(map(str, lengths))} |",
            f"|---|{'---|' * len(lengths)}",
        ]
        for mixer in self.mixers(setting):
            runs = self.select(setting, mixer, "search") or self.select(setting, mixer, "recipe")
            cells = []
            for length in lengths:
                found = [r.longer[str(length)] for r in runs if str(length) in r.longer]
                paper = PAPER_LONGER.get((setting.removesuffix(TO_THE_END), mixer, length))
                note = f" (paper {paper})" if paper else ""
                cells.append(f"{_spread(found)}{note}" if found else "no positions there")
            lines.append(f"| {mixer} | {' | '.join(cells)} |")
        tables = self.longer_baselines.get(setting, {})
        rules = {b["rule"]: None for table in tables.values() for b in table}
        for rule in rules:
            cells = [
                f"{100 * b['accuracy']:.1f}"
                for length in lengths
                for b in tables[str(length)]
                if b["rule"] == rule
            ]
            lines.append(f"| *{rule}* | {' | '.join(cells)} |")
        return [*lines, ""]


def _cells(runs: list[Run], seeds: int) -> tuple[str, str]:
    """Accuracy, with what sets it apart from others of its table, and rate."""
    if not runs:
        return "-", "-"
    fewer = "" if len(runs) == seeds else f" ({len(runs)} of {seeds} seeds)"
    cut = "" if all(r.finished for r in runs) else f" {CUT}"
    return _spread([r.accuracy for r in runs]) + fewer + cut, f"{runs[0].learning_rate:g}"


def _loss(runs: list[Run]) -> str:
    loss = fmean(r.test_loss for r in runs)
    return "some diverged" if math.isnan(loss) else f"{loss:.3f}"


def _or_least(x: float) -> float:
    return -math.inf if math.isnan(x) else x


def _or_null(x: float) -> float | None:
    return None if math.isnan(x) else x


def _or_nan(x: float | None) -> float:
    return math.nan if x is None else x


def _spread(accuracies: list[float]) -> str:
    mean = f"{100 * fmean(accuracies):.1f}"
    return mean if len(accuracies) == 1 else f"{mean} ± {100 * pstdev(accuracies):.1f}"
