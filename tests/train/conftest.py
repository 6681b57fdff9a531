import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from h3lm.data.prepare import prepare
from h3lm.train.recipe import make_recipe

TINY = {
    "name": "tiny",
    "mixers": "hybrid",
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "d_state": 8,
        "embedding_dropout": 0.1,
    },
    "steps": 6,
    "block_length": 16,
    "batch_size": 4,
    "precision": "fp32",
    "log_every": 1,
}
WORDS = "it was the age of wisdom it was the age of foolishness it was the epoch of belief"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def blocks(tmp_path_factory) -> Path:
    """Prepared characters: documents of several lengths, some held out."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = [" ".join(WORDS.split()[i % 7 :: 1 + i % 3]) for i in range(40)]
    (folder / "lines.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    prepare(
        folder / "lines.jsonl", folder / "blocks", tokenizer="characters", block_length=16,
        valid_fraction=0.2, progress=False, workers=1,
    )  # fmt: skip
    return folder / "blocks"


@pytest.fixture
def tiny(blocks, tmp_path):
    """Make a tiny recipe of this test, with other values where given."""

    def make(**changes):
        places = {"data": str(blocks), "output_dir": str(tmp_path / "run")}
        return make_recipe(copy.deepcopy(TINY | places | changes))

    return make


@pytest.fixture
def recipe_file(tiny, tmp_path):
    """Write a tiny recipe, for a process of its own."""

    def write(**changes) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(tiny(**changes).to_yaml())
        return path

    return write


def h3lm(*arguments, cwd: Path, **environment) -> subprocess.Popen:
    """Start the command line."""
    return subprocess.Popen(
        [sys.executable, "-m", "h3lm", *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment,
    )


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text())
