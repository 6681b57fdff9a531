"""`h3lm generate` with prompts and with files of requests."""

import json
import sys

import pytest
import torch

from h3lm import H3Config, H3ForCausalLM
from h3lm.cli import main
from h3lm.data.tokenizers import byte_tokenizer
from h3lm.models.folders import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model"
    model = H3ForCausalLM(
        H3Config(vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    save_model(model, path, byte_tokenizer())
    return path


@pytest.fixture
def generate(monkeypatch, capsys, folder):
    """The status, output and error lines of a call."""

    def call(*arguments):
        words = ["h3lm", "generate", str(folder), "--device", "cpu", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err.strip().splitlines()

    return call


def test_requests_are_answered_as_they_would_be_alone(generate, tmp_path):
    file = tmp_path / "requests.jsonl"
    prompts = ["ROMEO:", "Wherefore art", "a", "To be, or not to be"]
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    options = ("--max-new-tokens", 12, "--slots", 2, "--temperature", 0)
    status, out, _ = generate("--requests", file, *options)
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert sorted(line["line"] for line in lines) == [1, 2, 3, 4]
    for line in lines:
        assert line["prompt"] == prompts[line["line"] - 1]
        assert line["tokens"] <= 12
        _, alone, _ = generate(
            "--prompt", line["prompt"], "--max-new-tokens", 12, "--temperature", 0
        )
        # bytes that make no character yet are left out of a stream's end alike
        assert alone == line["prompt"] + line["text"] + "\n"


def test_the_seed_decides_the_samples(generate, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "b", "seed": 7}\n')
    runs = []
    for seed in (1, 1, 2):
        _, out, _ = generate("--requests", file, "--max-new-tokens", 12, "--seed", seed)
        lines = sorted(map(json.loads, out.splitlines()), key=lambda line: line["line"])
        runs.append([line["text"] for line in lines])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]
    assert runs[0][:2] != runs[2][:2]
    assert runs[0][2] == runs[2][2]  # it has a seed of its own


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give --prompt or --requests"),
        (("--prompt", "a", "--requests", "b"), "give --prompt or --requests"),
        (("--prompt", "a", "--temperature", 0, "--top-p", 0.5), "contradicts top_p"),
        (
            ("--requests", "x", "--temperature", 0, "--top-p", 0.5, "--top-k", 3),
            "contradicts top_p and top_k",
        ),
        (("--requests", "/no/such/file"), "cannot be read"),
    ],
)
def test_mistakes_are_one_line(generate, arguments, says):
    status, _, lines = generate(*arguments)
    assert status == 1
    assert len(lines) == 1
    assert says in lines[0]


def test_a_bad_line_is_named(generate, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": }\n')
    status, _, lines = generate("--requests", file)
    assert (status, len(lines)) == (1, 1)
    assert "line 2: not JSON" in lines[0]
