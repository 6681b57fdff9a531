import json
import os
import subprocess
import sys

import pytest
import torch

from h3lm import H3Config, H3ForCausalLM
from h3lm.data.tokenizers import byte_tokenizer
from h3lm.models.folders import save_model


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = H3Config(
        vocab_size=264, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, d_state=8
    )
    save_model(H3ForCausalLM(config), tmp_path / "model", byte_tokenizer())
    (tmp_path / "text.txt").write_text("It was the best of times. " * 10)
    return tmp_path


def h3lm(*arguments, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "h3lm", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        timeout=120,
    )


@pytest.mark.slow
def test_eval_states_context_and_stride_and_writes_json(folder):
    options = ["--data", "text.txt", "--context", "32", "--stride", "8", "--output", "out"]
    done = h3lm("eval", "model", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "out" / "report.json").read_text())["tasks"]["text.txt"]
    assert report["context"] == 32
    assert report["stride"] == 8
    assert report["tokens"] == report["bytes"] == 260
    for words in (
        "per word",
        "bits per byte",
        "stride 8 tokens",
        f"{report['metrics']['perplexity']['value']:.4f}",
    ):
        assert words in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_mistakes_are_one_line_and_a_non_zero_status(folder):
    for options, message in (
        (["--data", "missing.txt"], "missing.txt: no such text file"),
        (["--data", "text.txt", "--output", "text.txt/out"], "cannot be used"),
        (["--tasks", "bolq", "--data-dir", "."], "the nearest are boolq"),
        (["--tasks", "copa", "--data-dir", "."], "has no files for copa"),
        (["--tasks", ","], "give names with commas between"),
        (["--tasks", "copa", "--data", "text.txt"], "give either --data or --perplexity, or"),
    ):
        done = h3lm("eval", "model", *options, cwd=folder)
        assert done.returncode == (2 if "give" in message else 1)
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
