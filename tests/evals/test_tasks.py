import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch

from h3lm import H3Config, H3ForCausalLM
from h3lm.data.tokenizers import byte_tokenizer, train_bpe
from h3lm.errors import UserError
from h3lm.evals import squad
from h3lm.evals.harness import load_tasks, run_tasks
from h3lm.evals.journal import Journal
from h3lm.evals.prefix_tree import Request
from h3lm.evals.scorer import Answer
from h3lm.evals.tasks import evaluate_tasks
from h3lm.models.folders import save_model

lm_eval = pytest.importorskip("lm_eval")

SUPERGLUE = ["boolq", "cb", "copa", "multirc", "sglue_rte", "wsc", "wic"]
OTHERS = ["lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande"]
ALL = [*SUPERGLUE, *OTHERS, "openbookqa"]


@pytest.fixture(scope="module")
def data(request):
    return request.path.parents[1] / "data" / "eval"


def tiny(**fields):
    torch.manual_seed(0)
    return H3ForCausalLM(
        H3Config(
            vocab_size=264,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            d_state=8,
            initializer_range=0.4,
            **fields,
        )
    ).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "model"
    save_model(tiny(), folder, byte_tokenizer())
    return str(folder)


@pytest.fixture(scope="module")
def report(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "report"
    return evaluate_tasks(model, ALL, data_dir=data, output=folder), folder


@pytest.mark.slow
def test_the_tree_gives_what_the_harness_gives(report, data):
    from lm_eval.models.huggingface import HFLM

    plain = HFLM(pretrained=tiny(), tokenizer=byte_tokenizer(), backend="causal", batch_size=16)
    expected = run_tasks(plain, load_tasks(ALL, data_dir=data))
    for name, theirs in expected.items():
        ours = report[0].results[name]
        assert ours.metrics.keys() == theirs.metrics.keys()
        for metric, (value, error) in theirs.metrics.items():
            assert ours.metrics[metric][0] == pytest.approx(value, rel=1e-4)
            assert ours.metrics[metric][1] == pytest.approx(error, rel=1e-4, abs=1e-9)
        for a, b in zip(ours.documents, theirs.documents, strict=True):
            assert a["doc_hash"] == b["doc_hash"]
            assert a["log_likelihoods"] == pytest.approx(b["log_likelihoods"], abs=1e-4)


def test_the_report_folder_says_what_was_measured(report):
    found, folder = report
    written = json.loads((folder / "report.json").read_text())
    assert set(written["tasks"]) == set(ALL)
    for task in written["tasks"].values():
        assert all(m["stderr"] is not None for m in task["metrics"].values())
    assert written["tasks"]["boolq"]["majority_class"] == pytest.approx(4 / 6)
    assert written["versions"]["lm_eval"]
    assert all(len(digest) == 64 for digest in written["files"].values())
    text = (folder / "report.md").read_text()
    assert "| WSC | WIC | RTE | CB | MultiRC | ReCoRD | BoolQ | COPA | average of 7 |" in text
    assert "Hybrid H3-125M (paper)" in text
    assert "majority class" in text
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert found.work.computed < found.work.asked
    assert len((folder / "documents.jsonl").read_text().splitlines()) == sum(
        task["documents"] for task in written["tasks"].values()
    )


def test_multirc_is_told_the_right_way_round_too(report):
    result = report[0].results["multirc"]
    assert result.metrics["acc_right"][0] == pytest.approx(1 - result.metrics["acc"][0])
    assert any("acc_right" in note for note in result.notes)
    labels_first = [d["metrics"]["acc_right"] for d in result.documents]
    yes_is_likelier = [d["log_likelihoods"][0] > d["log_likelihoods"][1] for d in result.documents]
    truth = [answer == p + 2 for p in range(2) for _ in range(2) for answer in range(1, 5)]
    assert labels_first == [float(y == t) for y, t in zip(yes_is_likelier, truth, strict=True)]


def test_record_is_in_the_average_on_its_own_validation_split_only(model, data, tmp_path):
    folder = tmp_path / "superglue" / "ReCoRD"
    folder.mkdir(parents=True)
    (folder / "val.jsonl").write_bytes(
        (data / "superglue" / "ReCoRD" / "fewglue_dev32.jsonl").read_bytes()
    )
    official = evaluate_tasks(model, ["record"], data_dir=tmp_path)
    substitute = evaluate_tasks(model, ["record"], data_dir=data)
    for found, average in ((official, "average of 1"), (substitute, "average of 0")):
        result = found.results["record"]
        assert average in found.markdown()
        assert not found.left_out
        for document in result.documents:
            right = document["log_likelihoods"][1] > document["log_likelihoods"][0]  # Paris, Rome
            assert document["metrics"] == {"f1": float(right), "em": float(right)}
    assert substitute.results["record"].notes[0].startswith("NO ReCoRD RESULT")
    assert not official.results["record"].notes
    assert "†" in substitute.markdown()


@pytest.mark.parametrize(
    ("gold", "answer", "exact", "f1"),
    [
        ("The Beatles!", "beatles", 1, 1.0),
        ("New York City", "York", 0, 0.5),
        ("a b", "x y z", 0, 0.0),
        ("one one two", "one two two", 0, 2 / 3),
        ("", "", 1, 1.0),
        ("the", "no", 0, 0.0),
    ],
)
def test_answers_are_compared_as_by_squad(gold, answer, exact, f1):
    assert squad.compute_exact(gold, answer) == exact
    assert squad.compute_f1(gold, answer) == pytest.approx(f1)


def test_answers_on_disk_are_not_asked_again(report, model, data, monkeypatch):
    found, folder = report
    again = evaluate_tasks(model, ALL, data_dir=data, output=folder)
    assert again.work.requests == 0
    for name, result in found.results.items():
        assert again.results[name].metrics == result.metrics
        assert again.results[name].documents == result.documents


def test_fewshot_examples_from_the_scored_split_are_not_scored(model, data):
    loaded = load_tasks(["hellaswag"], data_dir=data, num_fewshot=2, fixed_fewshot=True)
    task = loaded.tasks["hellaswag"]
    assert len(task.task_docs) == 40 - 32
    assert "not scored" in loaded.notes["hellaswag"][0]
    contexts = [
        task.fewshot_context(doc, num_fewshot=2).rsplit("\n\n", 1)[0] for doc in task.task_docs
    ]
    assert len(set(contexts)) == 1
    assert "kitchen 0." in contexts[0]
    assert "kitchen 1." in contexts[0]


def test_what_a_set_cannot_give_is_said(data):
    loaded = load_tasks(["boolq", "lambada_openai"], data_dir=data, num_fewshot=1)
    assert "FewGLUE" in loaded.notes["boolq"][0]
    assert "zero-shot only" in loaded.notes["lambada_openai"][0]
    assert loaded.tasks["lambada_openai"].get_config("num_fewshot") == 0
    openbook = load_tasks(["openbookqa"], data_dir=data)
    assert "dev split" in openbook.notes["openbookqa"][0]


def test_mistakes_are_one_line(model, data, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "piqa_valid.jsonl").write_text('{"goal": "x", "sol1": "a"}\n{"goal"')
    (tmp_path / "superglue" / "CB").mkdir(parents=True)
    (tmp_path / "superglue" / "CB" / "val.jsonl").write_text('{"label"\n')
    learned = tmp_path / "learned"
    save_model(tiny(num_learned_positions=32), learned, byte_tokenizer())
    foreign = tmp_path / "foreign"
    save_model(tiny(), foreign)
    byte_tokenizer().save_pretrained(foreign)
    config = json.loads((foreign / "config.json").read_text())
    small = H3ForCausalLM(H3Config(**{**config, "vocab_size": 200, "tokenizer_vocab_size": None,
                                      "eos_token_id": None}))  # fmt: skip
    small.save_pretrained(foreign)
    other = tmp_path / "other_model"
    torch.manual_seed(1)
    save_model(H3ForCausalLM(tiny().config), other, byte_tokenizer())
    evaluate_tasks(model, ["copa"], data_dir=data, output=tmp_path / "report")
    (tmp_path / "orphan").mkdir()
    (tmp_path / "orphan" / "report.json").write_text("{}")
    cases = [
        ((model, ["bolq"]), {"data_dir": data}, "there is no task 'bolq'.*boolq"),
        ((model, ["copa"]), {"data_dir": tmp_path / "no"}, "no such folder"),
        ((model, ["copa"]), {"data_dir": tmp_path}, "has no files for copa"),
        ((model, ["piqa"]), {"data_dir": tmp_path}, r"piqa_valid.jsonl, line 1.*label"),
        ((model, ["cb"]), {"data_dir": tmp_path}, r"CB/val.jsonl, line 1: is not JSON"),
        ((model, ["piqa"]), {"data_dir": data, "num_fewshot": 2}, "no labelled document is left"),
        ((model, ["boolq"]), {"data_dir": data, "num_fewshot": 5}, "no labelled document is left"),
        ((str(learned), ["copa"]), {"data_dir": data}, "32 learned positions"),
        ((str(foreign), ["copa"]), {"data_dir": data}, "another model's tokenizer"),
        ((str(other), ["copa"]), {"data_dir": data, "output": tmp_path / "report"},
         "holds the report of another run"),
        ((model, ["copa"]), {"data_dir": data, "limit": 2, "output": tmp_path / "report"},
         r"another run \(its limit differs\)"),
        ((model, ["cb"]), {"data_dir": data, "output": tmp_path / "report"},
         r"another run \(its tasks, data differs\)"),
        ((model, ["copa"]), {"data_dir": data, "output": tmp_path / "orphan"},
         "whose journal is gone"),
        ((model, ["copa"]), {"data_dir": data, "precision": "fp8"}, "not one of fp32, bf16"),
    ]  # fmt: skip
    for arguments, named, message in cases:
        with pytest.raises(UserError, match=message) as error:
            evaluate_tasks(*arguments, **named)
        assert "\n" not in str(error.value)


def test_without_lm_eval_the_command_that_installs_it_is_named(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'h3lm\[eval\]'"):
        evaluate_tasks(model, ["copa"])


def test_a_journal_survives_a_torn_line_and_refuses_another_model(tmp_path):
    path = tmp_path / "journal.jsonl"
    keys = [Journal.key(Request([1], [n])) for n in range(3)]
    with Journal(path, {"model": "a"}) as journal:
        journal.add(keys, [Answer(-0.1 * n, bool(n)) for n in range(3)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with Journal(path, {"model": "a"}) as journal:
        assert journal.known == {keys[n]: Answer(-0.1 * n, bool(n)) for n in range(2)}
        journal.add(keys[2:], [Answer(-0.2, True)])
    assert path.read_bytes() == whole
    with pytest.raises(UserError, match="another run"):
        Journal(path, {"model": "b"})


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(report, model, data, tmp_path):
    code = f"""
import sys, time
from h3lm.evals.tasks import evaluate_tasks
from pathlib import Path
evaluate_tasks({model!r}, {ALL!r}, data_dir=Path({str(data)!r}), output=Path("run"),
               memory_gb=0.001, progress=lambda *_: time.sleep(0.5))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    journal = tmp_path / "run" / "journal.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > 3:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    written = journal.read_bytes().count(b"\n") - 1
    again = evaluate_tasks(model, ALL, data_dir=data, output=tmp_path / "run")
    total = report[0].work.requests
    assert 0 < written < total
    assert again.work.requests == total - written
    for name, result in report[0].results.items():
        for metric, (value, _) in result.metrics.items():
            assert again.results[name].metrics[metric][0] == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_the_harnesss_own_program_scores_a_folder(model, data, tmp_path):
    """Nothing but lm-eval, told of a local task; it knows of h3lm by the folder's remote code."""
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"question": f"{n} and", "answer": " two"}) + "\n" for n in range(4))
    )
    (tmp_path / "local.yaml").write_text(
        f"""task: local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "texts.jsonl"}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "local",
         "--model_args", f"pretrained={model},trust_remote_code=True,dtype=float32",
         "--device", "cpu", "--include_path", str(tmp_path), "--output_path", "out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1",
                          "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(found.read_text())["results"]["local"]["perplexity,none"]
    with torch.no_grad():
        nats = []
        for n in range(4):
            ids = torch.tensor([byte_tokenizer()(f"{n} and two")["input_ids"]])
            scores = tiny()(ids).logits[0, -5:-1].log_softmax(-1)
            nats.append(-float(scores[range(4), ids[0, -4:]].sum()))
    assert theirs == pytest.approx(torch.tensor(nats).mean().exp().item(), rel=1e-3)


def test_texts_are_tokenised_as_the_harness_does():
    """Against the harness's own way, on texts that mix all kinds of white space and marks."""
    from h3lm.evals.tree_lm import TreeLM

    draw = random.Random(0)
    pieces = [
        " ",
        "  ",
        "\n",
        "\n\n",
        " \n",
        "\t",
        "a",
        "the",
        "cat's",
        "7",
        "é",
        "...",
        "-",
        "\x1c",
    ]
    texts = ["".join(draw.choices(pieces, k=30)) for _ in range(60)]
    tokenizer = train_bpe(texts, 340)
    torch.manual_seed(0)
    config = H3Config(vocab_size=344, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      d_state=8, mixers="h3")  # fmt: skip
    lm = TreeLM(H3ForCausalLM(config).eval(), tokenizer)
    pairs = [(a, b) for a, b in zip(texts, reversed(texts), strict=True) if a.strip() and b.strip()]
    pairs += [(a, draw.choice([" ", "\n", ""]) + "yes") for a, _ in pairs]
    for pair, request in zip(pairs, lm.encode(pairs), strict=True):
        found = [*map(int, request.context)], [*map(int, request.continuation)]
        assert found == lm._encode_pair(*pair)
