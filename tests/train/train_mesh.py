"""Train in four processes, arranged in the ways that there are.

python -m tests.train.train_mesh RECIPE FOLDER leaves a run's folder for each way, and prints what
the first process said as a line of JSON.
"""

# ruff: noqa: T201 (what it prints is its result)

import io
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

import h3lm.train.outcome
from h3lm.errors import UserError
from h3lm.train.recipe import load_recipe
from h3lm.train.run import train
from tests.processes import in_processes

WAYS = {
    "seq-4": {"mesh": {"seq": 4}},
    # two readers, accumulated
    "seq-2": {"mesh": {"seq": 2}, "parallel": "fsdp", "micro_batch_size": 1},
    "seq-packed": {
        "mesh": {"seq": 4}, "micro_batch_size": 1, "reset_state_at_documents": True,
    },
    "hybrid": {"mesh": {"replicate": 2}, "parallel": "fsdp", "save_every": 2},
}  # fmt: skip


def process(recipe_file: str, place: str, rank: int) -> dict[str, str]:
    h3lm.train.outcome.plot_losses = lambda *_: None  # takes longer than all the rest
    recipe = load_recipe(recipe_file)
    report = {}
    for name, changes in WAYS.items():
        shown = io.StringIO()
        folder = str(Path(place) / name)
        train(replace(recipe, output_dir=folder, **changes), Console(file=shown, width=300))
        report[name] = shown.getvalue()
    try:
        other = replace(recipe, output_dir=str(Path(place) / "other"), seed=rank // 3)
        train(other, Console(file=io.StringIO()))
    except UserError as error:
        report["other"] = str(error)
    return report


if __name__ == "__main__":
    print(json.dumps(in_processes(4, partial(process, *sys.argv[1:]))[0]))
