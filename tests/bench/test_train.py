import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from h3lm.bench import train
from h3lm.bench.train import Contender, Job, run
from h3lm.cli import main
from h3lm.errors import UserError
from h3lm.models.presets import PRESETS

TINY = (("hidden_size", 16), ("num_attention_heads", 2), ("num_hidden_layers", 2),
        ("vocab_size", 40), ("d_state", 4))  # fmt: skip
CONTENDERS = (Contender("transformer", "attention", (*TINY, ("rotary_dim", 8))),
              Contender("h3, head_dim 1", "h3", (*TINY, ("h3_head_dim", 1))))  # fmt: skip


def measured(tmp_path, contenders=CONTENDERS, **changes):
    said = []
    torch.manual_seed(0)
    path = run(
        tmp_path, said.append, lengths=[32], tokens=64, compiled=False, contenders=contenders,
        device="cpu", **changes,
    )  # fmt: skip
    assert path.with_suffix(".png").stat().st_size > 5000
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert len(said) == len(rows)
    return path, rows


def test_a_report_tells_speed_phases_and_memory_beside_the_transformer(tmp_path):
    path, rows = measured(tmp_path)
    assert [row["model"] for row in rows] == ["transformer", "h3, head_dim 1"]
    for row in rows:
        assert row["shape"] == "2x32"
        phases = sum(row[f"{name} ms"] for name in ("forward", "backward", "optimizer"))
        assert 0 < phases <= 1.5 * row["step ms"]
        assert row["tokens/s"] == pytest.approx(1000 * 64 / row["step ms"])
        assert row["data ms"] > 0
        assert row["estimate GiB"] > 0
    assert rows[1]["ratio"] == pytest.approx(rows[1]["tokens/s"] / rows[0]["tokens/s"])
    text = path.read_text()
    assert "6 N + 6 L d per attention layer" in text
    assert "--preset 125m --world 1" in text


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp", "seq"])
def test_several_processes_stand_beside_one(tmp_path, way):
    _, (one, two) = measured(tmp_path, contenders=CONTENDERS[1:], world=2, way=way)
    assert (one["GPUs"], two["GPUs"]) == ("1", "2")
    assert two["shape"] == ("2x64" if way == "seq" else "4x32")
    assert two["tokens/s"] == pytest.approx(1000 * 128 / two["step ms"])
    assert two["scaling"] == pytest.approx(two["tokens/s"] / one["tokens/s"])
    assert two["communication ms"] > 0
    assert two["all-reduce GB/s"] > 0


def test_slices_stand_beside_one_gpu_with_the_same_rows(monkeypatch):
    job = Job("125m", CONTENDERS[1], 1, 64, world=2, way="seq")
    asked = []
    monkeypatch.setattr(train, "measure_job", lambda job: asked.append(job) or {"peak GiB": 8.0})
    found = train._beside_whole({"peak GiB": 4.0}, job)
    assert found == {"peak of one GPU": 8.0, "peak ratio": 0.5}
    assert (asked[0].world, asked[0].length, asked[0].repeats) == (1, 64, 0)

    def fails(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(train, "measure_job", fails)
    assert train._beside_whole({"peak GiB": 4.0}, job) == {"peak of one GPU": "out of memory"}


def test_memory_alone_takes_a_single_step(tmp_path, monkeypatch):
    taken = []
    step = train._Step.__call__
    monkeypatch.setattr(train._Step, "__call__", lambda *a: taken.append(a[0]) or step(*a))
    held = []
    monkeypatch.setattr(train, "_memory", lambda *_: held.append(taken[0].optimizer.state) or {})
    path = run(
        tmp_path, print, lengths=[32], tokens=64, compiled=False, contenders=CONTENDERS[1:],
        device="cpu", timed=False,
    )  # fmt: skip
    assert len(taken) == 1
    assert all(int(state["step"]) == 2 for state in held[0].values())  # they were there before
    assert path.name == "memory_125m_eager_cpu.md"
    assert not path.with_suffix(".png").exists()
    (row,) = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert "tokens/s" not in row
    assert "--memory" in path.read_text()


@pytest.mark.slow
def test_processes_of_torchrun_measure_and_the_first_tells(tmp_path):
    script = tmp_path / "bench.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from h3lm.bench.train import run\n"
        "from tests.bench.test_train import CONTENDERS\n"
        "run(Path(sys.argv[1]), print, lengths=[32], tokens=64, compiled=False, device='cpu',\n"
        "    contenders=CONTENDERS[1:], world=2, way='seq')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(["src", str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200,
        cwd=root, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[1] for line in done.stdout.splitlines()] == ["GPUs 1", "GPUs 2"]
    (found,) = tmp_path.glob("*.json")
    one, two = json.loads(found.read_text())["rows"]
    assert two["scaling"] == pytest.approx(two["tokens/s"] / one["tokens/s"])
    each = [float(speed) for speed in one["tokens/s of each"].split(", ")]
    assert len(each) == 2
    assert one["tokens/s"] == pytest.approx(sum(each) / 2, rel=1e-3)
    assert "tokens/s of each" not in two


def test_what_one_process_cannot_hold_is_no_mean(monkeypatch):
    rows: list[object] = []
    monkeypatch.setattr(train, "world_size", lambda: 2)

    def gather(into, row):
        into[:] = [row, rows[0]]

    monkeypatch.setattr(train.distributed, "all_gather_object", gather)
    rows[:] = [{"tokens/s": 3.0, "peak GiB": 2.0, "graphs": "no"}]
    found = train._mean_row({"tokens/s": 1.0, "peak GiB": 2.0, "graphs": "no"})
    assert found == {
        "tokens/s": 2.0, "peak GiB": 2.0, "graphs": "no", "tokens/s of each": "1, 3",
    }  # fmt: skip
    rows[:] = [None]
    assert train._mean_row({"tokens/s": 1.0}) is None
    assert train._mean_row(None) is None


def test_what_a_process_cannot_hold_is_said(monkeypatch):
    def fails(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(train, "_measure", fails)
    row = train._row(Job("125m", CONTENDERS[0], 1, 32))
    assert row["tokens/s"] == "out of memory"


def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path):
    with pytest.raises(UserError, match="parallel='tensor' is not one of fsdp, ddp, seq"):
        run(tmp_path, print, way="tensor", device="cpu")
    with pytest.raises(UserError, match="model='gpt' is not one of transformer, hybrid, h3"):
        train.contenders_of(["gpt"])
    assert [c.word for c in train.contenders_of(["h3", "transformer"])] == ["transformer", "h3"]
    assert train.contenders_of(None) == train.CONTENDERS
    with pytest.raises(UserError, match="world=0 must be a number of GPUs"):
        run(tmp_path, print, world=0, device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="torchrun has started 4 processes, not world=2"):
        run(tmp_path, print, world=2, device="cpu")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="times 4 GPUs, and there is 1 CUDA device here"):
        run(tmp_path, print, world=4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["h3lm", "bench", "train", "--preset", "1.3b", "--world", "2"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert "times 2 GPUs, and there are no CUDA devices here" in said
    assert len(said.splitlines()) == 1


def test_every_preset_has_its_tokens():
    assert train.TRAIN_TOKENS.keys() == PRESETS.keys()
