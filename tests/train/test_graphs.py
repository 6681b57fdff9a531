"""Steps replayed as graphs: when they are captured, and that a run stays the run it is."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from h3lm.data.prepare_labelled import LabelledOptions, prepare_labelled
from h3lm.errors import UserError
from h3lm.models import H3ClassificationConfig, H3ForSequenceClassification
from h3lm.train.graphs import MAX_FORMS, WARM_STEPS, GraphedSteps
from h3lm.train.recipe import make_recipe
from h3lm.train.run import train
from h3lm.train.trainer import H3Trainer


class Replayed:
    """In a CUDA graph's place: runs the step, into the tensors of the first time."""

    def __init__(self, run, parameters):
        self.run, self.parameters = run, parameters
        self.loss = run()
        self.grads = [p.grad for p in parameters]

    def replay(self):
        for p in self.parameters:
            p.grad = None
        self.loss.copy_(self.run())
        for kept, p in zip(self.grads, self.parameters, strict=True):
            kept.copy_(p.grad)

    def pool(self):
        return "a pool"


def test_a_form_is_captured_once_and_replayed_on_new_inputs():
    model = nn.Linear(3, 1)
    parameters, pools, ran = list(model.parameters()), [], []

    def capture(run, pool):
        pools.append(pool)
        graph = Replayed(run, parameters)
        return graph, graph.loss

    def step(inputs):
        ran.append(inputs["x"].shape)
        loss = model(inputs["x"]).square().mean()
        loss.backward()
        return loss.detach()

    steps = GraphedSteps(parameters, capture)
    for number in range(WARM_STEPS + 4):
        for rows in (2, 5):
            x = torch.randn(rows, 3) + number
            model.zero_grad()
            expected = step({"x": x})
            grads = [p.grad.clone() for p in parameters]
            model.zero_grad()
            assert torch.equal(steps({"x": x}, step), expected)
            assert all(torch.equal(p.grad, g) for p, g in zip(parameters, grads, strict=True))
    assert pools == [None, "a pool"]  # two forms share one
    for rows in range(10, 12 + MAX_FORMS):
        for _ in range(WARM_STEPS + 1):
            model.zero_grad()
            steps({"x": torch.randn(rows, 3)}, step)
    assert len(pools) == MAX_FORMS


def test_a_step_that_adds_to_gradients_has_a_graph_of_its_own():
    model = nn.Linear(3, 1)
    parameters, forms = list(model.parameters()), []

    class Adding(Replayed):
        def __init__(self, run, parameters):
            self.adds = parameters[0].grad is not None
            kept = [None if p.grad is None else p.grad.clone() for p in parameters]
            super().__init__(run, parameters)
            for grad, before in zip(self.grads, kept, strict=True):
                if before is not None:  # a capture runs nothing
                    grad.copy_(before)

        def replay(self):
            for p, grad in zip(self.parameters, self.grads, strict=True):
                p.grad = grad if self.adds else None
            self.loss.copy_(self.run())
            for kept, p in zip(self.grads, self.parameters, strict=True):
                kept.copy_(p.grad)

    def capture(run, pool):
        forms.append(parameters[0].grad is not None)
        graph = Adding(run, parameters)
        return graph, graph.loss

    def step(inputs):
        loss = model(inputs["x"]).square().mean()
        loss.backward()
        return loss.detach()

    steps = GraphedSteps(parameters, capture)
    for number in range(WARM_STEPS + 4):
        parts = [torch.randn(rows, 3) + number for rows in (4, 4, 4, 2)]
        model.zero_grad()
        for x in parts:
            step({"x": x})
        expected = [p.grad.clone() for p in parameters]
        model.zero_grad()
        for x in parts:
            steps({"x": x}, step)
        for parameter, grad in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    assert forms == [False, True]  # of two rows there is never a first step to add to


def test_forms_are_captured_while_their_gradients_fit(monkeypatch):
    monkeypatch.setattr("h3lm.train.graphs.MAX_GRADIENT_BYTES", 4 * 4 * 3)  # of three forms
    model, captured = nn.Linear(3, 1), []

    def step(inputs):
        loss = model(inputs["x"]).sum()
        loss.backward()
        return loss.detach()

    def capture(run, pool):
        captured.append(pool)
        graph = Replayed(run, list(model.parameters()))
        return graph, graph.loss

    steps = GraphedSteps(model.parameters(), capture)
    for rows in range(1, 6):
        for _ in range(WARM_STEPS + 2):
            model.zero_grad()
            steps({"x": torch.ones(rows, 3)}, step)
            assert torch.equal(model.weight.grad, torch.full((1, 3), float(rows)))
    assert len(captured) == 3


def test_what_cannot_be_captured_is_launched(caplog):
    model = nn.Linear(2, 1)

    def step(inputs):
        loss = model(inputs["x"]).sum()
        loss.backward()
        return loss.detach()

    def capture(run, pool):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    steps = GraphedSteps(model.parameters(), capture)
    for _ in range(WARM_STEPS + 3):
        model.zero_grad()
        steps({"x": torch.ones(4, 2)}, step)
        assert torch.equal(model.weight.grad, torch.full((1, 2), 4.0))
    assert caplog.text.count("launched one by one: operation not permitted when") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("mixers", ["s4", "s4d", "h3"])
def test_a_captured_step_is_a_launched_one_bit_for_bit(mixers, norm):
    config = H3ClassificationConfig(
        mixers=mixers, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, norm=norm,
        intermediate_size=64, bidirectional=True, pooling="mean", num_channels=1, num_labels=3,
        residual_dropout=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    start = H3ForSequenceClassification(config).cuda().state_dict()
    batches = []
    for i in range(20):
        length = (256, 320)[i % 2]  # two forms
        lengths = torch.randint(40, length + 1, (6,))
        values = torch.randn(6, length, 1) * (i + 1)
        inputs = {"input_values": values, "labels": torch.randint(3, (6,)), "lengths": lengths}
        batches.append({name: x.cuda() for name, x in inputs.items()})
    runs = []
    for graphs in (False, True):
        model = H3ForSequenceClassification(config).cuda().train()
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        steps = GraphedSteps(model.parameters())

        def step(inputs, model=model):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

        losses = []
        for number, inputs in enumerate(batches):
            torch.manual_seed(number)  # of dropout
            losses.append(steps(inputs, step) if graphs else step(inputs))
            optimizer.step()
            model.zero_grad()
        assert len(steps._captured) == (2 if graphs else 0)
        runs.append((torch.stack(losses), model.state_dict()))
    assert torch.equal(runs[0][0], runs[1][0])
    for name, expected in runs[0][1].items():  # running averages too
        assert torch.equal(runs[1][1][name], expected), name


@pytest.mark.gpu
@pytest.mark.parametrize("mixers", ["s4", "s4d", "h3", "attention"])
def test_a_run_by_graphs_is_the_run_without(mixers, tmp_path, caplog):
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=rng.integers(80, 200)) + i % 2 for i in range(40)]
    for split in ("TRAIN", "TEST"):
        text = "@classLabel true 0 1\n@data\n"
        text += "\n".join(",".join(map(str, x)) + f":{i % 2}" for i, x in enumerate(rows))
        (tmp_path / f"w_{split}.ts").write_text(text)
    prepare_labelled(tmp_path / "w", tmp_path / "data", "table", LabelledOptions(pad=True))
    losses = []
    for graphs in (False, True):
        recipe = make_recipe({
            "name": "tiny", "task": "classification", "mixers": mixers,
            "data": str(tmp_path / "data"), "output_dir": str(tmp_path / f"run-{graphs}"),
            "steps": 40, "batch_size": 8, "learning_rate": 1e-3, "log_every": 1,
            "classification": {"graphs": graphs},
            "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "bidirectional": True, "pooling": "mean", "norm": "batch",
                      "residual_dropout": 0.1},
        })  # fmt: skip
        folder = train(recipe, Console(quiet=True)).folder
        lines = (folder / "log.jsonl").read_text().splitlines()
        losses.append([entry["loss"] for entry in map(json.loads, lines) if "loss" in entry])
    assert "cannot be captured" not in caplog.text
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # the compiler's own
@pytest.mark.filterwarnings("ignore:Torchinductor does not support:UserWarning")
# asked by the compiler, which hides it from people, not from an error filter
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("mixers", ["h3", "hybrid", "attention"])
@pytest.mark.parametrize("compiled", [None, "blocks"])
def test_a_language_model_by_graphs_trains_to_the_same_bits(
    tiny, tmp_path, monkeypatch, caplog, mixers, compiled
):
    """Clipped, with dropout and accumulation, evaluated, and gone on with from a checkpoint."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))[1]
    )

    def run(name, **changes):
        changes = {"output_dir": str(tmp_path / name), "steps": 9} | changes
        model = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "d_state": 64, "embedding_dropout": 0.1, "residual_dropout": 0.1}  # fmt: skip
        if mixers == "attention":
            model |= {"rotary_dim": 16}
        recipe = tiny(
            mixers=mixers, model=model, precision="bf16", block_length=128, batch_size=16,
            micro_batch_size=4, max_grad_norm=0.5, save_every=5, eval_every=4, deterministic=True,
            compile=compiled,
            **changes,
        )  # fmt: skip
        try:
            train(recipe, Console(quiet=True))
        finally:
            torch.use_deterministic_algorithms(False)
        lines = (recipe.folder / "log.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        keys = ("loss", "grad_norm", "eval_loss", "learning_rate")
        return [[entry[k] for k in keys if k in entry] for entry in entries if "step" in entry]

    launched = run("launched", graphs=False)
    assert len(launched) > 9
    assert not replays
    assert run("graphs") == launched
    # a step's first part from the third step on; the others have run twice by then
    assert len(replays) == 7 + (4 * 9 - 9) - 3 * 2 - 2
    kept = tmp_path / "graphs" / "checkpoints"
    for folder in set(kept.iterdir()) - {kept / "checkpoint-5"}:
        shutil.rmtree(folder)
    del replays[:]
    assert run("graphs") == launched
    assert replays
    assert "cannot be captured" not in caplog.text


@pytest.mark.gpu
def test_a_loss_that_is_no_number_ends_a_run_by_graphs(tiny):
    recipe = tiny(mixers="h3", precision="bf16", steps=12, learning_rate=1e30, log_every=4)
    with pytest.raises(UserError, match="is not finite at step"):
        train(recipe, Console(quiet=True))


def test_when_a_run_is_captured(tiny):
    """What the host looks at within a step cannot be part of a graph."""

    def wants(recipe, recomputed=False):
        trainer = SimpleNamespace(
            recipe=recipe, args=SimpleNamespace(gradient_checkpointing=recomputed)
        )
        return H3Trainer.wants_graphs(trainer)

    assert wants(tiny())
    assert not wants(tiny(), recomputed=True)
    assert not wants(tiny(reset_state_at_documents=True))
    assert not wants(tiny(profile_steps=2))
    assert wants(tiny(profile_steps=2, graphs=True))
    assert not wants(tiny(graphs=False))
