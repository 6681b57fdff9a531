"""The command line as a person meets it: real processes, one line for a mistake."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from h3lm import H3Config, H3ForCausalLM
from h3lm.cli import main
from h3lm.data.tokenizers import byte_tokenizer, character_tokenizer
from h3lm.models.folders import save_model
from h3lm.models.generation import stream_text

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def h3lm(*arguments, status=0):
    result = subprocess.run(
        [sys.executable, "-m", "h3lm", *map(str, arguments)],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == status, result.stderr
    return result


def mistake(*arguments, status=1):
    """The one line that a mistake prints; in this process, where torch is loaded already."""
    out = io.StringIO()
    with (
        unittest.mock.patch.object(sys, "argv", ["h3lm", *map(str, arguments)]),
        contextlib.redirect_stderr(out),
        pytest.raises(SystemExit) as stopped,
    ):
        main()
    return one_line(stopped.value.code, out.getvalue(), status)


def one_line(code, stderr, status=1):
    lines = stderr.strip().splitlines()
    assert code == status, stderr
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model"
    model = H3ForCausalLM(
        H3Config(vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    save_model(model, path, byte_tokenizer())
    return path


def test_help_and_version():
    assert "generate" in h3lm("--help").stdout
    assert h3lm("--version").stdout.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "fly"),
        (["generate", "x", "--prompt", "a", "--colour", "red"], "--colour"),
        (["generate", "x", "--prompt", "a", "--top-p", "2"], "--top-p"),
        (["generate", "x", "--prompt", "a", "--seed", "-1"], "--seed"),
        (["generate", "x", "--prompt", "a", "--seed", str(2**32)], "--seed"),
        (["eval", "x", "--data", "y", "--num-fewshot", "3"], "--num-fewshot is for --tasks"),
        (["eval", "x", "--tasks", "y", "--context", "3"], "--context is for --data and --perplex"),
        (["prepare", "x", "y", "--sample-rate", "8000"], "--sample-rate is for --labelled"),
        (["prepare", "x", "y", "--labelled", "table", "--length", "0"], "--length"),
        (
            ["prepare", "x", "y", "--labelled", "table", "--block-length", "8"],
            "--block-length is for texts",
        ),
    ],
)
def test_unknown_words_are_one_line(arguments, message):
    assert message in mistake(*arguments, status=2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "h3lm", "recipes"],
            stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip
    assert "no space left" in one_line(done.returncode, done.stderr)


def test_generate_streams_reproducible_text(folder):
    options = (
        "generate",
        folder,
        "--prompt",
        "ROMEO:",
        "--max-new-tokens",
        "20",
        "--device",
        "cpu",
    )
    greedy = h3lm(*options, "--temperature", "0").stdout
    assert greedy.startswith("ROMEO:")
    again = stream_text(str(folder), "ROMEO:", max_new_tokens=20, temperature=0.0, device="cpu")
    assert greedy == "".join(again) + "\n"
    sampled = [h3lm(*options, "--seed", seed, "--top-k", "40").stdout for seed in (1, 2)]
    assert sampled[0] != sampled[1]


def test_a_file_that_a_command_trips_over_is_one_line(tmp_path, monkeypatch):
    def trip():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "x"))

    monkeypatch.setattr("h3lm.train.recipe.shipped_recipes", trip)
    assert mistake("recipes") == f"error: {tmp_path / 'x'}: Permission denied"


def test_ctrl_c_ends_a_text_without_a_crash(folder):
    arguments = ("--prompt", "ROMEO:", "--max-new-tokens", "50000", "--device", "cpu")
    with subprocess.Popen(
        [sys.executable, "-m", "h3lm", "generate", str(folder), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as running:  # fmt: skip
        assert running.stdout.read(8)  # the prompt and more
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert stderr.decode().strip() == "error: interrupted"


def test_generate_without_a_model_or_with_a_broken_one(folder, tmp_path):
    real = h3lm("generate", tmp_path / "no", "--prompt", "a", status=1)
    assert "no such model folder" in one_line(real.returncode, real.stderr)
    assert "has no config.json" in mistake("generate", tmp_path, "--prompt", "a")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "a model of type 'gpt2'" in mistake("generate", tmp_path / "gpt2", "--prompt", "a")
    assert f"; {folder} is one" in mistake("generate", folder.parent, "--prompt", "a")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = (folder / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "broken" in mistake("generate", broken, "--prompt", "a")
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "broken" in mistake("generate", broken, "--prompt", "a")


def test_ids_beyond_the_model_are_named(folder, tmp_path):
    H3ForCausalLM(
        H3Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    line = mistake("generate", tmp_path / "small", "--prompt", "zebra")
    assert "ids from 97 to 122, the model knows 0 to 63" in line


def test_a_prompt_that_the_tokenizer_cannot_spell_is_one_line(tmp_path):
    model = H3ForCausalLM(
        H3Config(vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    save_model(model, tmp_path / "letters", character_tokenizer("abc"))
    assert "x" in mistake("generate", tmp_path / "letters", "--prompt", "abx")


def test_convert_writes_a_loadable_folder(data_dir, tmp_path):
    golden = data_dir / "release" / "pure_hd4"
    out = h3lm("convert", golden / "model.pt", tmp_path / "out").stdout
    assert "h3, h3, h3" in out
    expected = load_file(golden / "expected.safetensors")
    model = H3ForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = model(expected["input_ids_short"]).logits
    assert (logits - expected["logits_short"]).abs().max() < 1e-4


def test_convert_mistakes(data_dir, tmp_path):
    golden = data_dir / "release"
    assert "no such checkpoint" in mistake("convert", tmp_path / "no.pt", tmp_path / "out")
    hybrid = golden / "hybrid_rotary_hd8" / "model.pt"
    assert "--num-attention-heads" in mistake("convert", hybrid, tmp_path / "out")
    line = mistake("convert", hybrid, tmp_path / "out", "--num-attention-heads", "7")
    assert "does not divide" in line
    (tmp_path / "file").write_text("in the way")
    pure = golden / "pure_hd4" / "model.pt"
    assert "cannot write" in mistake("convert", pure, tmp_path / "file" / "out")
    assert "cannot write" in mistake("convert", pure, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    # some versions of torch read this format too
    assert "not a" in mistake("convert", tmp_path / "x.safetensors", tmp_path / "out")


def test_doctor_checks_every_path_on_this_machine():
    out = h3lm("doctor", "--device", "cpu").stdout
    assert "all paths agree with their definition" in out
    assert "h3_core torch bfloat16" in out
    assert "FAIL" not in out
