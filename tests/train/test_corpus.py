import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from h3lm.data.blocks import File, Index, Shard
from h3lm.data.joined import JoinedBlocks
from h3lm.data.prepare import prepare
from h3lm.errors import UserError
from h3lm.train.corpus import BlockCollator, BlockDataset, BlockOrder, order_of
from h3lm.train.recipe import load_recipe

from .conftest import TINY
from .test_parallel import log, run


@pytest.fixture(scope="session")
def other(blocks, tmp_path_factory) -> Path:
    """A second source, by the tokenizer of the first."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "lines.jsonl").write_text('{"text": "the age of the epoch"}\n' * 30)
    prepare(
        folder / "lines.jsonl", folder / "blocks", tokenizer=str(blocks / "tokenizer"),
        block_length=16, valid_fraction=0.3, progress=False, workers=1,
    )  # fmt: skip
    return folder / "blocks"


@pytest.fixture
def mixed(blocks, other, tiny):
    """A recipe of two sources, a quarter of the one and three of the other."""
    places = {"words": str(blocks), "ages": str(other)}
    return tiny(data="", sources=places, mixing={"words": 1, "ages": 3.0}, eval_every=3)


def open_blocks(recipe) -> JoinedBlocks:
    return JoinedBlocks(recipe.sources, "train", recipe.block_length)


def test_a_run_mixes_its_sources_and_validates_on_each(mixed):
    shown = run(mixed)
    assert "words: " in shown
    assert "25.0% of what is read" in shown
    blocks = open_blocks(mixed)
    assert f"{0.75 * 24 / blocks.sizes['ages']:.2f} passes" in shown
    taken = order_of(mixed, blocks).blocks(0, 10 * 1024) < blocks.sizes["ages"]  # first by name
    assert taken.mean() == pytest.approx(0.75, abs=1e-3)
    summary = json.loads((mixed.folder / "summary.json").read_text())
    assert summary["val_loss_by_source"].keys() == {"words", "ages"}
    low, high = sorted(summary["val_loss_by_source"].values())
    assert low < summary["val_loss"] < high
    assert len(log(mixed.folder, "eval_loss_ages")) == 2


def test_a_mixed_run_cut_in_the_middle_of_a_pass_goes_on_exactly(mixed, tmp_path):
    recipe = replace(mixed, save_every=4)
    straight = replace(recipe, output_dir=str(tmp_path / "straight"))
    run(straight)
    run(recipe)
    for name in ("checkpoint-6", "unfinished"):
        shutil.rmtree(recipe.folder / "checkpoints" / name, ignore_errors=True)
    shutil.rmtree(recipe.folder / "model")
    shown = run(recipe)
    assert "resuming at step 4" in shown
    assert log(recipe.folder) == log(straight.folder)
    found, expected = (
        load_file(r.folder / "model" / "model.safetensors") for r in (recipe, straight)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # nor does it matter where the sources lie, or in which order they are listed
    moved = replace(recipe, sources=dict(reversed(list(recipe.sources.items()))))
    assert "resuming at step 6" in run(moved)
    with pytest.raises(UserError, match=r"mixing=.* there, .* now"):
        run(replace(recipe, mixing={"words": 1, "ages": 2}))
    with pytest.raises(UserError, match="the prepared data are not the same"):
        run(
            replace(
                recipe, sources={"words": recipe.sources["words"], "ages": recipe.sources["words"]}
            )
        )


def test_batches_depend_neither_on_workers_nor_on_ranks(mixed):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    blocks = open_blocks(mixed)
    sampler = BlockOrder(order_of(mixed, blocks), 24)

    def batches(workers: int, ranks: int = 1, rank: int = 0) -> list[torch.Tensor]:
        shares = BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), ranks, rank)
        loader = DataLoader(
            BlockDataset(blocks), batch_sampler=shares, num_workers=workers,
            collate_fn=BlockCollator(),
        )  # fmt: skip
        return [batch["input_ids"] for batch in loader]

    alone = batches(0)
    assert len(alone) == 12
    assert torch.equal(torch.cat(batches(2)), torch.cat(alone))
    by_rank = [batches(0, 3, rank) for rank in range(3)]
    together = [batch for step in zip(*by_rank, strict=True) for batch in step]
    assert torch.equal(torch.cat(together), torch.cat(alone))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixing": {"words": 1, "agse": 1}},
         r"mixing.agse names no source: there are only words, ages; did you mean 'ages'\?"),
        ({"sources": {}, "data": "x", "mixing": {"words": 1}}, "names no source: there are none"),
        ({"mixing": {"words": 1}}, "mixing gives no weight to ages"),
        ({"mixing": {"words": 0, "ages": 1}}, "mixing.words=0 must be a positive number"),
        ({"mixing": {"words": "half", "ages": 1}}, "mixing.words='half' must be a positive number"),
        ({"sources": {"words": 3}, "mixing": {}}, "sources.words=3 must be a folder"),
        ({"data": "blocks"}, "a recipe has data or sources, not both"),
        ({"task": "classification"}, "sources are texts for language models"),
    ],
)  # fmt: skip
def test_mistakes_in_a_mixture_are_one_line(mixed, changes, message):
    with pytest.raises(UserError, match=message) as error:
        replace(mixed, **changes)
    assert "\n" not in str(error.value)


def test_sources_of_different_tokenizers_are_refused(mixed, blocks, tmp_path):
    (tmp_path / "text.txt").write_text("other letters: xyz " * 30)
    prepare(
        tmp_path / "text.txt", tmp_path / "blocks", tokenizer="characters", block_length=16,
        progress=False, workers=1,
    )  # fmt: skip
    places = {"words": str(blocks), "ages": str(tmp_path / "blocks")}
    with pytest.raises(UserError, match=r"prepared with different tokenizers: ages .* and words"):
        run(replace(mixed, sources=places))


def test_a_source_with_a_truncated_shard_is_named_with_the_offset(mixed, other, tmp_path):
    shutil.copytree(other, tmp_path / "cut")
    path = tmp_path / "cut" / "train-00000.tokens.npy"
    data = path.read_bytes()
    path.write_bytes(data[:200])
    with pytest.raises(
        UserError,
        match=rf"{path.name}: truncated .* {len(data):,}, it ends at offset 200: prepare the data",
    ):
        run(replace(mixed, sources=mixed.sources | {"ages": str(tmp_path / "cut")}))


@pytest.mark.slow
def test_a_corpus_larger_than_the_address_space_is_trained_on(blocks, tiny, tmp_path):
    """Sixteen shards of 512 MB, of which nothing is on the disk; there is room for four."""
    count, size = 16, 512 << 20
    folder = tmp_path / "large"
    folder.mkdir()
    shutil.copytree(blocks / "tokenizer", folder / "tokenizer")
    index = Index.load(blocks)
    shards = []
    for i in range(count):
        name = f"train-{i:05d}.tokens.npy"
        np.lib.format.open_memmap(folder / name, "w+", index.dtype, (size // 2,))
        length = (folder / name).stat().st_size
        assert (folder / name).stat().st_blocks * 512 < 1 << 20
        ends = index.splits["train"][0].documents
        shards.append(
            Shard(size // 2, 0, 0, File(name, length, ""), replace(ends, name="none.npy"))
        )
    np.save(folder / "none.npy", np.zeros(0, np.uint32))
    none = File("none.npy", (folder / "none.npy").stat().st_size, "")
    splits = {"train": tuple(replace(shard, documents=none) for shard in shards)}
    (folder / "index.json").write_text(replace(index, splits=splits).to_json())
    model = TINY["model"] | {"num_hidden_layers": 1}
    recipe = tiny(data=str(folder), verify_data=False, steps=16, model=model, mixers="h3")
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    script = Path(__file__).parent / "small_address_space.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "tiny.yaml"), str(2 << 30)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 12, done.stdout  # of 64 blocks in 16 shards
    assert len(log(recipe.folder)) == 16


def test_processes_that_read_ahead_change_nothing(mixed, tmp_path):
    run(replace(mixed, steps=3))
    ahead = replace(mixed, steps=3, data_workers=2, output_dir=str(tmp_path / "ahead"))
    run(ahead)
    assert log(ahead.folder) == log(mixed.folder)
    with pytest.raises(UserError, match="data_workers=-1 must not be negative"):
        replace(mixed, data_workers=-1)


def test_sources_take_the_place_of_a_recipes_data_and_the_other_way_round(tmp_path):
    recipe = load_recipe("1.3b", ["sources.a=x", "sources.b=y", "mixing.a=1", "mixing.b=3"])
    assert recipe.data == ""
    assert recipe.sources == {"a": "x", "b": "y"}
    assert recipe.mixing == {"a": 1, "b": 3}
    (tmp_path / "mine.yaml").write_text("base: 1.3b\nsources: {a: x}\n")
    assert load_recipe(str(tmp_path / "mine.yaml")).data == ""
    assert load_recipe(str(tmp_path / "mine.yaml"), ["data=z"]).sources == {}
