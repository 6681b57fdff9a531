"""Where the time of a step goes, by kind of work: a table in the run's folder.

Work is told by the name of the operation that does it; what belongs to a recurrence, by the call of
the layer that it stands in, and its backward pass by the number that torch gives the two.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from h3lm.layers import H3

WARM_UP_STEPS = 5
LABEL = "h3lm: "
# Kinds of work by a part of an operation's name; the first that fits, inside out
BY_NAME = (
    ("communication", ("FSDP::", "c10d::", "nccl:", "gloo:")),
    ("optimizer", ("Optimizer.", "fused_adam", "clip_grad", "_foreach_")),
    ("attention", ("scaled_dot_product", "attention_backward")),
    ("making of operators", ("chunk_operators", "h3lm::bilinear", "shift_taps")),
    ("loss", ("head_loss", "log_softmax", "nll_loss", "cross_entropy", "LogSoftmax", "NllLoss")),
    ("H3 core", ("h3lm::", "h3lm_h3_core")),
    ("norms", ("layer_norm", "LayerNorm")),
    ("products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "_scaled_mm")),
)
REST = "elementwise, copies and the rest"
BACKWARD = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Profile:
    """Where the time of some steps went, in ms a step.

    Attributes:
        device: What was timed: kernels of a GPU, or operations on the CPU.
        steps: Steps that were profiled.
        step_ms: Duration of a step.
        idle_ms: Time of it without any work.
        groups: Time of each kind of work, forward and backward (recomputation included); on
            several streams of a GPU they overlap.
        longest: The kernels or operations that take most, with times called.
    """

    device: str
    steps: int
    step_ms: float
    idle_ms: float
    groups: dict[str, tuple[float, float]]
    longest: list[tuple[str, float, float]]

    def table(self) -> str:
        """The profile for people."""
        lines = [
            f"{self.steps} steps on {self.device}: {self.step_ms:.2f} ms a step, of them "
            f"{self.idle_ms:.2f} ms ({self.idle_ms / self.step_ms:.1%}) without work",
            "",
            f"{'ms a step':>10} {'of all':>7} {'forward':>9} {'backward':>9}  work",
        ]
        for name, (forward, backward) in self.groups.items():
            both = forward + backward
            share = both / self.step_ms
            lines.append(f"{both:>10.2f} {share:>7.1%} {forward:>9.2f} {backward:>9.2f}  {name}")
        lines += ["", f"{'ms a step':>10} {'calls':>9}  longest"]
        lines += [f"{ms:>10.2f} {calls:>9.0f}  {name[:110]}" for name, ms, calls in self.longest]
        return "\n".join(lines) + "\n"


class Profiler(TrainerCallback):
    """Profiles some steps of a run behind its first five, and writes `profile.txt` and `.json`.

    Args:
        steps: How many.
        folder: Where to write.
        label: Whether to mark the calls of H3 layers, which would break compiled code.
    """

    def __init__(self, steps: int, folder: Path, *, label: bool) -> None:
        self.steps, self.folder, self.label = steps, folder, label
        self.seen = 0
        self.running: profile | None = None
        self.unlabel: Callable[[], None] = lambda: None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Start when the run has warmed up."""
        if self.seen == WARM_UP_STEPS:
            if self.label:
                self.unlabel = _label_recurrences(given["model"])
            activities = [ProfilerActivity.CPU]
            if args.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.synchronize()
            self.running = profile(activities=activities)
            self.running.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop when all steps are taken, and write."""
        self.seen += 1
        if self.running is not None and self.seen == WARM_UP_STEPS + self.steps:
            self._write(args.device)

    def _write(self, device: torch.device) -> None:
        assert self.running is not None
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.running.stop()
        self.unlabel()
        found = summarise(self.running.events(), self.steps, device)
        self.running = None
        (self.folder / "profile.txt").write_text(found.table(), encoding="utf-8")
        text = json.dumps(vars(found), indent=1)
        (self.folder / "profile.json").write_text(text + "\n", encoding="utf-8")


def summarise(events: Any, steps: int, device: torch.device) -> Profile:
    """Sort the events of torch's profiler into kinds of work."""
    on_gpu = device.type == "cuda"
    done = [event for event in events if event.device_type == DeviceType.CPU]
    names = {event.name for event in done}  # a range that is marked is told of a GPU, too
    kernels = [
        event for event in events if event.device_type != DeviceType.CPU and event.name not in names
    ]
    labels = _labels_by_number(done)
    groups: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    longest: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in done:
        work = [(event.name, event.self_cpu_time_total)]
        if on_gpu:
            work = [(k.name, k.duration) for k in event.kernels if k.name not in names]
        for name, us in work:
            kind, backward = _kind(event, name, labels)
            for total, column in ((groups[kind], int(backward)), (longest[name], 0)):
                total[column] += us / 1000 / steps
            longest[name][1] += 1 / steps
    spans = [event.time_range for event in [*done, *kernels]]
    whole_us = max(span.end for span in spans) - min(span.start for span in spans)
    step_ms = whole_us / 1000 / steps
    busy_ms = _covered([e.time_range for e in (kernels if on_gpu else done)]) / 1000 / steps
    ordered = sorted(groups.items(), key=lambda item: -sum(item[1]))
    top = sorted(longest.items(), key=lambda item: -item[1][0])[:20]
    return Profile(
        device=torch.cuda.get_device_name(device) if on_gpu else "the CPU",
        steps=steps,
        step_ms=step_ms,
        idle_ms=max(0.0, step_ms - busy_ms),
        groups={name: (forward, backward) for name, (forward, backward) in ordered},
        longest=[(name, ms, calls) for name, (ms, calls) in top],
    )


def communication_ms(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Communication in a step: how long it takes, and how long nothing else runs beside it.

    Args:
        step: Takes a step; all processes must.
        device: Whose kernels count; on a CPU the operations.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as running:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    where = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    words = ("nccl", "gloo:")
    spans: dict[bool, list[Any]] = {True: [], False: []}
    for event in running.events():
        if event.device_type == where:
            sends = any(word in event.name.lower() for word in words)
            if sends or where == DeviceType.CUDA:
                spans[sends].append(event.time_range)
    together = _covered(spans[True]) / 1000
    alone = (_covered(spans[True] + spans[False]) - _covered(spans[False])) / 1000
    return together, alone


def _label_recurrences(model: nn.Module) -> Callable[[], None]:
    """Mark what H3 layers do between their projections; returns what takes the marks away."""
    marked: list[tuple[nn.Module, str]] = []

    def mark(module: nn.Module, name: str, label: str) -> None:
        method = getattr(module, name)

        def labelled(*arguments: Any, **named: Any) -> Any:
            with record_function(LABEL + label):
                return method(*arguments, **named)

        vars(module)[name] = labelled
        marked.append((module, name))

    for module in model.modules():
        if isinstance(module, H3):
            mark(module, "core", "H3 core")
            mark(module, "operators", "making of operators")

    def unmark() -> None:
        for module, name in marked:
            del vars(module)[name]

    return unmark


def _labels_by_number(events: Iterable[Any]) -> dict[tuple[int, int], str]:
    """The label that each numbered operation of a forward pass stands in."""
    found = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            label = next((e.name for e in _upwards(event) if e.name.startswith(LABEL)), None)
            if label is not None:
                found[event.thread, event.sequence_nr] = label.removeprefix(LABEL)
    return found


def _kind(event: Any, name: str, labels: dict[tuple[int, int], str]) -> tuple[str, bool]:
    """The kind of work that an event does, and whether it belongs to the backward pass."""
    path = list(_upwards(event))
    backward = any(e.name.startswith(BACKWARD) for e in path)
    for e in path:
        if e.name.startswith(LABEL):
            return e.name.removeprefix(LABEL), backward
        if e.name.startswith(BACKWARD) and (e.fwd_thread, e.sequence_nr) in labels:
            return labels[e.fwd_thread, e.sequence_nr], backward
    for kind, parts in BY_NAME:
        if any(part in e for e in (name, *(e.name for e in path)) for part in parts):
            return kind, backward
    return REST, backward


def _upwards(event: Any) -> Iterable[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _covered(spans: list[Any]) -> float:
    """Length of the union of spans of time."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return total
