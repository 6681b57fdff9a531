"""Train on a corpus that the process's address space cannot hold.

python small_address_space.py RECIPE ROOM leaves ROOM bytes of address space free once everything is
loaded, trains, and prints how many different shards were read.
"""

# ruff: noqa: T201 (what it prints is its result)

import io
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import h3lm.train.outcome
from h3lm.data.blocks import Maps
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.train.recipe import load_recipe
from h3lm.train.run import train


def main(recipe_file: str, room: str) -> None:
    h3lm.train.outcome.plot_losses = lambda *_: None
    recipe = load_recipe(recipe_file)
    config = H3Config(**recipe.model, vocab_size=8, mixers=recipe.mixers)
    H3ForCausalLM(config)(torch.zeros(1, 9, dtype=torch.long)).logits.sum().backward()
    read = set()
    map_one = Maps._map
    Maps._map = lambda self, path, *given: (read.add(path.name), map_one(self, path, *given))[1]
    status = Path("/proc/self/status").read_text()
    used = 1024 * int(status.partition("VmSize:")[2].split()[0])
    limit = used + int(room)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        np.empty(2 * int(room), np.uint8)
    except MemoryError:
        train(recipe, Console(file=io.StringIO()))
        print(sum("tokens" in name for name in read))


if __name__ == "__main__":
    main(*sys.argv[1:])
