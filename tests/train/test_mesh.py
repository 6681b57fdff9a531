import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from h3lm.data.order import Order
from h3lm.errors import UserError
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.train.corpus import BlockOrder
from h3lm.train.mesh import Mesh
from h3lm.train.recipe import make_recipe

from .conftest import TINY
from .test_parallel import log, output_of, run, torchrun

MODEL = TINY["model"] | {"embedding_dropout": 0.0, "d_state": 4}
UNEVEN = 19  # slices of 5, 5, 5 and 4


@pytest.fixture(scope="module")
def arranged(blocks, tmp_path_factory) -> tuple[Path, dict]:
    """Runs of four processes in all arrangements, beside the run of one, and what they said."""
    folder = tmp_path_factory.mktemp("arranged")
    changes = {"model": MODEL, "steps": 3, "eval_every": 3, "block_length": UNEVEN}
    places = {"data": str(blocks), "output_dir": str(folder / "one")}
    recipe = make_recipe(TINY | changes | places)
    (folder / "tiny.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "tests.train.train_mesh", folder / "tiny.yaml", folder]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=root)
    assert done.returncode == 0, done.stderr
    run(recipe)
    packed = {"reset_state_at_documents": True, "output_dir": str(folder / "one-packed")}
    run(replace(recipe, **packed))
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["seq-4", "seq-2", "seq-packed", "hybrid"])
def test_four_processes_train_as_one_does(arranged, way):
    folder, said = arranged
    one = folder / ("one-packed" if way == "seq-packed" else "one")
    for key in ("loss", "grad_norm", "eval_loss"):
        found = log(folder / way, key)
        assert len(found) == (1 if key == "eval_loss" else 3)
        assert found == pytest.approx(log(one, key), abs=1e-5)
    assert "4 processes" in said[way]
    assert ("seq=" in said[way]) == way.startswith("seq")


@pytest.mark.slow
def test_documents_kept_apart_are_another_run(arranged):
    folder, _ = arranged
    assert log(folder / "one-packed") != pytest.approx(log(folder / "one"), abs=1e-4)


@pytest.mark.slow
def test_two_processes_go_on_with_what_four_have_written(arranged):
    """The parts of the optimiser and of the model are others then."""
    folder, _ = arranged
    straight, cut = folder / "hybrid", folder / "cut"
    shutil.copytree(straight, cut)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-3")
    written = cut / "checkpoints" / "checkpoint-2"
    assert len(list((written / "optimizer").glob("*.distcp"))) > 1
    exported = H3ForCausalLM.from_pretrained(written)  # one folder of whole weights
    assert exported.num_parameters() == sum(p.numel() for p in exported.parameters())
    changes = "parallel=fsdp", f"output_dir={cut}"
    command = "-m", "h3lm", "train", folder / "tiny.yaml", *changes
    shown = output_of(torchrun(2, *command, COLUMNS="300"))
    assert "resuming at step 2" in shown
    assert "written by 4 processes and read by 2" in shown
    for key in ("loss", "grad_norm", "eval_loss"):
        assert log(cut, key) == pytest.approx(log(straight, key), abs=1e-5)
    before, after = (load_file(place / "model" / "model.safetensors") for place in (straight, cut))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name])


@pytest.mark.slow
def test_processes_of_different_recipes_end_in_one_line(arranged):
    _, said = arranged
    assert said["other"] == (
        "the processes were started with different recipes: seed is 0 in process 0 and 1 in "
        "process 3"
    )


def test_slices_on_one_host_sum_gradients_in_one_bucket(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    large = Mesh(shard=2, seq=2).bucket_mb
    assert large is not None
    assert large > 1e6
    assert Mesh(shard=4).bucket_mb is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Mesh(shard=2, seq=2).bucket_mb is None


def test_processes_that_share_rows_take_the_same_blocks():
    alone = list(BlockOrder(Order([10], 1), 24, batch=2))
    shared = list(BlockOrder(Order([10], 1), 24, batch=2, readers=2))
    assert len(shared) == 48
    batches = [shared[i : i + 2] for i in range(0, 48, 2)]
    assert batches[::2] == batches[1::2]
    assert [i for batch in batches[::2] for i in batch] == alone


def test_mistakes_in_a_mesh_are_one_line(tiny, monkeypatch):
    with pytest.raises(UserError, match="the mesh has no 'sequence', only replicate, seq"):
        tiny(mesh={"sequence": 2})
    with pytest.raises(UserError, match=r"mesh.seq=0 must be a number of processes"):
        tiny(mesh={"seq": 0})
    with pytest.raises(UserError, match="not of classifiers"):
        tiny(task="classification", mesh={"seq": 2})
    with pytest.raises(UserError, match="it needs parallel=fsdp"):
        tiny(mesh={"replicate": 2})
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UserError, match=r"replicate=1 times seq=4 does not divide 6 processes"):
        Mesh.of(tiny(mesh={"seq": 4}))
    monkeypatch.setenv("WORLD_SIZE", "4")
    mesh = Mesh.of(tiny(mesh={"seq": 4}))
    model = H3ForCausalLM(H3Config(**TINY["model"], vocab_size=8, mixers="h3"))
    with pytest.raises(UserError, match="leaves 4 tokens to each, and the short filter takes 7"):
        mesh.check(model, tiny(mesh={"seq": 4}))
    short = H3ForCausalLM(H3Config(**TINY["model"], vocab_size=8, mixers="h3", h3_num_taps=4))
    mesh.check(short, tiny(mesh={"seq": 4}))  # taps count, not states
    long = H3ForCausalLM(H3Config(**TINY["model"], vocab_size=8, mixers="h3", h3_num_taps=16))
    with pytest.raises(UserError, match="leaves 8 tokens to each, and the short filter takes 15"):
        mesh.check(long, tiny(block_length=32, mesh={"seq": 4}))
    with pytest.raises(UserError, match="one block at a time: micro_batch_size=1, not 4"):
        mesh.check(model, tiny(block_length=64, reset_state_at_documents=True))
    other = H3ForCausalLM(H3Config(**TINY["model"], vocab_size=8, mixers="linear_attention"))
    with pytest.raises(UserError, match=r"seq=4: .* linear_attention cannot do it"):
        mesh.check(other, tiny())
