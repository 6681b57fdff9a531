"""What a person sees of a run: a line, a curve, a log."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from h3lm.train.recipe import Recipe


class ProgressLine(TrainerCallback):
    """A live line with step, loss, tokens/s and time left; a plain line now and then in a log."""

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe, self.console = recipe, console
        self.tokens_per_step = recipe.batch_size * recipe.block_length
        self.loss: float | None = None
        self.validation: float | None = None
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
        self.began, self.first = time.monotonic(), state.global_step
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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show where the run is."""
        now = time.monotonic()
        if now - self.shown_at < 0.2:
            return
        self.shown_at = now
        elapsed = now - self.began
        done = self._done(state, elapsed)
        rate = (state.global_step - self.first) * self.tokens_per_step / elapsed
        left = elapsed * (1 - done) / done if done else 0.0
        loss = "" if self.loss is None else f"loss {self.loss:.3f}  "
        valid = "" if self.validation is None else f"valid {self.validation:.3f}  "
        text = f"{loss}{valid}{rate:,.0f} tokens/s  {left:,.0f} s left"
        if self.console.is_terminal:
            self.progress.update(self.task, completed=done, step=state.global_step, text=text)
            self.progress.refresh()
        elif now - self.plain_at > 15:
            self.plain_at = now
            self.console.print(f"step {state.global_step}  {text}", highlight=False)

    def _done(self, state: TrainerState, elapsed: float) -> float:
        if self.recipe.time_limit_s is not None:
            return min(1.0, elapsed / self.recipe.time_limit_s)
        steps = state.max_steps - self.first
        return (state.global_step - self.first) / steps if steps else 1.0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the line away."""
        if self.console.is_terminal:
            self.progress.stop()


class StopAfter(TrainerCallback):
    """Ends the run when its time is over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self.began = time.monotonic()

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        began = getattr(self, "began", None)
        return 0.0 if began is None else min(1.0, (time.monotonic() - began) / self.seconds)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop when the time is over."""
        if self.progress >= 1.0:
            control.should_training_stop = True


def write_log(history: list[dict[str, Any]], path: Path) -> None:
    """The run's log, a JSON object a line."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


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
