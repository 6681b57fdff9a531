import json
import os
import subprocess
import sys

import pytest
import torch

from h3lm import H3Config, H3ForCausalLM
from h3lm.data.tokenizers import byte_tokenizer
from h3lm.models.folders import save_model
from h3lm.models.remote_code import REMOTE_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = H3Config(
        vocab_size=264, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, d_state=8
    )
    place = tmp_path_factory.mktemp("remote")
    save_model(H3ForCausalLM(config), place / "model", byte_tokenizer())
    return place


def run(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_folder_carries_a_file_that_imports_the_package(folder):
    remote = (folder / "model" / REMOTE_FILE).read_text()
    assert "from h3lm.models import" in remote
    named = json.loads((folder / "model" / "config.json").read_text())["auto_map"]
    assert named["AutoModelForCausalLM"] == "h3lm_model.H3ForCausalLM"
    assert len(remote.splitlines()) < 10


@pytest.mark.slow
def test_what_came_by_remote_code_is_saved_without_our_source(folder):
    out = run(
        """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "h3lm" not in sys.modules
def load(name):
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
model = load("model")
print(type(model).__module__)
ids = torch.tensor([[1, 2, 3, 4]])
before = model.lm_head.weight.detach().clone()
model(ids, labels=ids).loss.backward()
torch.optim.SGD(model.parameters(), 0.5).step()
assert not torch.equal(before, model.lm_head.weight)
model.save_pretrained("again")
again = load("again")
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
""",
        folder,
    )
    assert out.strip() == "h3lm.models.modeling_h3"
    first, second = (
        {path.name for path in (folder / name).iterdir() if "token" not in path.name}
        for name in ("model", "again")
    )
    assert first == second
    assert [name for name in second if name.endswith(".py")] == [REMOTE_FILE]
    assert (folder / "again" / REMOTE_FILE).read_text() == (
        folder / "model" / REMOTE_FILE
    ).read_text()
