"""From a table to a classifier, as a person does it; and what goes wrong, in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def h3lm(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "h3lm", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=120,
        env=os.environ | {"COLUMNS": "120", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2
    values = rng.normal(size=(24, 16)) + 2.0 * labels[:, None]
    np.savez(tmp_path / "t.npz", train_values=values, train_labels=labels,
             test_values=values[:8], test_labels=labels[:8])  # fmt: skip
    return values, labels


def test_a_table_becomes_a_classifier(table, tmp_path):
    done = h3lm("prepare", "t.npz", "blocks/t", "--labelled", "table", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2 classes, 1 channels", "train: 24 examples of length 16", "test: 8 examples of length 16",
        "prepared: blocks/t",
    ]  # fmt: skip
    settings = [
        "data=blocks/t", "name=t", "classification.seeds=1", "epochs=20", "batch_size=8",
        "model.hidden_size=8", "model.num_hidden_layers=1", "precision=fp32",
    ]  # fmt: skip
    done = h3lm("train", "acsf1", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    summary = json.loads((tmp_path / "runs" / "t" / "summary.json").read_text())
    assert summary["accuracy"] > 0.6


def test_mistakes_are_one_line_and_a_non_zero_status(table, tmp_path):
    values, labels = table
    values[3, 5] = np.nan
    np.savez(tmp_path / "nan.npz", values=values, labels=labels)
    for arguments, words in (
        (("prepare", "nan.npz", "out", "--labelled", "table"), "nan.npz, values: row 4 holds nan"),
        (("train", "acsf1", "data=nowhere"), "nowhere: no labelled data here"),
    ):
        done = h3lm(*arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
