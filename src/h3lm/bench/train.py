"""`h3lm bench train`: one training step of a preset, H3 and hybrid beside the Transformer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from h3lm.bench import measure, report
from h3lm.bench.core import checked_backends
from h3lm.bench.registry import Shape, train_shapes
from h3lm.errors import UserError
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.train.throughput import FORMULA, flops_per_token, peak_flops

NOTES = (
    "Training steps on random tokens: float32 weights, bfloat16 autocast, fused AdamW, no gradient "
    "clipping, the loss of `H3ForCausalLM`; medians of CUDA events, in ms. Attention by the "
    "fastest of SDPA's backends at hand. Ratio: tokens/s over those of the Transformer of the same "
    f"shape in this run. MFU: {FORMULA}; over the GPU's dense bfloat16 peak."
)


@dataclass(frozen=True)
class Contender:
    """A family of models of one preset.

    Attributes:
        name: For the report.
        mixers: As in `H3Config.from_preset`.
        fields: Fields of the config, over those of the preset.
    """

    name: str
    mixers: str
    fields: tuple[tuple[str, Any], ...] = ()

    def config(self, preset: str) -> H3Config:
        """The model's config; without dropout, whose cost is not the question."""
        return H3Config.from_preset(preset, self.mixers, **dict(self.fields))


TRANSFORMER = Contender("transformer", "attention")
CONTENDERS = (
    TRANSFORMER,
    Contender("hybrid", "hybrid"),
    Contender("h3, head_dim 1", "h3", (("h3_head_dim", 1),)),
)


@dataclass(frozen=True)
class StepTime:
    """Median times of a training step's phases in ms, and its memory in bytes."""

    forward: float
    backward: float
    optimizer: float
    peak_bytes: int

    @property
    def total(self) -> float:
        """Of the whole step, in ms."""
        return self.forward + self.backward + self.optimizer


def run(
    folder: Path,
    say: Callable[[str], None],
    *,
    preset: str = "125m",
    shapes: list[Shape] | None = None,
    compiled: bool = True,
    contenders: tuple[Contender, ...] = CONTENDERS,
) -> Path:
    """Check the kernels, time training steps, and write a report into a folder.

    Args:
        folder: Where the report goes.
        say: Called with a line for each result.
        preset: Size of the models.
        shapes: Rows and lengths; three of equal tokens if None.
        compiled: Whether the model goes through `torch.compile`.
        contenders: What is compared; the first is what the others are divided by.

    Raises:
        UserError: without a CUDA device.
        RuntimeError: if a kernel is wrong: a fast wrong one is not timed.
    """
    if not torch.cuda.is_available():
        raise UserError("bench train times a GPU, and there is no CUDA device here")
    list(checked_backends(say))
    rows: list[report.Row] = []
    for shape in shapes or train_shapes():
        base: float | None = None
        for contender in contenders:
            row = _row(preset, shape, contender, compiled)
            speed = row["tokens/s"]
            if isinstance(speed, float):
                base = base or speed
                row["ratio"] = speed / base
            rows.append(row)
            say("  ".join(f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in row.items()))
    how = "compiled" if compiled else "eager"
    name = f"train_{preset}_{how}_{measure.gpu_name()}"
    command = f"h3lm bench train --preset {preset}{'' if compiled else ' --no-compile'}"
    return report.write(name, folder, measure.environment(command), NOTES, rows)


def _row(preset: str, shape: Shape, contender: Contender, compiled: bool) -> report.Row:
    tokens = shape.rows * shape.length
    row: report.Row = {"shape": str(shape), "model": contender.name}
    model = _model(contender.config(preset))
    try:
        times = time_step(model, shape, compiled)
    except torch.cuda.OutOfMemoryError:
        return row | {"tokens/s": "out of memory"}
    speed = 1000 * tokens / times.total
    peak = peak_flops(torch.device("cuda"))
    used = (
        {} if peak is None else {"MFU %": 100 * speed * flops_per_token(model, shape.length) / peak}
    )
    return row | {
        "parameters": f"{model.num_parameters():,}", "tokens/s": speed, **used,
        "forward ms": times.forward, "backward ms": times.backward,
        "optimizer ms": times.optimizer, "peak GiB": times.peak_bytes / 2**30,
    }  # fmt: skip


def _model(config: H3Config) -> H3ForCausalLM:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return H3ForCausalLM(config).train()


def time_step(model: H3ForCausalLM, shape: Shape, compiled: bool, repeats: int = 9) -> StepTime:
    """Time the three phases of a training step on random tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    vocab = model.config.vocab_size
    tokens = torch.randint(vocab, (shape.rows, shape.length + 1), device="cuda")
    loss_of: Callable[[Tensor], Tensor] = partial(_loss, model)
    if compiled:
        torch._dynamo.reset()
        loss_of = torch.compile(loss_of, dynamic=False)
    torch.cuda.reset_peak_memory_stats()
    steps = list(_steps(loss_of, optimizer, tokens, repeats))
    forward, backward, optimizer_ = (median(phase) for phase in zip(*steps, strict=True))
    return StepTime(forward, backward, optimizer_, torch.cuda.max_memory_allocated())


def _loss(model: H3ForCausalLM, tokens: Tensor) -> Tensor:
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.autocast("cuda", torch.bfloat16):
        return model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss


def _steps(
    loss_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    repeats: int,
    warm_up: int = 3,
) -> Iterator[tuple[float, float, float]]:
    for i in range(warm_up + repeats):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        marks[0].record()
        loss = loss_of(tokens)
        marks[1].record()
        loss.backward()
        marks[2].record()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks[3].record()
        torch.cuda.synchronize()
        if i >= warm_up:
            a, b, c, d = marks
            yield a.elapsed_time(b), b.elapsed_time(c), c.elapsed_time(d)
