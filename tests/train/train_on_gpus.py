"""Train on the GPUs of `torchrun`'s processes: copies, sharded, and sharded, cut and resumed.

python -m torch.distributed.run --nproc-per-node N -m tests.train.train_on_gpus RECIPE FOLDER
PRECISION leaves a run's folder for each way, and prints what the runs said as a line of JSON. One
process alone leaves what they are held beside.
"""

# ruff: noqa: T201 (what it prints is its result)

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import h3lm.train.outcome
from h3lm.layers import H3
from h3lm.train.processes import is_first, one_voice, wait_for_all, world_size
from h3lm.train.recipe import load_recipe
from tests.train.train_together import run


def without_kernels() -> None:
    """Have all H3 layers take the plain path: in float32 kernels compile for minutes."""
    make = H3.__init__
    H3.__init__ = lambda self, *given, **named: make(self, *given, **named | {"backend": "torch"})


def main(recipe_file: str, place: str, precision: str) -> None:
    h3lm.train.outcome.plot_losses = lambda *_: None
    recipe, folder = load_recipe(recipe_file), Path(place)
    report = {}
    if precision == "fp32":
        without_kernels()

    def to(name: str, parallel: str) -> None:
        where = str(folder / f"{precision}-{name}")
        changes = {"output_dir": where, "precision": precision, "parallel": parallel}
        report[f"{precision}-{name}"] = run(replace(recipe, **changes))

    if world_size() == 1:
        to("one", "ddp")
    else:
        for way in ("ddp", "fsdp"):
            to(way, way)
        if is_first():
            cut = folder / f"{precision}-cut"
            shutil.copytree(folder / f"{precision}-fsdp", cut)
            shutil.rmtree(cut / "checkpoints" / f"checkpoint-{recipe.steps}")
        wait_for_all()
        to("cut", "fsdp")
    if is_first():
        print(json.dumps(report))


if __name__ == "__main__":
    with one_voice():
        main(*sys.argv[1:])
