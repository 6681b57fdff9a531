"""What a person sees of a run: a line, a curve, a log."""

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from h3lm.train.processes import first_says

MARKS = 11  # ten logs
LIVE_EVERY_S, PLAIN_EVERY_S = 0.2, 15.0  # a line in a terminal, and in a file


class Clock(TrainerCallback):
    """How long a run has trained, earlier starts included; ends it when its time is over.

    With several processes the first one's clock counts, so that all have the same learning rate
    and stop at the same step.

    Args:
        limit_s: When to stop; never if None.
        before_s: Seconds that earlier starts have trained.
    """

    def __init__(self, limit_s: float | None, before_s: float = 0.0) -> None:
        self.limit_s, self.before_s = limit_s, before_s
        self.began: float | None = None
        self.progress = 0.0 if limit_s is None else min(1.0, before_s / limit_s)

    @property
    def elapsed_s(self) -> float:
        """Seconds trained so far."""
        now = 0.0 if self.began is None else time.monotonic() - self.began
        return self.before_s + now

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self.began = time.monotonic()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Agree on the time before the learning rate is set."""
        if self.limit_s is not None:
            elapsed = first_says(self.elapsed_s)
            self.progress = min(1.0, elapsed / self.limit_s)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop when the time is over, with a checkpoint if the run writes any."""
        if self.limit_s is not None and self.progress >= 1.0:
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO


class Speed(TrainerCallback):
    """Tokens a second, part of the hardware's peak, and time left.

    The rate is that of the last few logs, between which a GPU has really done what it was given:
    so neither what is compiled at the start nor evaluations and checkpoints are in it. The time
    left counts on as many of these as there were.

    Args:
        clock: The run's clock.
        tokens_per_step: Tokens of an optimiser step, over all processes.
        peak_tokens_per_s: What the hardware could do at most, if known.
    """

    def __init__(
        self, clock: Clock, tokens_per_step: int, peak_tokens_per_s: float | None = None
    ) -> None:
        self.clock, self.tokens_per_step = clock, tokens_per_step
        self.peak_tokens_per_s = peak_tokens_per_s
        self.marks: deque[tuple[int, float]] = deque(maxlen=MARKS)  # step, seconds of training
        self.aside_s = 0.0  # not training, in this start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Remember where this start began."""
        self.aside_s = 0.0
        self.marks.clear()
        self.mark(state)

    def mark(self, state: TrainerState) -> None:
        """Note how long the steps so far have taken; whatever they gave the GPU is done."""
        if len(self.marks) == 2 and self.marks[1][0] < state.global_step:
            self.marks.popleft()  # the start, which is slow
        self.marks.append((state.global_step, self._elapsed_s - self.aside_s))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is not training: an evaluation, a checkpoint."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        began = time.monotonic()
        yield
        self.aside_s += time.monotonic() - began

    @property
    def _elapsed_s(self) -> float:
        return self.clock.elapsed_s - self.clock.before_s

    def figures(self, state: TrainerState) -> dict[str, float]:
        """`tokens_per_s`, `seconds_left`, and `mfu` where the peak is known; at first nothing."""
        if not self.marks:
            return {}
        (first, began), (last, ended) = self.marks[0], self.marks[-1]
        if last == first or ended <= began:
            return {}
        rate = (last - first) * self.tokens_per_step / (ended - began)
        if self.clock.limit_s is not None:
            left = max(0.0, self.clock.limit_s - self.clock.elapsed_s)
        else:
            steps = state.max_steps - state.global_step
            training = self._elapsed_s - self.aside_s
            left = steps * self.tokens_per_step / rate * (1 + self.aside_s / training)
        figures = {"tokens_per_s": rate, "seconds_left": left}
        if self.peak_tokens_per_s is not None:
            figures["mfu"] = rate / self.peak_tokens_per_s
        return figures

    def done(self, state: TrainerState) -> float:
        """How much of the run is done, from 0 to 1."""
        if self.clock.limit_s is not None:
            return min(1.0, self.clock.elapsed_s / self.clock.limit_s)
        return state.global_step / max(1, state.max_steps)


class ProgressLine(TrainerCallback):
    """A live line with step, loss, tokens/s and time left; a plain line now and then in a log."""

    def __init__(self, speed: Speed, console: Console) -> None:
        self.speed, self.console = speed, console
        self.loss: float | None = None
        self.validation: float | None = None
        self.accuracy: float | None = None
        self.progress = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
            auto_refresh=False,
        )
        self.plain_at = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the line."""
        self.shown_at = 0.0
        if self.console.is_terminal:
            self.progress.start()
            self.task = self.progress.add_task("", total=1.0, step=0, text="")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep the newest losses."""
        self.loss = (logs or {}).get("loss", self.loss)
        self.validation = (logs or {}).get("eval_loss", self.validation)
        self.accuracy = (logs or {}).get("eval_accuracy", self.accuracy)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show where the run is."""
        now = time.monotonic()
        if now - self.shown_at < LIVE_EVERY_S:
            return
        self.shown_at = now
        text = self._text(state)
        if self.console.is_terminal:
            done = self.speed.done(state)
            self.progress.update(self.task, completed=done, step=state.global_step, text=text)
            self.progress.refresh()
        elif text and now - self.plain_at > PLAIN_EVERY_S:
            self.plain_at = now
            self.console.print(f"step {state.global_step}  {text}", highlight=False)

    def _text(self, state: TrainerState) -> str:
        figures = self.speed.figures(state)
        parts = []
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.validation is not None:
            parts.append(f"valid {self.validation:.3f}")
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.3f}")
        if figures:
            parts.append(f"{figures['tokens_per_s']:,.0f} tokens/s")
        if "mfu" in figures:
            parts.append(f"{figures['mfu']:.1%} of peak")
        if figures:
            parts.append(f"{timedelta(seconds=round(figures['seconds_left']))} left")
        return "  ".join(parts)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the line away."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also when a run ends before its time."""
        if self.console.is_terminal:
            self.progress.stop()


class LogFile(TrainerCallback):
    """The run's log in a file as it grows, a JSON object a line.

    A run that goes on writes it anew, up to the checkpoint that it goes on from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write what a checkpoint knows."""
        self._write(state.log_history, "w")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the newest entry."""
        self._write(state.log_history[-1:], "a")

    def _write(self, entries: list[dict[str, Any]], mode: str) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)


def plot_losses(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training and validation loss over steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(path, dpi=150)
