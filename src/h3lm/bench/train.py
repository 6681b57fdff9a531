"""`h3lm bench train`: training steps of a preset, H3 and hybrid beside the Transformer.

As the trainer takes them: blocks from memory-mapped shards, bfloat16 autocast over float32 weights,
the loss without whole logits, blocks compiled one by one, activations recomputed where the estimate
of the memory asks for it, gradients clipped, fused AdamW; on one GPU as CUDA graphs.
On several GPUs by FSDP2, by DDP, or with slices of each row.
"""

import gc
import itertools
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from h3lm.bench import measure, report
from h3lm.bench.core import checked_backends
from h3lm.bench.registry import TRAIN_LENGTHS, TRAIN_TOKENS
from h3lm.data.blocks import INDEX_FILE, Index, Shard
from h3lm.data.joined import JoinedBlocks
from h3lm.data.order import Order
from h3lm.data.shards import write_array
from h3lm.errors import UserError
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.models.slices import share_rows
from h3lm.train.compiling import compile_model
from h3lm.train.corpus import BlockCollator, BlockDataset, BlockOrder
from h3lm.train.graphs import GraphedSteps
from h3lm.train.memory import Estimate, keep_activations
from h3lm.train.mesh import Mesh
from h3lm.train.parallel import ShardAdamW, clip_gradients, is_sharded, shard_model
from h3lm.train.processes import is_first, rank, world_size
from h3lm.train.profiling import communication_ms
from h3lm.train.recipe import Recipe
from h3lm.train.throughput import FORMULA, flops_per_token, peak_flops

WAYS = ("fsdp", "ddp", "seq")
WARM_UP, WARM_UP_LAUNCHED = 5, 2  # steps before graphs are replayed, and where there are none
LONGEST_MS = 6000  # that steps are timed for, but for the last two
LONGEST_TRIED = 1 << 15  # positions that backends of attention are compared on
ALONE = 3  # steps timed one by one, for the phases of graphs
PHASES = ("forward", "backward", "optimizer")
NOTES = (
    "Training steps on random tokens read from memory-mapped blocks: float32 weights, bfloat16 "
    "autocast, fused AdamW, gradients clipped, no dropout, the loss without whole logits; medians "
    "in ms. Graphs: forward and backward pass are replayed as a CUDA graph, phases then those of "
    "single steps. Forward, backward and optimiser by events on the device; communication: NCCL's "
    "kernels in a profiled step, most of which run beside others, and the part that runs alone; "
    "data: what the host waits for a batch. Attention by the fastest of SDPA's backends here. "
    "Estimate: what `h3lm train` prints before a run. Ratio: tokens/s over those of the first "
    "model of the same shape; scaling: tokens/s over those of one GPU with as many tokens (under "
    "torchrun the mean of all GPUs at once, each for itself); peak "
    "ratio: memory of the GPU of a slice over that of one GPU with the same rows. "
    f"MFU: {FORMULA}; over the GPU's dense bfloat16 peak."
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

    @property
    def word(self) -> str:
        """For the command line."""
        return self.name.partition(",")[0]

    def config(self, preset: str) -> H3Config:
        """The model's config; without dropout, whose cost is not the question."""
        dropouts = ("embedding_dropout", "attention_dropout", "residual_dropout")
        return H3Config.from_preset(
            preset, self.mixers, **dict.fromkeys(dropouts, 0.0) | dict(self.fields)
        )


TRANSFORMER = Contender("transformer", "attention")
CONTENDERS = (
    TRANSFORMER,
    Contender("hybrid", "hybrid"),
    Contender("h3, head_dim 1", "h3", (("h3_head_dim", 1),)),
)


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        preset: Size of the model.
        contender: Which model.
        rows: Rows that a process takes at once.
        length: Positions of a row, over all processes that share it.
        world: Processes, each with a GPU.
        way: Of `WAYS`: what several processes share.
        compiled: Whether blocks go through `torch.compile`.
        recomputed: Whether blocks are recomputed; None for what the estimate of the memory says.
        device: "cuda", or "cpu".
        repeats: Steps that are timed at most; 0 for the memory of one alone.
        graphs: Whether one GPU replays steps as CUDA graphs, unless blocks are recomputed.
    """

    preset: str
    contender: Contender
    rows: int
    length: int
    world: int = 1
    way: str = "fsdp"
    compiled: bool = True
    recomputed: bool | None = None
    device: str = "cuda"
    repeats: int = 8
    graphs: bool = True

    @property
    def readers(self) -> int:
        """Processes that read rows of their own."""
        return 1 if self.way == "seq" else self.world

    @property
    def mesh(self) -> Mesh:
        """How the processes are arranged."""
        return Mesh(shard=self.readers, seq=self.world // self.readers)

    @property
    def tokens(self) -> int:
        """Positions of a step, over all processes."""
        return self.rows * self.length * self.readers

    def __str__(self) -> str:
        return f"{self.rows * self.readers}x{self.length}"


def run(
    folder: Path,
    say: Callable[[str], None],
    *,
    preset: str = "125m",
    world: int = 1,
    way: str = "fsdp",
    lengths: list[int] | None = None,
    tokens: int | None = None,
    compiled: bool = True,
    recomputed: bool | None = None,
    contenders: tuple[Contender, ...] = CONTENDERS,
    device: str = "cuda",
    graphs: bool = True,
    timed: bool = True,
) -> Path:
    """Check the kernels, time training steps, and write a report into a folder.

    Several processes are started for each measurement, or are those of `torchrun`, where it has
    started this one: then all must come here, the first measures one GPU, and it writes.

    Args:
        folder: Where the report goes.
        say: Called with a line for each result.
        preset: Size of the models.
        world: GPUs; where there are several, one is measured too.
        way: How several share the work: `fsdp`, `ddp`, or `seq`, slices of each row.
        lengths: Lengths of rows on one GPU; with `seq` as many times longer as there are GPUs.
        tokens: Tokens of a step on each GPU.
        compiled: Whether blocks go through `torch.compile`.
        recomputed: Whether blocks are recomputed; None for what the estimate of the memory says.
        contenders: What is compared; the first is what the others are divided by.
        device: "cuda", or "cpu" to see that it runs.
        graphs: Whether one GPU replays steps as CUDA graphs, unless blocks are recomputed.
        timed: False for the memory of a single step alone, where a step takes long.

    Raises:
        UserError: without so many CUDA devices, if there is no such way, or if `torchrun` has
            started another number of processes.
        RuntimeError: if a kernel is wrong: a fast wrong one is not timed.
    """
    _check(world, way, device)
    if world_size() > 1:
        _meet(rank(), device)
        say = say if is_first() else _nothing
    if device == "cuda":
        list(checked_backends(say))
    tokens = tokens or TRAIN_TOKENS.get(preset, 16384)
    rows: list[report.Row] = []
    for length in lengths or TRAIN_LENGTHS:
        speeds: dict[tuple[int, str], float] = {}
        for number in sorted({1, world}) if timed else [world]:
            for contender in contenders:
                times = number if way == "seq" else 1
                job = Job(
                    preset, contender, max(1, tokens // length), length * times, number, way,
                    compiled, recomputed, device, graphs=graphs and timed,
                    repeats=Job.repeats if timed else 0,
                )  # fmt: skip
                row = _row(job)
                speed = row.get("tokens/s")
                if isinstance(speed, float):
                    speeds[number, contender.name] = speed
                    if (number, contenders[0].name) in speeds:
                        row["ratio"] = speed / speeds[number, contenders[0].name]
                    if number > 1 and (1, contender.name) in speeds:
                        row["scaling"] = speed / speeds[1, contender.name]
                if number > 1 and way == "seq" and "peak GiB" in row:
                    row |= _beside_whole(row, job)
                rows.append(row)
                words = (f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in row.items())
                say("  ".join(words))
    how = ("compiled" if compiled else "eager") + ("" if graphs else "_launched")
    several = f"_{way}{world}" if world > 1 else ""
    gpu = measure.gpu_name() if device == "cuda" else "cpu"
    name = f"{'train' if timed else 'memory'}_{preset}_{how}{several}_{gpu}"
    command = f"h3lm bench train --preset {preset} --world {world} --parallel {way}"
    command += "".join(f" --length {length}" for length in lengths or ())
    command += f" --tokens {tokens}" + ("" if compiled else " --no-compile")
    command += "" if graphs else " --no-graphs"
    if contenders != CONTENDERS:
        command += "".join(f" --model {contender.word}" for contender in contenders)
    command += {None: "", True: " --recompute", False: " --keep"}[recomputed]
    command += "" if timed else " --memory"
    if not is_first():
        return folder / f"{name}.md"
    if timed:
        plot_phases(folder / f"{name}.png", rows)
    environment = measure.environment(command) if device == "cuda" else {"command": command}
    return report.write(name, folder, environment, NOTES, rows)


def contenders_of(words: list[str] | None) -> tuple[Contender, ...]:
    """The contenders of some words, in the order of all.

    Raises:
        UserError: if there is none of a word.
    """
    known = {contender.word: contender for contender in CONTENDERS}
    for word in words or ():
        if word not in known:
            raise UserError(f"model={word!r} is not one of {', '.join(known)}")
    return tuple(known[word] for word in known if not words or word in words)


def _check(world: int, way: str, device: str) -> None:
    if way not in WAYS:
        raise UserError(f"parallel={way!r} is not one of {', '.join(WAYS)}")
    if world < 1:
        raise UserError(f"world={world} must be a number of GPUs")
    if world_size() not in (1, world):
        raise UserError(f"torchrun has started {world_size()} processes, not world={world}")
    there = torch.cuda.device_count()
    if device == "cuda" and world > there:
        found = f"there {'is' if there == 1 else 'are'} {there or 'no'} CUDA device"
        raise UserError(f"bench train times {world} GPUs, and {found}{'s' * (there != 1)} here")


def _beside_whole(row: report.Row, job: Job) -> report.Row:
    """Memory of slices beside that of one GPU on the same rows, in a single step."""
    try:
        alone = replace(job, world=1, graphs=False, repeats=0)
        whole = float(measure_job(alone)["peak GiB"])
    except torch.cuda.OutOfMemoryError:
        return {"peak of one GPU": "out of memory"}
    return {"peak of one GPU": whole, "peak ratio": float(row["peak GiB"]) / whole}


def _row(job: Job) -> report.Row:
    row: report.Row = {
        "shape": str(job), "GPUs": str(job.world), "model": job.contender.name,
    }  # fmt: skip
    try:
        found = measure_job(job)
    except torch.cuda.OutOfMemoryError:
        return row | {"tokens/s": "out of memory"}
    return row | found


def measure_job(job: Job) -> report.Row:
    """Measure in the processes of `torchrun`, or where there are several, in some of their own.

    Raises:
        OutOfMemoryError: if the memory of one does not suffice.
    """
    if distributed.is_initialized():
        return _measure_together(job)
    with tempfile.TemporaryDirectory() as place:
        _write_blocks(Path(place), job)
        if job.world == 1:
            return _measure(0, job, place)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        context = multiprocessing.start_processes(
            _in_process, (job, place), nprocs=job.world, start_method="spawn", join=False
        )
        try:
            while not context.join():
                pass
        except multiprocessing.ProcessRaisedException as error:
            if "OutOfMemoryError" in str(error):
                raise torch.cuda.OutOfMemoryError(str(error)) from None
            raise
        return json.loads((Path(place) / "row.json").read_text(encoding="utf-8"))


def _in_process(number: int, job: Job, place: str) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(job.world)}
    _meet(number, job.device)
    row = _measure(number, job, place)
    if number == 0:
        (Path(place) / "row.json").write_text(json.dumps(row), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def _meet(number: int, device: str) -> None:
    """Find the other processes, if that is not done."""
    if device == "cuda":
        torch.cuda.set_device(number)
    else:
        torch.set_num_threads(1)
    if not distributed.is_initialized():
        # what the first tells goes by the CPU: a GPU that waits for it would not be at rest
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")


def _measure_together(job: Job) -> report.Row:
    """One process's part of a measurement among those of `torchrun`; the row is the first's.

    What one GPU does all of them do at once, each for itself, for GPUs of a host differ.
    """
    with tempfile.TemporaryDirectory() as mine:
        if is_first():
            _write_blocks(Path(mine), job)
        (place,) = _first_tells(mine)
        row: report.Row | None = None
        with suppress(torch.cuda.OutOfMemoryError) if job.world == 1 else nullcontext():
            row = _measure(rank(), job, place)
        (row,) = _first_tells(row) if job.world > 1 else [_mean_row(row)]
    if row is None:
        raise torch.cuda.OutOfMemoryError
    return row


def _mean_row(row: report.Row | None) -> report.Row | None:
    """The mean of what all processes have found, or None where the memory of one was too small."""
    rows: list[report.Row | None] = [None] * world_size()
    distributed.all_gather_object(rows, row)
    found = [row for row in rows if row is not None]
    if len(found) < len(rows):
        return None
    mean = dict(found[0])
    for name, value in mean.items():
        if isinstance(value, float):
            mean[name] = sum(float(row[name]) for row in found) / len(found)
    if "tokens/s" in mean:
        mean["tokens/s of each"] = ", ".join(f"{float(row['tokens/s']):.4g}" for row in found)
    return mean


def _first_tells(what: Any) -> list[Any]:
    told = [what]
    distributed.broadcast_object_list(told)
    return told


def _nothing(_: str) -> None:
    """Said by processes that are not the first."""


def _measure(number: int, job: Job, place: str) -> report.Row:
    """One process's part of a measurement; the row is the first's."""
    if job.compiled:
        torch._dynamo.reset()
    gc.collect()  # the model that was measured before
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    config = job.contender.config(job.preset)
    estimate = _estimate(job, config, device)
    recomputed, _ = estimate.choose(job.recomputed)
    gathered = estimate.keeps_gathered(recomputed)
    torch.manual_seed(0)
    with device:
        model = H3ForCausalLM(config).train()
    parameters, work = model.num_parameters(), flops_per_token(model, job.length)
    call = _prepare(model, job, recomputed, gathered)
    attention = _fastest_attention(config, job, device)
    batches = _batches(job, Path(place), number, device)
    step = _Step(call, model, job, attention, graphs=job.graphs and not recomputed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def take() -> _Marks:
        return step(*_timed(lambda: next(batches)))

    row: report.Row = {
        "parameters": f"{parameters:,}",
        "recomputed": _share(recomputed, config.num_hidden_layers),
    }
    if not job.repeats:
        step.hold_states()
        _phases(take(), device)
        return row | _memory(job, device, estimate.needs(recomputed, gathered), attention)
    for _ in range((WARM_UP_LAUNCHED if step.graphs is None else WARM_UP) - 1):
        take()
    _, last = _timed(lambda: _phases(take(), device))
    repeats = max(2, min(job.repeats, int(LONGEST_MS / _largest(last, job, device))))
    taken = [take() for _ in range(repeats)]
    spent = _milliseconds(taken, device)
    if step.graphs is not None:  # which tell the points of their last replay alone
        replays = [_phases(step(next(batches), 0.0), device) for _ in range(ALONE)]
        medians = [median(times) for times in zip(*replays, strict=True)]
        spent |= dict(zip(PHASES, medians, strict=True))
    memory = _memory(job, device, estimate.needs(recomputed, gathered), attention)
    rate = 1000 * job.tokens / spent["step"]
    row |= {
        "graphs": "yes" if step.graphs is not None and step.graphs.captured else "no",
        "tokens/s": rate,
    }
    roof = peak_flops(device)
    if roof is not None:
        row["MFU %"] = 100 * rate * work / roof / job.world
    row |= {f"{name} ms": ms for name, ms in spent.items()}
    if job.world > 1:
        together, alone = communication_ms(lambda: step(next(batches), 0.0), device)
        row |= {"communication ms": together, "alone ms": alone}
        row["all-reduce GB/s"] = _bandwidth(device)
    return row | memory


def _memory(
    job: Job, device: torch.device, estimate: float, attention: SDPBackend | None
) -> report.Row:
    """The most that a process held, beside the estimate, and the attention that it held it with."""
    held = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    peak = _largest(held, job, device)
    row: report.Row = {"peak GiB": peak / 2**30} if peak else {}
    row["estimate GiB"] = estimate / 2**30
    if attention is not None:
        row["attention"] = attention.name.lower()
    return row


def _estimate(job: Job, config: H3Config, device: torch.device) -> Estimate:
    recipe = Recipe(
        steps=1, batch_size=job.rows * job.readers, micro_batch_size=job.rows,
        block_length=job.length, parallel="fsdp" if job.way == "fsdp" else "ddp",
    )  # fmt: skip
    return Estimate.of(config, recipe, job.mesh, device, half=True)


def _share(recomputed: int, blocks: int) -> str:
    return {0: "no", blocks: "yes"}.get(recomputed, f"{recomputed} of {blocks}")


def _prepare(model: H3ForCausalLM, job: Job, recomputed: int, gathered: bool) -> nn.Module:
    """The model as the trainer would have it."""
    if recomputed:
        new = "activation_checkpointing_enable"  # in transformers 5.23
        enable: Any = getattr(model, new, model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        keep_activations(model, recomputed)
    if job.world > 1 and job.way == "fsdp":
        shard_model(model, compute_dtype=torch.bfloat16, keep_gathered=gathered)
    if job.compiled:
        compile_model(model, "blocks")
    if job.world == 1 or job.way == "fsdp":
        return model
    if job.way == "seq":
        share_rows(model, distributed.group.WORLD)
    return nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, bucket_cap_mb=job.mesh.bucket_mb
    )


class _Step:
    """A training step and the marks of time that it leaves."""

    def __init__(
        self,
        call: nn.Module,
        model: H3ForCausalLM,
        job: Job,
        attention: SDPBackend | None,
        *,
        graphs: bool,
    ) -> None:
        self.call, self.model, self.job, self.attention = call, model, job, attention
        self.optimizer = ShardAdamW(model.parameters(), lr=1e-4, fused=True)
        captured = graphs and job.device == "cuda" and job.world == 1
        self.graphs = GraphedSteps(model.parameters()) if captured else None
        # within a graph it is the same event in every step
        self.between = torch.cuda.Event(enable_timing=True, external=True) if captured else None

    def __call__(self, batch: dict[str, Tensor], waited: float) -> "_Marks":
        marks = _Marks(self.job.device, waited)
        marks.set()
        if self.graphs is None:
            self._passes(batch, marks.set)
        else:
            assert self.between is not None
            between = self.between
            self.graphs(batch, lambda held: self._passes(held, between.record))
            marks.points.append(between)
        marks.set()
        if is_sharded(self.model):
            clip_gradients(self.model, 1.0)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.set()
        return marks

    def hold_states(self) -> None:
        """Have the optimiser make its states, as if a step had been taken before."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _passes(self, batch: dict[str, Tensor], turned: Callable[[], object]) -> Tensor:
        """Forward and backward; `turned` is called between them."""
        with self._attending(), torch.autocast(self.job.device, torch.bfloat16):
            loss = self.call(**batch, use_cache=False, skip_logits=True).loss
        turned()
        loss.backward()
        return loss.detach()

    def _attending(self) -> AbstractContextManager:
        return nullcontext() if self.attention is None else sdpa_kernel(self.attention)


class _Marks:
    """Points of time on the device, and what the host waited for the batch, in ms."""

    def __init__(self, device: str, waited: float) -> None:
        self.device, self.waited = device, waited
        self.points: list[Any] = []

    def set(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())

    def between(self, first: Any, second: Any) -> float:
        if self.device == "cuda":
            return first.elapsed_time(second)
        return 1000 * (second - first)


def _milliseconds(taken: list[_Marks], device: torch.device) -> dict[str, float]:
    """Medians of the phases and of whole steps, from one's beginning to the next's."""
    phases = zip(*(_phases(marks, device) for marks in taken), strict=True)
    steps = [m.between(m.points[0], n.points[0]) for m, n in itertools.pairwise(taken)]
    found = {"step": median(steps)}
    found |= {name: median(times) for name, times in zip(PHASES, phases, strict=True)}
    return found | {"data": median(marks.waited for marks in taken)}


def _phases(marks: _Marks, device: torch.device) -> list[float]:
    """Durations of a step's phases, when the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [marks.between(*two) for two in itertools.pairwise(marks.points)]


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    found = call()
    return found, 1000 * (time.perf_counter() - began)


def _write_blocks(folder: Path, job: Job) -> None:
    """Prepared data of random tokens, as much as the measurement reads."""
    vocab = job.contender.config(job.preset).vocab_size
    steps = WARM_UP + job.repeats + 4
    size = steps * job.rows * job.readers * job.length + 1
    dtype = np.uint16 if vocab <= 1 << 16 else np.uint32
    tokens = np.random.default_rng(0).integers(0, vocab, size, dtype)
    ends = write_array(folder / "train-00000.documents.npy", np.zeros(0, np.uint32))
    written = write_array(folder / "train-00000.tokens.npy", tokens)
    shard = Shard(size, 0, int(tokens.max()), written, ends)
    index = Index({}, job.length, np.dtype(dtype).name, vocab, (), {"train": (shard,)})
    (folder / INDEX_FILE).write_text(index.to_json(), encoding="utf-8")


def _batches(
    job: Job, folder: Path, mine: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """This process's part of each batch, on its device."""
    blocks = JoinedBlocks({"": folder}, "train", job.length)
    order = Order([len(blocks)], 0)
    row_slice = (mine, job.world) if job.way == "seq" and job.world > 1 else (0, 1)
    loader = DataLoader(
        BlockDataset(blocks),
        batch_size=job.rows,
        sampler=BlockOrder(order, len(blocks)),
        collate_fn=BlockCollator(row_slice=row_slice),
        pin_memory=device.type == "cuda",
    )
    # of all processes; what divides the sum is a constant here, which would stall the GPU
    number_of_tokens = torch.tensor(job.tokens, device=device)
    for number, batch in enumerate(loader):
        if job.readers == 1 or number % job.readers == mine:
            yield {name: x.to(device, non_blocking=True) for name, x in batch.items()} | {
                "num_items_in_batch": number_of_tokens
            }


def _fastest_attention(config: H3Config, job: Job, device: torch.device) -> SDPBackend | None:
    """The backend that attends fastest, forward and backward, on this shape.

    None, which leaves it to torch, on a CPU, and for slices of rows: of fewer queries than keys
    only flash knows without a mask as large as both.
    """
    if "attention" not in config.mixers or device.type != "cuda" or job.mesh.seq > 1:
        return None
    heads, width = config.num_attention_heads, config.hidden_size
    size = (job.rows, min(job.length, LONGEST_TRIED), heads, width // heads)
    q, k, v = (
        torch.randn(size, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in "qkv"
    )
    times = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def both(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

        try:
            times[backend] = measure.median_ms(both, 7, 2)
        except RuntimeError:  # not on this GPU
            continue
    return min(times, key=lambda backend: times[backend]) if times else None


def _largest(number: float, job: Job, device: torch.device) -> float:
    if job.world == 1:
        return number
    told = torch.tensor(number, dtype=torch.float64, device=device)
    distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
    return float(told)


def _bandwidth(device: torch.device) -> float:
    """Bytes that a process sends, by NCCL's count, in a second of an all-reduce, in GB."""
    x = torch.ones((1 << 28 if device.type == "cuda" else 1 << 16) // 4, device=device)
    world = distributed.get_world_size()
    for repeats in (2, 5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            distributed.all_reduce(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent = (time.perf_counter() - began) / repeats
    return 2 * (world - 1) / world * x.nbytes / spent / 1e9


def plot_phases(path: Path, rows: list[report.Row]) -> None:
    """Time of a step by phases, a bar for each row, as a PNG."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if isinstance(row["tokens/s"], float)]
    labels = [f"{row['model']}\n{row['shape']}, {row['GPUs']} GPU" for row in timed]
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(timed)), layout="constrained")
    axes = figure.add_subplot(xlabel="ms a step")
    left = [0.0] * len(timed)
    for phase in PHASES:
        widths = [float(row[f"{phase} ms"]) for row in timed]
        axes.barh(labels, widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, (row, x) in enumerate(zip(timed, left, strict=True)):
        mfu = f", MFU {row['MFU %']:.0f} %" if "MFU %" in row else ""
        axes.text(x, y, f" {row['tokens/s']:,.0f} tokens/s{mfu}", va="center", fontsize=8)
    axes.set_xlim(0, 1.45 * max([*left, 1e-9]))
    axes.invert_yaxis()
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
