import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from h3lm.data.blocks import Blocks, Index

TEXT = "It was the best of times, it was the worst of times.\n" * 40


def h3lm(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "h3lm", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
        timeout=120,
    )


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "times.txt").write_text(TEXT)
    return tmp_path / "times.txt"


def test_prepare_says_where_the_results_lie_and_is_done_once(text, tmp_path):
    options = ["--tokenizer", "bpe", "--vocab-size", "265", "--block-length", "32"]
    done = h3lm("prepare", "times.txt", "out/times", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    blocks = Blocks(tmp_path / "out" / "times")
    index = Index.load(tmp_path / "out" / "times")
    assert blocks.block_length == 32
    assert done.stdout.splitlines() == [
        f"train: {len(blocks.stream):,} tokens, 1 documents, {len(blocks):,} blocks of 32",
        f"valid: {index.num_tokens('valid'):,} tokens, 1 documents, "
        f"{len(Blocks(tmp_path / 'out' / 'times', 'valid')):,} blocks of 32",
        "tokenizer: 265 ids, out/times/tokenizer",
        "prepared: out/times",
    ]
    assert "encoding train" in done.stderr  # the progress line, apart from the results
    again = h3lm("prepare", "times.txt", "out/times", *options, "--no-progress", cwd=tmp_path)
    assert again.stdout == done.stdout
    assert again.stderr == ""


def test_every_option_reaches_the_work(tmp_path):
    lines = "".join(json.dumps({"body": f"{TEXT} {i}"}) + "\n" for i in range(4))
    (tmp_path / "times.jsonl").write_text(lines)
    options = {
        "--tokenizer": "characters",
        "--text-field": "body",
        "--block-length": "16",
        "--valid-fraction": "0.5",
        "--shard-tokens": "999",
        "--workers": "1",
    }
    pairs = [word for pair in options.items() for word in pair]
    done = h3lm("prepare", "times.jsonl", "out", *pairs, "--no-progress", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    index = Index.load(tmp_path / "out")
    assert index.num_documents("valid") == 2
    assert index.splits["train"][0].num_tokens == 999
    assert index.settings["text_field"] == "body"
    assert index.settings["tokenizer"] == {"name": "characters"}


def test_mistakes_are_one_line_and_a_non_zero_status(text, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    cases = {
        ("missing.txt", "out"): "missing.txt: no such file or folder",
        ("times.txt", "times.txt/out"): "times.txt/out: cannot be written as a folder",
        ("bad.txt", "out"): "bad.txt: byte 3, 0xe9, is not UTF-8",
        ("times.txt", "out", "--vocab-size", "300"): "vocab_size is for the tokenizer 'bpe'",
    }
    for arguments, message in cases.items():
        done = h3lm("prepare", *arguments, "--no-progress", cwd=tmp_path)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""
