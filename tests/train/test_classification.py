import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, TrainerState

from h3lm import H3Config, H3ForCausalLM
from h3lm.data.labelled import Labelled
from h3lm.data.prepare_labelled import LabelledOptions, prepare_labelled
from h3lm.errors import UserError
from h3lm.evals.classification import Classified, roc_auc
from h3lm.train.examples import (
    ClassificationSettings,
    ExampleCollator,
    ExampleDataset,
    ExampleOrder,
    varied,
)
from h3lm.train.progress import Clock, ProgressLine, Speed
from h3lm.train.recipe import load_recipe, make_recipe, shipped_recipes
from h3lm.train.run import train

TINY = {
    "name": "tiny",
    "task": "classification",
    "mixers": "s4d",
    "model": {
        "hidden_size": 8, "num_hidden_layers": 1, "d_state": 4, "bidirectional": True,
        "pooling": "mean", "intermediate_size": 0, "residual_dropout": 0.1, "norm": "batch",
    },
    "steps": 8,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "log_every": 1,
}  # fmt: skip


def waves(n, rng):
    """Slow and fast waves with noise, of unequal lengths."""
    labels = rng.integers(0, 2, n)
    rows = []
    for label in labels:
        t = np.arange(20 + rng.integers(0, 9))
        rows.append(
            np.sin(t * (0.3 + 0.9 * label) + rng.uniform(0, 6)) + 0.1 * rng.normal(size=len(t))
        )
    return rows, [("slow", "fast")[label] for label in labels]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for split, n in (("TRAIN", 30), ("TEST", 20)):
        rows, labels = waves(n, rng)
        text = "@classLabel true slow fast\n@data\n"
        for row, label in zip(rows, labels, strict=True):
            text += ",".join(f"{x:.5f}" for x in row) + f":{label}\n"
        (folder / f"w_{split}.ts").write_text(text)
    prepare_labelled(folder / "w", folder / "out", "table", LabelledOptions(pad=True))
    return folder / "out"


@pytest.fixture
def tiny(data, tmp_path):
    def make(**changes):
        values = json.loads(json.dumps(TINY)) | {
            "data": str(data),
            "output_dir": str(tmp_path / "run"),
        }
        return make_recipe(values | changes)

    return make


def run(recipe):
    shown = io.StringIO()
    return train(recipe, Console(file=shown, width=200)), shown.getvalue()


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [entry["loss"] for entry in log(folder) if "loss" in entry]


def test_a_run_learns_and_leaves_model_curves_confusion_and_summary(tiny, data):
    result, shown = run(tiny(steps=100, eval_every=50))
    folder, summary = result.folder, result.summary
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["accuracy"] > 0.85
    assert summary["roc_auc"] > 0.9
    assert summary["split"] == "test"
    assert (summary["epochs"], summary["examples"]) == (100 * 8 / 30, 20)
    for name in ("curves.png", "confusion.png"):
        assert (folder / name).stat().st_size > 1000
    assert [e["step"] for e in log(folder) if "eval_accuracy" in e] == [50, 100]
    assert "test accuracy" in shown
    line = ProgressLine(Speed(Clock(None), 1), Console(file=io.StringIO()))
    line.on_log(None, None, None, {"eval_loss": 0.5, "eval_accuracy": 0.75})
    assert "valid 0.500  accuracy 0.750" in line._text(TrainerState())
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    assert model.config.id2label == {0: "slow", 1: "fast"}
    test = Labelled(data, "test")
    right = 0
    for i in range(len(test)):
        logits = model(input_values=torch.from_numpy(test[i].rows[0])[None]).logits
        right += int(logits.argmax()) == test[i].label
    assert right / len(test) == pytest.approx(summary["accuracy"])


def test_the_same_recipe_gives_the_same_run_and_another_seed_another(tiny, tmp_path):
    varied = {"shift": 3, "noise": 0.1, "gain_db": 3.0, "stretch": 0.1, "standardise": True}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tiny(output_dir=str(tmp_path / name), seed=seed, classification=varied))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_a_resumed_run_is_the_uninterrupted_one(tiny, tmp_path):
    varied = {"shift": 3, "noise": 0.1, "stretch": 0.1}
    whole = run(tiny(output_dir=str(tmp_path / "a"), save_every=2, classification=varied))[0]
    part = tiny(
        output_dir=str(tmp_path / "b"), save_every=2, keep_checkpoints=4, classification=varied
    )
    run(part)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "checkpoint-8")
    resumed, shown = run(part)
    assert "resuming at step 6" in shown
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert resumed.summary["loss"] == whole.summary["loss"]
    first, second = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "model").state_dict()
        for name in "ab"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match="is of another run"):
        run(tiny(output_dir=str(tmp_path / "b"), save_every=2, learning_rate=1e-3))


def test_a_checkpoint_with_another_order_of_examples_is_refused(tiny):
    run(tiny(save_every=4))
    (folder,) = Path(tiny().output_dir).glob("checkpoints/checkpoint-8")
    manifest = folder / "checkpoint.json"
    written = json.loads(manifest.read_text())
    del written["point"]["order"]  # as an older version did
    manifest.write_text(json.dumps(written))
    with pytest.raises(UserError, match="orders examples in another way") as refused:
        run(tiny(save_every=4))
    assert "\n" not in str(refused.value)
    assert manifest.exists()


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny, tmp_path):
    model = TINY["model"] | {"residual_dropout": 0.0, "norm": "layer"}
    for name, micro in (("a", None), ("b", 2)):
        run(tiny(output_dir=str(tmp_path / name), model=model, micro_batch_size=micro,
                 classification={"label_smoothing": 0.1}))  # fmt: skip
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-4)


def test_seeds_are_reported_with_their_spread_and_not_run_twice(tiny):
    recipe = tiny(steps=4, classification={"seeds": 2})
    result, shown = run(recipe)
    found = result.summary["accuracies"]
    assert len(found) == 2
    assert result.summary["accuracy"] == pytest.approx(np.mean(found))
    assert result.summary["accuracy_sd"] == pytest.approx(np.std(found, ddof=1))
    assert "±" in shown
    assert (result.folder / "curves.png").is_file()
    before = (result.folder / "seed-1" / "summary.json").stat().st_mtime_ns
    again, shown = run(recipe)
    assert shown.count("done before") == 2
    assert (result.folder / "seed-1" / "summary.json").stat().st_mtime_ns == before
    assert again.summary["accuracies"] == found
    with pytest.raises(UserError, match="seed-0 is of another run: steps=4 there, 5 now"):
        run(tiny(steps=5, classification={"seeds": 2}))


def test_a_language_model_is_tuned_to_classify_text(tiny, tmp_path):
    rows = [{"text": "good film" if i % 2 else "bad film", "label": i % 2} for i in range(16)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare_labelled(tmp_path / "t.jsonl", tmp_path / "text", "text")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "d_state": 8}
    H3ForCausalLM(H3Config(vocab_size=264, **sizes)).save_pretrained(tmp_path / "lm")
    recipe = tiny(
        data=str(tmp_path / "text"), init_from=str(tmp_path / "lm"), model={}, steps=30,
        save_every=30,
    )  # fmt: skip
    result, _ = run(recipe)
    assert result.summary["split"] == "train"  # there is no other
    assert result.summary["accuracy"] == 1.0
    assert (result.folder / "model" / "tokenizer.json").is_file()
    # and on from the classifier, whose classes must be those of the data
    again = tiny(
        data=str(tmp_path / "text"), init_from=str(result.folder / "model"), model={}, steps=1,
        output_dir=str(tmp_path / "again"),
    )  # fmt: skip
    assert run(again)[0].summary["accuracy"] == 1.0
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": "maybe"}\n')
    prepare_labelled(tmp_path / "t.jsonl", tmp_path / "other", "text")
    stranger = tiny(
        data=str(tmp_path / "other"), init_from=str(result.folder / "model"), model={},
        output_dir=str(tmp_path / "no"),
    )  # fmt: skip
    with pytest.raises(UserError, match="does not know the label 'maybe', only 0, 1"):
        run(stranger)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": ""}, "no data: give data=FOLDER, made by h3lm prepare .* --labelled"),
        ({"data": "nowhere"}, "nowhere: no labelled data here"),
        ({"classification": {"sift": 1}}, r"unknown recipe key classification.sift; .*'shift'"),
        ({"classification": {"shift": 1.5}}, r"classification.shift=1.5 must be a whole number"),
        ({"classification": {"standardise": 1}}, "must be true or false"),
        ({"classification": {"noise": True}}, "must be a number"),
        ({"classification": {"seeds": 0}}, r"classification.seeds=0 must be at least 1"),
        ({"classification": {"stretch": 1}}, r"classification.stretch=1 must be from 0 to below 1"),
        ({"model": {"widht": 3}}, "H3ClassificationConfig has no field widht"),
        ({"model": {"norm": "max"}}, "norm='max' is not one of"),
        ({"preset": "125m"}, "presets are language models"),
    ],
)
def test_mistakes_are_told_in_one_line(tiny, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        run(tiny(**changes))
    assert "\n" not in str(caught.value)


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="task='tagging' is not one of language, classification"):
        make_recipe({"task": "tagging", "steps": 1})


# Examples and batches


def test_every_pass_takes_every_example_once_and_varies_it(data):
    order = list(ExampleOrder(30, 75, seed=3))
    assert [sorted(i % 30 for i in order[a : a + 30]) for a in (0, 30)] == [list(range(30))] * 2
    assert all(i // 30 == position // 30 for position, i in enumerate(order))
    settings = ClassificationSettings(shift=5, noise=0.1)
    dataset = ExampleDataset(Labelled(data), settings, np.arange(2), seed=0)
    first, same, later = (dataset[i].rows[0] for i in (4, 4, 34))
    assert np.array_equal(first, same)
    assert first.shape != later.shape or not np.array_equal(first, later)
    assert dataset[4].label == dataset[34].label
    plain = ExampleDataset(Labelled(data), ClassificationSettings(max_length=9), np.array([1, 0]))
    assert len(plain[0].rows[0]) == 9
    assert plain[0].label == 1 - Labelled(data)[0].label
    level = ExampleDataset(Labelled(data), ClassificationSettings(standardise=True), np.arange(2))
    row = level[0].rows[0]
    assert abs(row.mean()) < 1e-6
    assert row.std() == pytest.approx(1, abs=1e-5)


def test_a_stretched_signal_keeps_its_form_and_its_height():
    t = np.arange(200) / 200
    row = np.stack([np.sin(2 * np.pi * 3 * t), np.cos(2 * np.pi * 5 * t)], 1)
    lengths = set()
    for seed in range(8):
        y = varied(row, ClassificationSettings(stretch=0.2), np.random.default_rng(seed))
        lengths.add(len(y))
        t = np.arange(len(y)) / len(y)
        expected = np.stack([np.sin(2 * np.pi * 3 * t), np.cos(2 * np.pi * 5 * t)], 1)
        assert np.allclose(y, expected, atol=1e-9)
    assert len(lengths) > 3
    assert 160 <= min(lengths) < 200 < max(lengths) <= 240


def test_a_moved_signal_is_padded_with_silence_or_cut():
    row = np.arange(1.0, 6.0)[:, None]
    found = {
        tuple(varied(row, ClassificationSettings(shift=2), np.random.default_rng(seed))[:, 0])
        for seed in range(40)
    }
    assert found == {
        (1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), (0, 0, 1, 2, 3, 4, 5), (2, 3, 4, 5), (3, 4, 5),
    }  # fmt: skip


def test_a_batch_is_padded_to_its_longest_and_masked(data):
    labelled = Labelled(data)
    dataset = ExampleDataset(labelled, ClassificationSettings(), np.arange(2))
    examples = [dataset[i] for i in range(4)]
    batch = ExampleCollator(labelled.kind)(examples)
    lengths = [len(example.rows[0]) for example in examples]
    assert batch["lengths"].tolist() == lengths
    assert batch["input_values"].shape == (4, 64, 1)  # a multiple that kernels like
    exact = ExampleCollator(labelled.kind, unit=1)(examples)
    assert exact["input_values"].shape == (4, max(lengths), 1)
    for i, example in enumerate(examples):
        assert np.array_equal(batch["input_values"][i, : lengths[i]].numpy(), example.rows[0])
        assert not batch["input_values"][i, lengths[i] :].any()
    assert "lengths" not in ExampleCollator(labelled.kind)(examples[:1])


# What is measured


def test_roc_auc_is_the_chance_that_a_positive_scores_higher():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, 60).astype(float), rng.integers(0, 2, 60)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert roc_auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert roc_auc(np.array([1.0, 2.0]), np.array([0, 1])) == 1.0
    assert roc_auc(np.array([1.0, 2.0]), np.array([1, 1])) is None


def test_scores_of_a_small_table():
    logits = np.array([[2, 0, 0], [0, 1, 0], [3, 0, 0], [0, 0, 5.0]], np.float32)
    found = Classified(logits, np.array([0, 1, 1, 2]))
    assert found.confusion().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert found.accuracy == 0.75
    assert found.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found.roc_auc is None
    expected = [
        math.log(math.e**2 + 2) - 2, math.log(math.e + 2) - 1, math.log(math.e**3 + 2),
        math.log(math.e**5 + 2) - 5,
    ]  # fmt: skip
    assert found.loss == pytest.approx(np.mean(expected), rel=1e-6)


# Recipes

CLASSIFIERS = {name for name in shipped_recipes() if load_recipe(name).task == "classification"}


def test_recipes_are_shipped_for_every_task():
    lra = {f"lra-{t}" for t in ("listops", "text", "retrieval", "image", "pathfinder", "pathx")}
    small = {"sc10", "fsdd", "smnist", "reviews", "acsf1", "osuleaf"}
    assert lra | small <= CLASSIFIERS


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_every_shipped_classifier_builds_its_model(name):
    from h3lm.data.labelled import LabelledIndex, RowKind
    from h3lm.train.classification import build_config

    recipe = load_recipe(name)
    assert recipe.description
    ClassificationSettings.read(recipe.classification)
    pairs = name == "lra-retrieval"
    ids = name in ("lra-listops", "lra-text", "lra-retrieval", "reviews")
    kind = (
        RowKind("uint16", vocab_size=257, rows_per_example=1 + pairs)
        if ids
        else RowKind("float32", 1)
    )
    config = build_config(recipe, LabelledIndex({}, kind, ("a", "b"), {}))
    with torch.device("meta"):
        AutoModelForSequenceClassification.from_config(config)
