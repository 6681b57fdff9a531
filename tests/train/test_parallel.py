import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from h3lm.errors import UserError
from h3lm.train.trainer import training_arguments


def start(processes: int, *command) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return output


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.slow
def test_two_processes_train_as_one_does(recipe_file, tiny, tmp_path):
    model = tiny().model | {"embedding_dropout": 0.0}
    recipe = recipe_file(model=model, steps=8, save_every=4, eval_every=4)
    runs = []
    for processes in (1, 2):
        place = f"output_dir={tmp_path / str(processes)}"
        runs.append(start(processes, "-m", "h3lm", "train", recipe, place))
    shown = [output_of(run) for run in runs]
    assert "2 processes" in shown[1]
    assert shown[1].count("all others") == 1  # the first process speaks for both
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 8
    assert two == pytest.approx(one, abs=1e-5)
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("1", "2")]
    assert summaries[1]["val_loss"] == pytest.approx(summaries[0]["val_loss"], abs=1e-5)
    assert summaries[1]["tokens_seen"] == summaries[0]["tokens_seen"]
    folder = tmp_path / "2" / "checkpoints" / "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("compute", [None, "bfloat16"])
def test_a_sharded_model_trains_as_a_whole_one_with_its_ssm_in_fp32(compute):
    script = Path(__file__).parent / "shard_and_train.py"
    arguments = [] if compute is None else [compute]
    sharded = start(2, script, *arguments)
    whole = json.loads(output_of(start(1, script)))
    parts = json.loads(output_of(sharded))
    assert parts["shift"] == parts["diagonal"] == parts["stored"] == ["torch.float32"]
    assert parts["linear"] == [f"torch.{compute or 'float32'}"]
    # bfloat16 has 8 bits: half a unit in the last place of a loss near 4 is 0.008, and steps add up
    tolerance = 1e-5 if compute is None else 0.05
    assert parts["losses"] == pytest.approx(whole["losses"], abs=tolerance)
    assert whole["losses"][-1] < whole["losses"][0]


def test_a_batch_that_cannot_be_divided_is_one_line(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size=4 cannot be divided among 3 processes"):
        training_arguments(tiny())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="micro_batch_size=4 must divide 2"):
        training_arguments(tiny(micro_batch_size=4))
