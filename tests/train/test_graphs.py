"""Steps replayed as graphs: when they are captured, and that a run stays the run it is."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from h3lm.data.prepare_labelled import LabelledOptions, prepare_labelled
from h3lm.models import H3ClassificationConfig, H3ForSequenceClassification
from h3lm.train.graphs import MAX_FORMS, WARM_STEPS, GraphedSteps
from h3lm.train.recipe import make_recipe
from h3lm.train.run import train


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
