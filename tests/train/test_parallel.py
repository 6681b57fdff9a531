import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed import TCPStore

from h3lm.errors import UserError
from h3lm.models import H3ForCausalLM
from h3lm.train.arguments import training_arguments
from h3lm.train.parallel import clip_gradients
from h3lm.train.processes import one_voice
from h3lm.train.recipe import make_recipe
from h3lm.train.run import train

from .conftest import TINY

MODEL = TINY["model"] | {"embedding_dropout": 0.0}
RECIPE = {"model": MODEL, "steps": 6, "save_every": 4, "eval_every": 4, "sample": "it was"}
PRECISIONS = ("bf16", "fp32")


def torchrun(processes: int, *command, **environment) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def output_of(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    return output


def log(folder: Path, key: str = "loss") -> list[float]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry[key] for entry in entries if key in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def run(recipe) -> str:
    shown = io.StringIO()
    train(recipe, Console(file=shown, width=300))
    return shown.getvalue()


@pytest.fixture(scope="module")
def together(blocks, tmp_path_factory) -> tuple[Path, dict]:
    """Runs of two processes in all ways, beside the run of one, and what they said."""
    folder = tmp_path_factory.mktemp("together")
    recipe = make_recipe(TINY | RECIPE | {"data": str(blocks), "output_dir": str(folder / "one")})
    (folder / "tiny.yaml").write_text(recipe.to_yaml())
    script = Path(__file__).parent / "train_together.py"
    runs = torchrun(2, script, folder / "tiny.yaml", folder)
    run(recipe)
    return folder, json.loads(output_of(runs).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp", "recomputed", "compiled"])
def test_two_processes_train_as_one_does(together, way):
    folder, _ = together
    one, two = folder / "one", folder / way
    assert len(log(one)) == 6
    for key in ("loss", "grad_norm"):
        assert log(two, key) == pytest.approx(log(one, key), abs=1e-5)
    # each evaluates its share, and together they give the same figure
    assert len(log(two, "eval_loss")) == 2
    assert log(two, "eval_loss") == pytest.approx(log(one, "eval_loss"), abs=1e-6)
    summaries = [json.loads((place / "summary.json").read_text()) for place in (one, two)]
    for key in ("tokens_seen", "val_tokens", "parameters", "steps"):
        assert summaries[0][key] == summaries[1][key]
    assert len(summaries[1]["sample"]) > 0
    model = H3ForCausalLM.from_pretrained(two / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_copies_hold_their_gradients_once(together):
    assert together[1]["gradients are views of buckets"] is True


@pytest.mark.slow
def test_blocks_that_stay_gathered_train_alike_and_are_clipped_alike(together):
    folder, _ = together
    assert min(log(folder / "gathered", "grad_norm")) > 0.1
    for key in ("loss", "grad_norm"):
        found = log(folder / "gathered", key)
        assert found == pytest.approx(log(folder / "gathered-ddp", key), abs=1e-5)


def test_gradients_are_clipped_as_torch_clips_them():
    models = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)) for _ in range(2)]
    for model in models:
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, number + 1.0)
    for bound in (float("inf"), 1e3, 0.5):
        norm = torch.nn.utils.clip_grad_norm_(models[0].parameters(), bound)
        torch.testing.assert_close(clip_gradients(models[1], bound), norm)
        for a, b in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
def test_two_processes_start_sharded_from_a_folder_as_one_does(together, tiny):
    folder, _ = together
    start = str(folder / "ddp" / "model")
    recipe = tiny(**RECIPE | {"init_from": start, "model": {}, "save_every": None})
    run(recipe)
    assert log(folder / "warm") == pytest.approx(log(recipe.folder), abs=1e-5)
    assert log(folder / "warm")[0] < log(folder / "ddp")[0]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_resume_exactly(together, way):
    folder, said = together
    straight, cut = folder / way, folder / f"{way}-cut"
    assert "resuming at step 4" in said[way]
    assert f"2 processes, {way}" in said[way]
    assert log(cut) == log(straight)
    assert log(cut, "eval_loss") == log(straight, "eval_loss")
    assert equal(cut, straight)
    names = {path.name for path in (straight / "checkpoints" / "checkpoint-6").rglob("*")}
    assert {"rng_state_0.pth", "rng_state_1.pth", "__0_0.distcp", "__1_0.distcp"} <= names


@pytest.mark.slow
def test_what_happens_to_one_process_ends_all_at_the_same_step(together):
    folder, said = together
    # the second is told to end: all write the checkpoint that the run goes on from
    goes_on = f"the same command goes on from {folder / 'stopped' / 'checkpoints/checkpoint-3'}"
    assert said["stopped"] == f"SIGTERM ended the run at step 3: {goes_on}"
    assert log(folder / "stopped") == log(folder / "fsdp")
    assert equal(folder / "stopped", folder / "fsdp")
    # the second's loss is not a number: all say so, and none writes it down
    assert "not finite at step 5; the last good checkpoint is" in said["nan"]
    assert said["nan"].index("checkpoint-4") > 0
    assert not (folder / "nan" / "model").exists()


@pytest.mark.slow
def test_one_process_that_fails_alone_says_why_and_ends_all(tmp_path):
    script = tmp_path / "fail.py"
    script.write_text(
        "import sys\n"
        "from torch import distributed\n"
        "from h3lm.train.processes import one_voice, rank, wait_for_all\n"
        "with one_voice():\n"
        "    distributed.init_process_group('gloo')\n"
        "    if rank() == 1:\n"
        "        sys.exit('error: the second')\n"
        "    wait_for_all()\n"
    )
    process = torchrun(2, script)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    said = [line for line in errors.splitlines() if line.startswith("error:")]
    assert said == ["error: the second"], errors
    assert "rank0]: Traceback" not in errors


def test_of_processes_that_fail_alike_the_first_speaks(monkeypatch):
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    places = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "WORLD_SIZE": 2}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="the batch"), one_voice():
        raise UserError("the batch")
    with pytest.raises(SystemExit) as left, one_voice():
        raise UserError("the batch")
    assert left.value.code == 1
    # started again by torchrun, they may speak again
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="the batch"), one_voice():
        raise UserError("the batch")


@pytest.fixture(scope="module")
def on_gpus(blocks, tmp_path_factory) -> tuple[Path, dict]:
    """Runs of two GPUs in all ways, beside those of one, and what they said; all at once."""
    folder = tmp_path_factory.mktemp("gpus")
    places = {"data": str(blocks), "output_dir": str(folder / "run")}
    changes = {"steps": 8, "deterministic": True, "sample": ""}
    recipe = make_recipe(TINY | RECIPE | changes | places)
    (folder / "tiny.yaml").write_text(recipe.to_yaml())
    command = "-m", "tests.train.train_on_gpus", folder / "tiny.yaml", folder
    runs = [torchrun(n, *command, name) for name in PRECISIONS for n in (1, 2)]
    said = [json.loads(output_of(process).splitlines()[-1]) for process in runs]
    return folder, {name: words for of_run in said for name, words in of_run.items()}


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_gpus_train_sharded_as_one_does_and_resume(on_gpus, precision):
    folder, said = on_gpus
    # sums in another order; in bfloat16 that can move a product by a unit in the last place
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for way in ("ddp", "fsdp"):
        found = log(folder / f"{precision}-{way}")
        assert f"cuda:0, 2 processes, {way}" in said[f"{precision}-{way}"]
        assert found == pytest.approx(log(folder / f"{precision}-one"), abs=tolerance)
        assert len(found) == 8
        assert found[-1] < found[0]
    straight, cut = folder / f"{precision}-fsdp", folder / f"{precision}-cut"
    assert "resuming at step 4" in said[cut.name]
    assert log(cut) == log(straight)
    assert equal(cut, straight)


@pytest.mark.slow
def test_a_sharded_model_computes_in_bf16_with_its_ssms_norms_and_head_in_fp32(together):
    folder, said = together
    assert said["bf16"] == {
        "diagonal": ["torch.float32"],
        "norm": ["torch.float32"],
        "block": ["torch.bfloat16"],
        "head": ["torch.float32"],
        "stored": ["DTensor torch.float32"],
    }
    # as under autocast with fp32 weights, but for the order of sums
    assert log(folder / "bf16") == pytest.approx(log(folder / "bf16-ddp"), abs=1e-3)


@pytest.mark.slow
def test_a_sharded_run_that_is_killed_goes_on_by_the_same_recipe(tiny, recipe_file, tmp_path):
    changes = RECIPE | {"steps": 60, "parallel": "fsdp"}
    killed = torchrun(2, "-m", "h3lm", "train", recipe_file(**changes))
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoints" / "checkpoint-4").exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.001)
    for pid in [killed.pid, *_children(killed.pid)]:
        os.kill(pid, signal.SIGKILL)
    killed.communicate()
    shown = run(tiny(**changes))  # what two have written, one can go on with
    step = int(re.search(r"resuming at step (\d+)", shown)[1])
    assert 4 <= step < 60
    assert "written by 2 processes and read by 1" in shown
    run(tiny(**changes, output_dir=str(tmp_path / "straight")))
    assert log(tmp_path / "run") == pytest.approx(log(tmp_path / "straight"), abs=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_has_written(tiny, recipe_file, tmp_path):
    run(tiny(**RECIPE, output_dir=str(tmp_path / "straight")))
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")
    shown = output_of(torchrun(2, "-m", "h3lm", "train", recipe_file(**RECIPE, parallel="fsdp")))
    assert "resuming at step 4" in shown
    assert "written by 1 process and read by 2: " in shown
    assert log(tmp_path / "run") == pytest.approx(log(tmp_path / "straight"), abs=1e-5)


def _children(parent: int) -> list[int]:
    """The processes that another has started, in sessions of their own."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(place.name))
    return found


def test_a_batch_that_cannot_be_divided_is_one_line(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size=4 cannot be divided among 3 processes"):
        training_arguments(tiny())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="micro_batch_size=4 must divide 2"):
        training_arguments(tiny(micro_batch_size=4))
