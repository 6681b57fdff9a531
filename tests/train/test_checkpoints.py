import errno
import io
import json
import os
import resource
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
from torch.distributed.checkpoint import CheckpointException

from h3lm.data.lock import LOCK_FILE, only_writer
from h3lm.errors import UserError
from h3lm.evals.perplexity import TextScore
from h3lm.models import H3ForCausalLM
from h3lm.train import checkpoints
from h3lm.train.run import train
from h3lm.train.trainer import H3Trainer

from .conftest import TINY, h3lm


def run(recipe) -> str:
    shown = io.StringIO()
    train(recipe, Console(file=shown, width=300))
    return shown.getvalue()


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def stopped_at(monkeypatch):
    """Run a recipe in this process as if it had died after a step."""

    def start(recipe, step: int) -> None:
        finish = checkpoints.finish

        def finish_and_die(folder, point, keep):
            place = finish(folder, point, keep)
            if point.step == step:
                raise KeyboardInterrupt
            return place

        monkeypatch.setattr(checkpoints, "finish", finish_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
        monkeypatch.undo()

    return start


@pytest.mark.slow
def test_a_run_killed_after_10_of_20_steps_and_resumed_is_bit_equal(recipe_file, tmp_path):
    recipe = recipe_file(steps=20, save_every=5, micro_batch_size=2, eval_every=7)
    straight = h3lm("train", recipe, f"output_dir={tmp_path / 'straight'}", cwd=tmp_path)
    killed = h3lm("train", recipe, f"output_dir={tmp_path / 'killed'}", "steps=20", cwd=tmp_path)
    deadline = time.monotonic() + 100
    while not (tmp_path / "killed" / "checkpoints" / "checkpoint-10").exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    killed.communicate()
    resumed = h3lm("train", recipe, f"output_dir={tmp_path / 'killed'}", cwd=tmp_path)
    output, errors = resumed.communicate(timeout=100)
    assert resumed.returncode == 0, errors
    assert "resuming at step 1" in output
    assert straight.communicate(timeout=100)[1] == ""
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "straight")) == 20
    first, second = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_kill_at_any_point_of_a_save_harms_no_earlier_checkpoint(recipe_file, tmp_path):
    recipe = recipe_file(steps=4, save_every=2, keep_checkpoints=1)
    script = Path(__file__).parent / "save_killed.py"
    done = subprocess.run(
        [sys.executable, str(script), str(recipe), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    straight, *kills = map(json.loads, done.stdout.splitlines())
    assert straight["calls"] > 30
    assert len(kills) == 23
    for kill in kills:
        expected = signal.SIGKILL if kill["kind"] == "call" else signal.SIGXFSZ
        assert kill["signal"] == expected, kill
        assert kill["newest"] in (2, 4), kill
        assert f"checkpoint-{kill['newest']}" in kill["names"], kill
        assert kill["resumed"] == 0, (kill, done.stderr)
        assert kill["losses"] == straight["straight"], kill
    # the kills fell before, in the middle of and after the final rename
    assert {kill["newest"] for kill in kills} == {2, 4}
    assert any("unfinished" in kill["names"] for kill in kills)
    assert any({"checkpoint-2", "checkpoint-4"} <= set(kill["names"]) for kill in kills)


def test_a_checkpoint_holds_all_that_a_run_needs(tiny):
    recipe = tiny(save_every=2, keep_checkpoints=2)
    run(recipe)
    assert names(recipe.folder) == ["checkpoint-4", "checkpoint-6"]
    folder = recipe.folder / "checkpoints" / "checkpoint-4"
    checkpoint, passed = checkpoints.newest(folder.parent)
    assert checkpoint.folder.name == "checkpoint-6"
    assert passed == []
    assert checkpoint.point.step == 6
    assert checkpoint.point.blocks_seen == 24
    for kinds in checkpoints.NEEDED:
        assert any((folder / name).is_file() for name in kinds), kinds
    assert H3ForCausalLM.from_pretrained(folder).num_parameters() > 0


def test_a_finished_run_trains_no_step_more(tiny):
    recipe = tiny(save_every=4)
    run(recipe)
    before = losses(recipe.folder), weights(recipe.folder)
    assert "resuming at step 6" in run(recipe)
    after = losses(recipe.folder), weights(recipe.folder)
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_what_does_not_decide_the_run_may_change(tiny, stopped_at, tmp_path):
    changes = {"micro_batch_size": 4, "eval_every": 1, "save_every": 3, "log_every": 1}
    run(tiny(output_dir=str(tmp_path / "straight")))
    stopped_at(tiny(save_every=2), 4)
    run(tiny(**changes))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert len(json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-2])) > 0


@pytest.mark.parametrize("first", ["bf16", "fp32"])
def test_a_run_keeps_the_precision_that_it_began_in(tiny, stopped_at, tmp_path, monkeypatch, first):
    def machine_is_fast_in(precision):  # as it seems from one start to the next
        times = {torch.float32: 1.0, torch.bfloat16: 0.5 if precision == "bf16" else 2.0}
        monkeypatch.setattr("h3lm.train.arguments._time_product", times.__getitem__)

    run(tiny(precision=first, output_dir=str(tmp_path / "straight")))
    machine_is_fast_in(first)
    recipe = tiny(precision="auto", save_every=2)
    stopped_at(recipe, 2)
    machine_is_fast_in("fp32" if first == "bf16" else "bf16")
    run(recipe)
    assert losses(recipe.folder) == losses(tmp_path / "straight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate=0.0006 there, 0.001 now"),
        ({"steps": 8}, "steps=6 there, 8 now"),
        ({"mixers": "h3"}, "mixers=hybrid there, h3 now"),
        ({"model": {**TINY["model"], "hidden_size": 32}}, "hidden_size=16 there, 32 now"),
    ],
)
def test_another_recipes_or_models_folder_is_refused(tiny, stopped_at, changes, message):
    recipe = tiny(save_every=2)
    stopped_at(recipe, 2)
    before = (recipe.folder / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match=message) as error:
        run(tiny(save_every=2, **changes))
    assert "checkpoint-2 is of another run" in str(error.value)
    assert "\n" not in str(error.value)
    assert names(recipe.folder) == ["checkpoint-2"]
    assert (recipe.folder / "recipe.yaml").read_bytes() == before


def test_data_prepared_anew_in_another_way_are_refused(tiny, stopped_at, tmp_path):
    from h3lm.data.prepare import prepare

    stopped_at(tiny(save_every=2), 2)
    (tmp_path / "other.txt").write_text("it was the age of wisdom " * 60)
    prepare(
        tmp_path / "other.txt", tmp_path / "other", tokenizer="characters", block_length=16,
        progress=False, workers=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="the prepared data are not the same"):
        run(tiny(data=str(tmp_path / "other")))
    # the recipe has its own block length: that of the folder, and where it lies, decide nothing
    shutil.copytree(tiny().data, tmp_path / "moved")
    index = tmp_path / "moved" / "index.json"
    index.write_text(index.read_text().replace('"block_length": 16', '"block_length": 8'))
    run(tiny(data=str(tmp_path / "moved")))


@pytest.mark.parametrize("kinds", checkpoints.NEEDED, ids=lambda kinds: kinds[0])
def test_a_missing_or_shortened_file_of_a_checkpoint_is_named(tiny, stopped_at, kinds):
    recipe = tiny(save_every=2)
    stopped_at(recipe, 4)
    folder = recipe.folder / "checkpoints" / "checkpoint-4"
    name = next(name for name in kinds if (folder / name).exists())
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=f"checkpoint-4: the checkpoint lacks {name}"):
        run(recipe)
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{name}: .* bytes instead of"):
        run(recipe)
    assert names(recipe.folder) == ["checkpoint-2", "checkpoint-4"]


def test_all_missing_shards_of_a_checkpoint_are_named(tiny, stopped_at):
    recipe = tiny(save_every=2)
    stopped_at(recipe, 4)
    folder = recipe.folder / "checkpoints" / "checkpoint-4"
    manifest = json.loads((folder / checkpoints.MANIFEST).read_text())
    for number in (1, 2, 3):  # as four processes write it
        manifest["files"][f"optimizer/__{number}_0.distcp"] = 7
        (folder / "optimizer" / f"__{number}_0.distcp").write_bytes(b"written")
    (folder / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    for number in (1, 3):
        (folder / "optimizer" / f"__{number}_0.distcp").unlink()
    with pytest.raises(
        UserError, match=r"lacks optimizer/__1_0\.distcp, optimizer/__3_0\.distcp: bring it back"
    ):
        run(recipe)


def test_a_half_written_newest_folder_is_passed_over(tiny, stopped_at, tmp_path):
    run(tiny(output_dir=str(tmp_path / "straight")))
    recipe = tiny(save_every=2)
    stopped_at(recipe, 4)
    folder = recipe.folder / "checkpoints"
    (folder / "checkpoint-4" / checkpoints.MANIFEST).unlink()
    (folder / "unfinished" / "checkpoint-6").mkdir(parents=True)
    (folder / "checkpoint-notes").mkdir()
    shown = run(recipe)
    assert f"without checkpoint.json: {folder / 'checkpoint-4'}" in shown
    assert f"cut short: {folder / 'unfinished'}" in shown
    assert "resuming at step 2 " in shown
    assert losses(recipe.folder) == losses(tmp_path / "straight")


def test_the_best_weights_are_kept_through_a_resumption(tiny, stopped_at, monkeypatch):
    told = {2: 3.0, 4: 1.0, 6: 2.0}

    def score(self, _):
        return TextScore(told[self.state.global_step] * 10, 10, 16, 16)

    monkeypatch.setattr(H3Trainer, "score", score)
    recipe = tiny(save_every=2, eval_every=2, keep_best=True)
    with monkeypatch.context():
        stopped_at(recipe, 4)
    monkeypatch.setattr(H3Trainer, "score", score)
    best = load_file(recipe.folder / "best" / "model.safetensors")
    step4 = load_file(recipe.folder / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(best[name], step4[name]) for name in best)
    run(recipe)
    again = load_file(recipe.folder / "best" / "model.safetensors")
    assert all(torch.equal(best[name], again[name]) for name in best)
    assert not all(torch.equal(best[name], w) for name, w in weights(recipe.folder).items())
    summary = json.loads((recipe.folder / "summary.json").read_text())
    assert (summary["best_step"], summary["best_val_loss"], summary["val_loss"]) == (4, 1.0, 2.0)
    assert H3ForCausalLM.from_pretrained(recipe.folder / "best").num_parameters() > 0


def test_what_is_not_whole_takes_no_whole_checkpoints_place(tiny, stopped_at):
    recipe = tiny(save_every=1, keep_checkpoints=1)
    stopped_at(recipe, 2)
    folder = recipe.folder / "checkpoints"
    for step in (1, 9):  # a removal that was cut short, and what a copy left behind
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "config.json").write_text("{}")
    stopped_at(recipe, 4)
    assert names(recipe.folder) == ["checkpoint-4", "checkpoint-9"]
    assert checkpoints.newest(folder)[0].point.step == 4


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_there(tiny, stopped_at):
    recipe = tiny(save_every=2)
    recipe.folder.mkdir()
    with (
        only_writer(recipe.folder, "another h3lm train"),
        pytest.raises(UserError, match=r"run: another h3lm train \(process \d+ on .*writes here"),
    ):
        run(recipe)
    stopped_at(recipe, 2)
    assert names(recipe.folder) == ["checkpoint-2"]
    run(recipe)
    assert not (recipe.folder / LOCK_FILE).exists()


@pytest.mark.slow
def test_no_space_stops_with_one_line_and_harms_no_checkpoint(tiny, stopped_at, recipe_file):
    recipe = tiny(save_every=2, steps=6)
    stopped_at(recipe, 2)
    folder = recipe.folder / "checkpoints"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    limit = max(map(len, before.values())) - 1000

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "h3lm", "train", str(recipe_file(save_every=2, steps=6))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
        timeout=100,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "a checkpoint could not be written" in done.stderr
    assert "checkpoint-2 there is whole" in done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    run(recipe)
    assert names(recipe.folder) == ["checkpoint-4", "checkpoint-6"]


def test_a_write_that_fails_in_one_process_is_one_line_in_all(tiny, stopped_at, monkeypatch):
    recipe = tiny(save_every=2)
    stopped_at(recipe, 2)

    def failing(error):
        def save(*_, **__):
            raise CheckpointException("write", {1: (error, None)})

        monkeypatch.setattr("h3lm.train.optimizer_state.checkpoint.save", save)

    failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(
        UserError, match=r"could not be written \(No space left on device\); checkp"
    ):
        run(recipe)
    assert names(recipe.folder) == ["checkpoint-2"]
    # what PyTorch's archives say of a full disk, after the error that they swallow
    failing(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"))
    with pytest.raises(UserError, match=r"could not be written \(write error, as on a full disk"):
        run(recipe)
    failing(KeyError("ours"))  # a fault is no full disk
    with pytest.raises(CheckpointException, match="ours"):
        run(recipe)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_every", [1, 3])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny, monkeypatch, number, log_every
):
    forward, calls = H3ForCausalLM.forward, 0

    def breaking(self, *arguments, **named):
        nonlocal calls
        output = forward(self, *arguments, **named)
        calls += self.training
        if calls == 5:
            output.loss = output.loss * number
        return output

    monkeypatch.setattr(H3ForCausalLM, "forward", breaking)
    recipe = tiny(steps=12, save_every=2, log_every=log_every)
    with pytest.raises(UserError, match="not finite at step 5; the last good checkpoint is") as e:
        run(recipe)
    assert "checkpoint-4" in str(e.value)
    assert names(recipe.folder)[-1] == "checkpoint-4"
    assert len(losses(recipe.folder)) >= 1
    assert "\n" not in str(e.value)


def test_limited_time_counts_what_was_trained_before(tiny, stopped_at):
    recipe = tiny(steps=None, time_limit_s=1.5, save_every=3)
    stopped_at(recipe, 3)
    point = checkpoints.newest(recipe.folder / "checkpoints")[0].point
    assert 0 < point.elapsed_s < 1.5
    path = recipe.folder / "checkpoints" / "checkpoint-3" / checkpoints.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["point"]["elapsed_s"] = 1.2  # as if it had been slow
    path.write_text(json.dumps(manifest))
    began = time.monotonic()
    run(recipe)
    summary = json.loads((recipe.folder / "summary.json").read_text())
    assert 1.5 <= summary["train_seconds"] < 1.2 + time.monotonic() - began
    steps = summary["steps"]
    run(recipe)  # nothing is left to do
    assert json.loads((recipe.folder / "summary.json").read_text())["steps"] == steps
