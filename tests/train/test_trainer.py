import io
import json
import math
import os
import re
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType
from torch.nn.functional import cross_entropy

from h3lm import H3ForCausalLM
from h3lm.cli import main
from h3lm.data.blocks import Blocks, TokenStream
from h3lm.data.order import Order
from h3lm.data.prepare import prepare
from h3lm.errors import UserError
from h3lm.evals.perplexity import score_tokens
from h3lm.models.folders import load_model
from h3lm.train.building import build_model
from h3lm.train.corpus import BlockCollator, BlockDataset, BlockOrder
from h3lm.train.interrupt import RunStopped
from h3lm.train.profiling import BACKWARD, summarise
from h3lm.train.run import build_config, train
from h3lm.train.trainer import H3Trainer


def run(recipe):
    shown = io.StringIO()
    return train(recipe, Console(file=shown, width=200)), shown.getvalue()


def losses(folder):
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_a_run_leaves_model_tokenizer_curve_log_recipe_and_summary(tiny):
    recipe = tiny(sample="it was", sample_tokens=20, eval_every=3)
    result, shown = run(recipe)
    folder = result.folder
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == result.summary
    assert summary["tokens_seen"] == 6 * 4 * 16
    assert summary["val_bits_per_token"] == pytest.approx(summary["val_loss"] / math.log(2))
    assert len(summary["sample"]) > 0
    assert (folder / "loss.png").stat().st_size > 1000
    assert len(losses(folder)) == 6
    loaded = load_model(folder / "model")
    assert loaded.num_parameters() == summary["parameters"]
    assert loaded.config.use_cache  # as a model that was never trained
    assert (folder / "model" / "tokenizer.json").is_file()
    evaluations = [e for e in (folder / "log.jsonl").read_text().splitlines() if "eval_loss" in e]
    assert len(evaluations) == 2  # at steps 3 and 6, which are the final weights
    for shown_text in ("all others", "validation loss", str(folder / "model")):
        assert shown_text in shown


def test_the_test_text_is_scored_by_the_last_weights_if_the_recipe_says_so(tiny, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, split in enumerate(("train", "valid", "test")):
        (texts / f"{split}.txt").write_text("it was the age of wisdom " * (30 + i))
    prepare(texts, tmp_path / "blocks", block_length=16, progress=False)
    result, shown = run(tiny(data=str(tmp_path / "blocks"), test=True, eval_stride=4))
    summary = result.summary
    stream = TokenStream(tmp_path / "blocks", "test")
    assert summary["test_tokens"] == len(stream) - 1
    model = load_model(result.folder / "model")
    score = score_tokens(model, stream, context=16, stride=4)
    assert summary["test_loss"] == pytest.approx(score.loss, abs=1e-6)
    assert summary["test_perplexity"] == pytest.approx(score.perplexity, rel=1e-6)
    assert summary["test_loss"] != summary["val_loss"]
    assert f"test loss {summary['test_loss']:.4f} nats" in shown


def test_a_recipe_that_wants_a_test_needs_a_test_text(tiny):
    with pytest.raises(UserError, match="no split 'test' here, only train, valid"):
        run(tiny(test=True))


def test_the_same_recipe_gives_the_same_run(tiny, tmp_path):
    run(tiny(output_dir=str(tmp_path / "a")))
    run(tiny(output_dir=str(tmp_path / "b")))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    run(tiny(output_dir=str(tmp_path / "c"), seed=1))
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_the_losses_are_those_of_a_loop_written_by_hand(tiny):
    """Adam, schedule, clipping and the mean over tokens are what the recipe says."""
    recipe = tiny(steps=3, max_grad_norm=0.5, warmup_fraction=0.5, learning_rate=1e-3, mixers="h3")
    recipe.model["embedding_dropout"] = 0.0
    result, _ = run(recipe)
    torch.manual_seed(recipe.seed)
    model = build_model(build_config(recipe, len(_tokenizer(recipe))))
    own = [p for n, p in model.named_parameters() if _own_rate(n)]
    rest = [p for n, p in model.named_parameters() if not _own_rate(n)]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": own, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    blocks = Blocks(recipe.data, "train", 16)
    order = list(BlockOrder(Order([len(blocks)], recipe.seed), 12))
    expected = []
    for step in range(3):
        ids = torch.stack(
            [torch.from_numpy(blocks[i].tokens) for i in order[4 * step : 4 * step + 4]]
        )
        logits = model.train()(ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        t, w = step / 3, 0.5
        rate = 1e-6 + (1e-3 - 1e-6) * t / w if t < w else 0.5 * (1 + math.cos(math.pi * t))
        rate = rate if t < w else 1e-4 + 9e-4 * rate
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(result.folder) == pytest.approx(expected, abs=2e-5)


def _own_rate(name):
    return "_ssm" in name and not name.endswith((".C", ".D"))


def _tokenizer(recipe):
    from h3lm.train.corpus import tokenizer_of

    return tokenizer_of(Path(recipe.data) / "tokenizer")


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny, tmp_path):
    whole = tiny(output_dir=str(tmp_path / "a"))
    parts = tiny(output_dir=str(tmp_path / "b"), micro_batch_size=1)
    for recipe in (whole, parts):
        recipe.model["embedding_dropout"] = 0.0
        run(recipe)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-4)


def test_gradient_checkpointing_changes_nothing(tiny, tmp_path):
    run(tiny(output_dir=str(tmp_path / "a"), steps=3))
    run(tiny(output_dir=str(tmp_path / "b"), steps=3, gradient_checkpointing=True))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)


def test_documents_of_a_block_do_not_leak_into_each_other(tiny):
    recipe = tiny()
    blocks = Blocks(recipe.data, "train", 64)
    number = next(i for i in range(len(blocks)) if len(blocks[i].document_starts))
    block = blocks[number]
    start = int(block.document_starts[0])
    other = block.tokens.copy()
    other[:start] = other[:start][::-1]
    torch.manual_seed(0)
    model = H3ForCausalLM(build_config(recipe, len(_tokenizer(recipe)))).eval()
    for apart in (True, False):
        collate = BlockCollator(reset_state_at_documents=apart)
        same = []
        for tokens in (block.tokens, other):
            batch = collate([block._replace(tokens=tokens)] * 2)
            batch = {name: batch[name] for name in batch if "labels" not in name}
            same.append(model(**batch).logits[:, start:])
        assert torch.equal(*same) == apart


def test_a_run_that_resets_states_has_the_loss_of_documents_one_by_one(tiny, tmp_path):
    model = tiny().model | {"embedding_dropout": 0.0}
    changes = {"model": model, "block_length": 64, "steps": 1, "reset_state_at_documents": True}
    result, _ = run(tiny(**changes))
    recipe = tiny(**changes)
    torch.manual_seed(recipe.seed)
    alone = build_model(build_config(recipe, len(_tokenizer(recipe)))).train()
    blocks = Blocks(recipe.data, "train", 64)
    total = documents = 0
    for number in list(BlockOrder(Order([len(blocks)], recipe.seed), 4)):
        tokens = torch.from_numpy(blocks[number].tokens)
        starts = [0, *blocks[number].document_starts.tolist(), 64]
        for start, stop in pairwise(starts):
            logits = alone(tokens[None, start:stop]).logits[0]
            total += cross_entropy(logits, tokens[start + 1 : stop + 1], reduction="sum").item()
        documents += len(starts) - 1
    assert documents > 4
    assert losses(result.folder) == pytest.approx([total / (4 * 64)], abs=1e-5)
    together, _ = run(tiny(**changes | {"reset_state_at_documents": False,
                                        "output_dir": str(tmp_path / "together")}))  # fmt: skip
    assert losses(together.folder) != pytest.approx([total / (4 * 64)], abs=1e-5)


def test_every_pass_takes_every_block_once_in_an_order_of_the_seed_alone():
    blocks, total = 2**16 + 3, 2**17
    order = list(BlockOrder(Order([blocks], 1), total))
    assert len(order) == total
    assert sorted(order[:blocks]) == list(range(blocks))
    assert len(set(order[blocks:])) == total - blocks
    assert order[:9] != sorted(order[:9])
    assert order == list(BlockOrder(Order([blocks], 1), total))
    assert order[:99] != list(BlockOrder(Order([blocks], 2), 99))


def test_every_token_but_the_first_is_a_target_once(tiny):
    blocks = Blocks(tiny().data, "train", 16)
    dataset, collate = BlockDataset(blocks), BlockCollator()
    batch = collate([dataset[i] for i in range(len(dataset))])
    stream = TokenStream(tiny().data, "train")
    expected = torch.from_numpy(stream[1 : 1 + 16 * len(dataset)])
    assert torch.equal(batch["labels"].flatten(), expected)
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


def test_a_clock_ends_a_run_of_limited_time(tiny):
    result, _ = run(tiny(steps=None, time_limit_s=3))
    assert 3 <= result.summary["train_seconds"] < 30
    assert result.summary["steps"] > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "the recipe has no data"),
        ({"data": "nowhere"}, "no prepared data here"),
        ({"block_length": 100_000}, "shorter than a block"),
        ({"model": {"vocab_size": 8}}, "the train tokens go up to id"),
    ],
)
def test_data_that_cannot_be_used_are_one_line(tiny, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train(tiny(**changes), Console(file=io.StringIO()))
    assert "\n" not in str(error.value)


def test_a_model_to_start_from_has_the_datas_tokenizer(tiny, tmp_path):
    first, _ = run(tiny(steps=1, output_dir=str(tmp_path / "first")))
    model = str(first.folder / "model")
    start = {"init_from": model, "model": {}, "steps": 1}
    result, _ = run(tiny(**start))
    assert result.summary["parameters"] == first.summary["parameters"]
    (tmp_path / "other.txt").write_text("it was the age of swimwod " * 60)
    prepare(
        tmp_path / "other.txt", tmp_path / "other", tokenizer="characters", block_length=16,
        progress=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="prepared with another tokenizer than that of") as error:
        run(tiny(**start, data=str(tmp_path / "other"), output_dir=str(tmp_path / "second")))
    assert f"--tokenizer {model}" in str(error.value)


def test_an_output_path_that_cannot_be_written_is_one_line(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        train(tiny(output_dir=str(tmp_path / "file" / "run")), Console(file=io.StringIO()))


def test_bf16_is_autocast_over_fp32_weights(tiny, monkeypatch):
    seen = set()
    forward = H3ForCausalLM.forward

    def watched(self, *arguments, **named):
        weights = {parameter.dtype for parameter in self.parameters()}
        seen.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), *weights))
        return forward(self, *arguments, **named)

    monkeypatch.setattr(H3ForCausalLM, "forward", watched)
    result, shown = run(tiny(steps=2, precision="bf16"))
    assert seen == {(True, torch.bfloat16, torch.float32)}
    assert result.summary["precision"] == "bf16"
    assert "in bfloat16 autocast on cpu" in shown


def test_data_that_were_altered_are_named_before_training(tiny, blocks, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(blocks, copied)
    shard = copied / "train-00000.tokens.npy"
    contents = bytearray(shard.read_bytes())
    contents[-1] ^= 1
    shard.write_bytes(contents)
    with pytest.raises(UserError, match=r"train-00000.tokens.npy: altered: its sha256"):
        run(tiny(data=str(copied)))
    shard.write_bytes(contents[:-1])
    with pytest.raises(UserError, match=r"train-00000.tokens.npy: truncated or altered"):
        run(tiny(data=str(copied), verify_data=False))


def test_graphs_that_a_device_does_not_have_are_told(tiny):
    assert "graphs=true: only one process with a GPU" in run(tiny(graphs=True))[1]


def test_speed_time_left_and_passes_are_logged(tiny):
    result, _ = run(tiny())
    entries = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    logged = [entry for entry in entries if "loss" in entry]
    assert all(entry["tokens_per_s"] > 0 for entry in logged)
    assert logged[-1]["seconds_left"] == 0
    assert logged[0]["seconds_left"] > 0
    assert logged[-1]["epoch"] == pytest.approx(24 / len(Blocks(tiny().data, "train", 16)))


def test_the_log_is_there_while_a_run_goes_on_and_is_that_of_its_checkpoint(tiny, monkeypatch):
    recipe, seen = tiny(save_every=2), []
    save = H3Trainer._save_checkpoint

    def noting(self, *arguments, **named):
        seen.append(len(losses(recipe.folder)))
        save(self, *arguments, **named)
        if self.state.global_step == 4 and len(seen) == 2:
            self.log({"loss": 99.0})  # behind the checkpoint
            raise KeyboardInterrupt

    monkeypatch.setattr(H3Trainer, "_save_checkpoint", noting)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    assert seen == [2, 4]
    assert losses(recipe.folder)[-1] == 99.0
    run(recipe)
    assert len(losses(recipe.folder)) == 6
    assert 99.0 not in losses(recipe.folder)


def test_the_progress_line_has_losses_speed_share_of_the_peak_and_time_left(tiny, monkeypatch):
    monkeypatch.setattr("h3lm.train.run._peak_rate", lambda *_: 1e9)
    monkeypatch.setattr("h3lm.train.progress.PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr("h3lm.train.progress.LIVE_EVERY_S", 0.0)
    result, shown = run(tiny(eval_every=2))
    lines = [line for line in shown.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in lines] == [2, 3, 4, 5, 6]
    number = r"[\d,.]+"
    assert re.fullmatch(
        rf"step 6  loss {number}  valid {number}  {number} tokens/s  {number}% of peak  "
        rf"0:00:\d\d left",
        lines[-1],
    )
    logged = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    assert 0 < [entry["mfu"] for entry in logged if "mfu" in entry][-1] < 1
    terminal = Console(file=io.StringIO(), width=200, force_terminal=True)
    train(tiny(output_dir=str(result.folder / "again")), terminal)
    assert re.search(r"step 6 .*tokens/s", terminal.file.getvalue())


def test_tensorboard_gets_the_log_where_it_is_installed(tiny, monkeypatch):
    monkeypatch.setattr("h3lm.train.run._peak_rate", lambda *_: 1e9)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result, _ = run(tiny())
    events = accumulator.EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    for name in ("train/loss", "train/tokens_per_s", "train/seconds_left", "train/mfu"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4, 5, 6]
    assert "eval/loss" in events.Tags()["scalars"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_behind_its_step_and_it_goes_on(tiny, tmp_path, monkeypatch, number):
    def stopping_at(step):
        forward, calls = H3ForCausalLM.forward, 0

        def watched(self, *arguments, **named):
            nonlocal calls
            calls += self.training
            if self.training and calls == step:
                os.kill(os.getpid(), number)
            return forward(self, *arguments, **named)

        monkeypatch.setattr(H3ForCausalLM, "forward", watched)

    before = signal.getsignal(number)
    run(tiny(output_dir=str(tmp_path / "straight"), log_every=4, save_every=4))
    stopping_at(3)
    recipe = tiny(log_every=4, save_every=4)
    with pytest.raises(RunStopped, match=f"{number.name} ended the run at step 3: the same") as e:
        run(recipe)
    assert e.value.status == 128 + number
    assert str(recipe.folder / "checkpoints" / "checkpoint-3") in str(e.value)
    assert not (recipe.folder / "model").exists()
    monkeypatch.undo()
    assert signal.getsignal(number) is before
    assert "resuming at step 3" in run(recipe)[1]
    entries = [json.loads(line) for line in (recipe.folder / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 3, 4, 6]
    for name in ("model/model.safetensors",):
        assert (recipe.folder / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    stopping_at(2)
    with pytest.raises(RunStopped, match="nothing was saved, since the recipe has no save_every"):
        run(tiny(output_dir=str(tmp_path / "unsaved")))


def test_the_command_line_ends_with_the_signals_status(monkeypatch, capsys):
    def stopped(_):
        raise RunStopped("SIGTERM ended the run at step 3", signal.SIGTERM)

    monkeypatch.setattr("h3lm.train.run.train", stopped)
    monkeypatch.setattr(sys, "argv", ["h3lm", "train", "demo"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 143
    assert capsys.readouterr().err == "SIGTERM ended the run at step 3\n"


def test_a_checkpoint_closes_the_mean_that_is_being_logged(tiny, tmp_path):
    run(tiny(output_dir=str(tmp_path / "often"), log_every=1, save_every=2))
    run(tiny(output_dir=str(tmp_path / "seldom"), log_every=4, save_every=2))
    often, seldom = losses(tmp_path / "often"), losses(tmp_path / "seldom")
    expected = [often[0], often[1], sum(often[2:4]) / 2, sum(often[4:6]) / 2]
    assert seldom == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own look
@pytest.mark.parametrize("compiled", ["blocks", "model"])
def test_a_compiled_run_is_the_same_run(tiny, tmp_path, monkeypatch, compiled):
    """Traced and differentiated by the compiler; no code is generated, which takes a minute."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager"))
    model = tiny().model | {"embedding_dropout": 0.0}
    changes = {"model": model, "steps": 2, "eval_every": 1, "gradient_checkpointing": True}
    run(tiny(output_dir=str(tmp_path / "a"), **changes))
    result, _ = run(tiny(output_dir=str(tmp_path / "b"), compile=compiled, **changes))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), abs=1e-5)
    assert load_model(result.folder / "model").num_parameters() == result.summary["parameters"]


def test_a_profile_says_where_the_time_goes(tiny):
    recipe = tiny(steps=8, profile_steps=2)
    run(recipe)
    profile = json.loads((recipe.folder / "profile.json").read_text())
    assert (profile["device"], profile["steps"]) == ("the CPU", 2)
    kinds = {"making of operators", "H3 core", "products", "norms", "attention", "loss"}
    assert kinds <= set(profile["groups"])
    for kind in kinds:
        assert all(ms > 0 for ms in profile["groups"][kind]), kind  # forward and backward
    assert profile["groups"]["optimizer"][1] == 0
    busy = sum(map(sum, profile["groups"].values()))
    assert 0.5 * profile["step_ms"] < busy <= profile["step_ms"]
    assert profile["idle_ms"] < profile["step_ms"]
    table = (recipe.folder / "profile.txt").read_text()
    assert "2 steps on the CPU" in table
    assert len(table.splitlines()) < 40


def test_a_gpus_profile_counts_kernels_once_and_idle_time(monkeypatch):
    """Events as torch gives them of a GPU: a marked range is told of it as well."""

    def event(name, start, end, parent=None, kernels=(), device=DeviceType.CPU, number=-1):
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start, end=end), cpu_parent=parent,
            kernels=[SimpleNamespace(name=k, duration=us) for k, us in kernels],
            device_type=device, sequence_nr=number, thread=1, fwd_thread=1,
            self_cpu_time_total=end - start,
        )  # fmt: skip

    core = event("h3lm: H3 core", 0, 10, kernels=[("h3lm: H3 core", 400.0)])
    multiply = event("aten::mul", 1, 2, core, [("elementwise_kernel", 100.0)], number=7)
    product = event("aten::mm", 11, 12, None, [("nvjet", 300.0)], number=8)
    node = event(f"{BACKWARD}: MulBackward0", 20, 25, number=7)
    back = event("aten::mul", 21, 22, node, [("elementwise_kernel", 200.0)])
    on_gpu = [
        event(name, start, end, device=DeviceType.CUDA)
        for name, start, end in (
            ("elementwise_kernel", 100, 200), ("nvjet", 150, 450),
            ("elementwise_kernel", 800, 1000),
            ("h3lm: H3 core", 100, 900),
        )
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    events = [core, multiply, product, node, back, *on_gpu]
    found = summarise(events, 1, torch.device("cuda"))
    assert set(found.groups) == {"H3 core", "products"}
    assert found.groups["H3 core"] == pytest.approx((0.1, 0.2))
    assert found.groups["products"] == pytest.approx((0.3, 0.0))
    assert (found.step_ms, found.idle_ms) == pytest.approx((1.0, 1.0 - 0.35 - 0.2))
    assert found.longest[0] == ("elementwise_kernel", pytest.approx(0.3), 2)
