"""Train in the processes of `torchrun`, in the ways that there are, one after the other.

python -m torch.distributed.run --nproc-per-node N train_together.py RECIPE FOLDER leaves a run's
folder for each way, and prints what the processes computed with as a line of JSON.
"""

# ruff: noqa: T201 (what it prints is its result)

import io
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import h3lm.train.memory
import h3lm.train.outcome
from h3lm.errors import UserError
from h3lm.models import modeling_h3
from h3lm.ssm import DiagonalSSM
from h3lm.train.interrupt import RunStopped
from h3lm.train.parallel import ShardAdamW
from h3lm.train.processes import is_first, one_voice, rank
from h3lm.train.recipe import Recipe, load_recipe
from h3lm.train.run import train
from h3lm.train.trainer import H3Trainer

CUT = 4


def run(recipe: Recipe) -> str:
    shown = io.StringIO()
    train(recipe, Console(file=shown, width=300))
    return shown.getvalue()


def run_cut(recipe: Recipe) -> str:
    """Run as if all had died behind a checkpoint, then go on."""
    save = H3Trainer._save_checkpoint

    def save_and_die(self, *arguments, **named):
        save(self, *arguments, **named)
        if self.state.global_step == CUT:
            raise KeyboardInterrupt

    H3Trainer._save_checkpoint = save_and_die
    try:
        run(recipe)
    except KeyboardInterrupt:
        return run(recipe)
    finally:
        H3Trainer._save_checkpoint = save
    raise AssertionError("it was not cut")


def run_with(recipe: Recipe, at_step: int, happening) -> str:
    """Run with something that happens to the loss of the second process; says why it ended."""
    compute = H3Trainer.compute_loss

    def compute_with_it(self, *arguments, **named):
        loss = compute(self, *arguments, **named)
        mine = rank() == 1 and self.state.global_step + 1 == at_step
        return happening(loss) if mine else loss

    H3Trainer.compute_loss = compute_with_it
    try:
        run(recipe)
    except (UserError, RunStopped) as ended:
        return str(ended)
    finally:
        H3Trainer.compute_loss = compute
    raise AssertionError("it ran to its end")


def terminated(loss: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def watched(recipe: Recipe) -> dict[str, list[str]]:
    """What a run computed with, where parameters are read, and what it kept."""
    seen: dict[str, set[str]] = {
        kind: set() for kind in ("diagonal", "norm", "block", "head", "stored")
    }
    # the estimate of the memory tries blocks out that are not the model's
    kept = h3lm.train.memory.kept_by_blocks
    h3lm.train.memory.kept_by_blocks = lambda config, *_: (
        (h3lm.train.memory.Kept(0, 0),) * len(config.mixers)
    )
    system, linear, norm = DiagonalSSM.system, torch.nn.Linear.forward, torch.nn.LayerNorm.forward
    head_loss = modeling_h3.head_loss
    step = ShardAdamW.step

    def noting_system(self, *arguments):
        seen["diagonal"] |= {str(p.dtype) for p in self.parameters()}
        return system(self, *arguments)

    def noting_linear(self, x):
        if x.requires_grad:  # in training, where the head is not called but read by its loss
            assert not isinstance(self.weight, DTensor)
            seen["block"].add(str(self.weight.dtype))
        return linear(self, x)

    def noting_head(hidden, weight, *arguments):
        assert not isinstance(weight, DTensor)
        seen["head"].add(str(weight.dtype))
        return head_loss(hidden, weight, *arguments)

    def noting_norm(self, x):
        seen["norm"].add(str(self.weight.dtype))
        return norm(self, x)

    def noting_step(self, *arguments):
        for group in self.param_groups:
            kinds = {f"{type(p).__name__} {p.dtype}" for p in group["params"]}
            seen["stored"] |= kinds
        return step(self, *arguments)

    DiagonalSSM.system, torch.nn.Linear.forward = noting_system, noting_linear
    modeling_h3.head_loss = noting_head
    torch.nn.LayerNorm.forward, ShardAdamW.step = noting_norm, noting_step
    try:
        run(recipe)
    finally:
        DiagonalSSM.system, torch.nn.Linear.forward = system, linear
        modeling_h3.head_loss = head_loss
        torch.nn.LayerNorm.forward, ShardAdamW.step = norm, step
        h3lm.train.memory.kept_by_blocks = kept
    return {kind: sorted(found) for kind, found in seen.items()}


def main(recipe_file: str, place: str) -> None:
    torch.set_num_threads(1)
    h3lm.train.outcome.plot_losses = lambda *_: None  # takes longer than all the rest
    recipe, folder = load_recipe(recipe_file), Path(place)

    def to(name: str, **changes) -> Recipe:
        return replace(recipe, output_dir=str(folder / name), **changes)

    report = {}
    wrap = DistributedDataParallel.__init__

    def noting_wrap(self, *given, **named):
        wrap(self, *given, **named)
        report["gradients are views of buckets"] = self.gradient_as_bucket_view

    DistributedDataParallel.__init__ = noting_wrap
    for parallel in ("ddp", "fsdp"):
        run(to(parallel, parallel=parallel))
        report[parallel] = run_cut(to(f"{parallel}-cut", parallel=parallel))
    run(to("recomputed", parallel="fsdp", gradient_checkpointing=True, micro_batch_size=1))
    keeps = h3lm.train.memory.Estimate.keeps_gathered  # a CPU has no room that is known
    h3lm.train.memory.Estimate.keeps_gathered = lambda *_: True
    run(to("gathered", parallel="fsdp", max_grad_norm=0.1))
    run(to("gathered-ddp", max_grad_norm=0.1))
    h3lm.train.memory.Estimate.keeps_gathered = keeps
    # traced and differentiated by the compiler; no code is generated, which takes a minute
    compiler = torch.compile
    torch.compile = lambda f: compiler(f, backend="aot_eager")
    run(to("compiled", parallel="fsdp", compile="blocks"))
    torch.compile = compiler
    start = str(folder / "ddp" / "model")
    run(to("warm", parallel="fsdp", init_from=start, model={}, save_every=None))
    stopped = to("stopped", parallel="fsdp")
    report["stopped"] = run_with(stopped, 3, terminated)
    run(stopped)
    report["nan"] = run_with(to("nan", save_every=2), 5, lambda loss: loss * float("nan"))
    half = {"precision": "bf16", "save_every": None, "sample": ""}
    report["bf16"] = watched(to("bf16", parallel="fsdp", **half))
    run(to("bf16-ddp", **half))
    if is_first():
        print(json.dumps(report))


if __name__ == "__main__":
    with one_voice():
        main(*sys.argv[1:])
