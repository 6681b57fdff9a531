"""`h3lm bench lra`: training steps on the Long Range Arena's shapes, as in the paper's Table 8.

Source: Fu et al. 2023 (arXiv 2212.14052v3), Table 8; sizes of S4's models as its authors publish
them.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from h3lm.bench import measure, report
from h3lm.bench.doctor import run_check
from h3lm.errors import UserError
from h3lm.layers import BidirectionalAttention
from h3lm.models import H3ClassificationConfig, H3ForSequenceClassification
from h3lm.ssm import fused_filters

NOTES = (
    "Training steps on random inputs: float32 weights, bfloat16 autocast, fused AdamW, medians of "
    "CUDA events, ms. A step, from the forward pass to the optimiser, is replayed as a CUDA graph, "
    "for every path alike; `eager ms` is the same step launched call by call from Python. S4, S4D "
    "and H3 both ways: 6 layers, batch norm, no MLP. Transformer of the same width and depth: 4 "
    "heads, MLP of 4 widths, layer norm, learned positions, no causal mask; plain writes the whole "
    "matrix of scores, as LRA's own does. Where a batch does not fit it is halved. Speed-up: ms "
    "per example of S4 by torch.fft, of the plain Transformer and of SDPA over this path's, all of "
    "this run; means over tasks are geometric. Filters: making both filters of all S4 layers, "
    "forward and backward, launched from Python, which both S4 paths pay."
)
NUM_LAYERS, NUM_HEADS = 6, 4
PLAIN, SDPA = "transformer, plain", "transformer, SDPA"
S4_FFT, S4_KERNEL = "s4, torch.fft", "s4, flashconv fft"
BASES = {"over s4 torch.fft": S4_FFT, "over plain": PLAIN, "over SDPA": SDPA}


@dataclass(frozen=True)
class Task:
    """One task of the arena: what its S4 model is trained with.

    Attributes:
        name: For the report.
        length: Positions of an example.
        batch: Examples of a step.
        width: Of the model.
        state: State size of its state space models.
        num_labels: Classes.
        vocab_size: Ids; None for pixels.
        pairs: Whether an example is two rows.
    """

    name: str
    length: int
    batch: int
    width: int
    state: int
    num_labels: int
    vocab_size: int | None = None
    pairs: bool = False


TASKS = (
    Task("listops", 2048, 32, 256, 4, 10, vocab_size=18),
    Task("text", 4096, 16, 256, 4, 2, vocab_size=257),
    Task("retrieval", 4000, 64, 256, 4, 2, vocab_size=257, pairs=True),
    Task("image", 1024, 50, 512, 64, 10),
    Task("pathfinder", 1024, 64, 256, 64, 2),
    Task("path-x", 16384, 16, 256, 64, 2),
)


@dataclass(frozen=True)
class Runner:
    """A model and how its mixers are run.

    Attributes:
        mixer: Name of the mixer.
        backend: What is asked of its convolution; of attention, "plain" or "sdpa".
    """

    mixer: str
    backend: str


PATHS: dict[str, Runner] = {
    S4_FFT: Runner("s4", "torch"),
    S4_KERNEL: Runner("s4", "triton"),
    "s4d, state passing": Runner("s4d", "auto"),
    "h3, state passing": Runner("h3", "auto"),
    PLAIN: Runner("attention", "plain"),
    SDPA: Runner("attention", "sdpa"),
}


class PlainAttention(BidirectionalAttention):
    """Attention that writes its matrix of scores, (B, heads, L, L)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `BidirectionalAttention.attend`."""
        scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores.masked_fill(~bias, -torch.inf)
        y = scores.softmax(-1).to(v.dtype) @ v
        return self.output_proj(y.transpose(1, 2).flatten(2))


def run(
    folder: Path,
    say: Callable[[str], None],
    tasks: tuple[Task, ...] = TASKS,
    repeats: int = 7,
    paths: tuple[str, ...] = tuple(PATHS),
) -> Path:
    """Check the kernels, time the steps, and write a report into a folder.

    Raises:
        UserError: without a CUDA device.
        RuntimeError: if the convolution kernel is wrong: a fast wrong one is not timed.
    """
    if not torch.cuda.is_available():
        raise UserError("bench lra times a GPU, and there is no CUDA device here")
    check = run_check("fft_conv", torch.bfloat16, "triton", torch.device("cuda"))
    say(f"{check.name}: error {check.error:.1e}, allowed {check.allowed:.1e}")
    if not check.passed:
        raise RuntimeError("the kernels are wrong on this machine: nothing is timed")
    for task in tasks:
        if not fused_filters.works(torch.device("cuda"), task.state // 2, task.length):
            say(f"{task.name}: filters by plain PyTorch")
    name, environment = f"lra_{measure.gpu_name()}", measure.environment("h3lm bench lra")
    rows: list[report.Row] = []
    for task in tasks:
        of_task = []
        for row in _measure(task, repeats, paths):
            of_task.append(row)
            say("  ".join(f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in row.items()))
        rows += with_ratios(of_task)
        # after each task: what was measured stays if the next one cannot run
        path = report.write(name, folder, environment, NOTES, rows + means(rows))
        plot_speed_ups(folder, name, rows)
    return path


def make_model(task: Task, path: Runner, device: str = "cuda") -> H3ForSequenceClassification:
    """The model of a task, its mixers run in one way."""
    attention = path.mixer == "attention"
    config = H3ClassificationConfig(
        mixers=path.mixer,
        hidden_size=task.width,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        intermediate_size=4 * task.width if attention else 0,
        num_learned_positions=task.length if attention else 0,
        norm="layer" if attention else "batch",
        # the shift and the chunks of H3 want more than S4's smallest state
        d_state=max(task.state, 16) if path.mixer == "h3" else task.state,
        bidirectional=True,
        pooling="mean",
        num_channels=1 if task.vocab_size is None else None,
        vocab_size=task.vocab_size or 1,
        num_labels=task.num_labels,
        two_documents=task.pairs,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = H3ForSequenceClassification(config).train()
    for layer in model.model.layers:
        if path.backend == "plain":
            plain = PlainAttention(task.width, NUM_HEADS)
            plain.load_state_dict(layer.mixer.state_dict())
            layer.mixer = plain.to(device)
        elif not attention:
            layer.mixer.backend = path.backend
    return model


def make_batch(task: Task, device: str = "cuda") -> dict[str, Tensor]:
    """Random inputs of a task."""
    shape = (task.batch, 2, task.length) if task.pairs else (task.batch, task.length)
    labels = torch.randint(task.num_labels, (task.batch,), device=device)
    if task.vocab_size is None:
        return {"input_values": torch.randn(*shape, 1, device=device), "labels": labels}
    return {"input_ids": torch.randint(task.vocab_size, shape, device=device), "labels": labels}


def training_step(
    model: H3ForSequenceClassification,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
) -> Callable[[], None]:
    """One whole step: forward, backward and optimiser."""
    device = batch["labels"].device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _measure(task: Task, repeats: int, paths: tuple[str, ...]) -> Iterator[report.Row]:
    for name in paths:
        path = PATHS[name]
        row: report.Row = {"task": task.name, "length": str(task.length), "path": name}
        try:
            found = _time(task, path, repeats)
        except ValueError as reason:  # a backend's own word that it does not do this
            yield row | {"batch": f"not here: {reason}"}
            continue
        if found is None:
            yield row | {"batch": "out of memory"}
            continue
        row |= {
            "batch": str(found.batch), "parameters": f"{found.parameters:,}",
            "step ms": found.graph_ms, "eager ms": found.eager_ms,
            "ms per example": found.graph_ms / found.batch, "peak GiB": found.peak / 2**30,
        }  # fmt: skip
        if found.note:
            row["note"] = found.note
        if path.mixer == "s4":
            row["filters ms"] = _filters_ms(task, path, repeats)
        yield row


class Timed(NamedTuple):
    """One path of one task.

    Attributes:
        batch: Examples of a step.
        graph_ms, eager_ms: Of a step, replayed and launched.
        peak: Bytes, of the latter.
        parameters: Of the model.
        note: Why `graph_ms` is `eager_ms`, if it is.
    """

    batch: int
    graph_ms: float
    eager_ms: float
    peak: int
    parameters: int
    note: str = ""


def _time(task: Task, path: Runner, repeats: int) -> Timed | None:
    """Time a batch, halved until it fits; None if one example does not."""
    batch = task.batch
    while batch:
        try:
            return _time_batch(replace(task, batch=batch), path, repeats)
        except torch.cuda.OutOfMemoryError:
            pass  # behind this block, or the failed step's tensors live on in its traceback
        torch.cuda.empty_cache()
        batch //= 2
    return None


def _time_batch(task: Task, path: Runner, repeats: int) -> Timed:
    model = make_model(task, path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=True)
    step = training_step(model, optimizer, make_batch(task))
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # where autograd warms up for a graph
        eager_ms = measure.median_ms(step, repeats)
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()  # a graph has memory of its own
    graph_ms, note = measure.replayed_ms(step, repeats)
    if note:
        graph_ms = eager_ms
    return Timed(task.batch, graph_ms, eager_ms, peak, model.num_parameters(), note)


def _filters_ms(task: Task, path: Runner, repeats: int) -> float:
    """Making the forward and the backward filter of every layer, with gradients."""
    mixers: list[Any] = [layer.mixer for layer in make_model(task, path).model.layers]

    def make() -> None:
        for mixer in mixers:
            back = torch.view_as_complex(mixer.backward_readout.C)
            ahead, behind = mixer.system().both_ways(back, task.length)
            (ahead.sum() + behind.sum()).backward()

    return measure.median_ms(make, repeats)


def with_ratios(rows: list[report.Row]) -> list[report.Row]:
    """One task's rows with speed-ups per example over each base that ran."""
    cost = {row["path"]: row["ms per example"] for row in rows if "ms per example" in row}
    for row in rows:
        own = cost.get(row["path"])
        for column, base in BASES.items():
            if isinstance(own, float) and base in cost:
                row[column] = float(cost[base]) / own
    return rows


def means(rows: list[report.Row]) -> list[report.Row]:
    """Geometric means of the speed-ups over the tasks, with and without Path-X."""
    found = []
    for name in dict.fromkeys(row["path"] for row in rows):
        for label, left_out in (("mean", ""), ("mean without path-x", "path-x")):
            mine = [row for row in rows if row["path"] == name and row["task"] != left_out]
            mean: report.Row = {"task": label, "path": name}
            for column in BASES:
                values = [float(row[column]) for row in mine if column in row]
                if values:
                    mean[column] = math.exp(sum(map(math.log, values)) / len(values))
            found.append(mean)
    return found


def plot_speed_ups(folder: Path, name: str, rows: list[report.Row]) -> Path:
    """Speed-up over the plain Transformer, a group of bars for each task, as a PNG."""
    from matplotlib.figure import Figure

    tasks = [t for t in dict.fromkeys(str(row["task"]) for row in rows) if "mean" not in t]
    paths = [p for p in dict.fromkeys(str(row["path"]) for row in rows) if p != PLAIN]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.add_subplot(ylabel="speed-up over plain attention, per example", yscale="log")
    for number, path in enumerate(paths):
        values = {
            row["task"]: float(row["over plain"])
            for row in rows
            if row["path"] == path and "over plain" in row
        }
        places = [i + (number - len(paths) / 2) * 0.15 for i, t in enumerate(tasks) if t in values]
        axes.bar(places, [values[t] for t in tasks if t in values], width=0.15, label=path)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=120)
    return folder / f"{name}.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--task", action="append", choices=[task.name for task in TASKS])
    parser.add_argument("--path", action="append", choices=list(PATHS))
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    chosen = tuple(t for t in TASKS if not given.task or t.name in given.task)
    only = tuple(given.path or PATHS)
    print(run(given.out, print, chosen, given.repeats, only))  # noqa: T201
