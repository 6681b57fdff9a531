import json
import subprocess
import sys
import time

import numpy as np
import pytest
from transformers import PreTrainedModel

from h3lm.errors import UserError
from h3lm.evals.kept import KeptArrays, is_known
from h3lm.evals.text import evaluate_texts

OPTIONS = {"context": 16, "batch_size": 2, "lengths": [8, 64]}


class Killed(Exception):
    pass


def figures(folder):
    report = json.loads((folder / "report.json").read_text())
    documents = (folder / "documents.jsonl").read_text()
    return report["tasks"], documents


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "report"
    evaluate_texts(str(place / "model-bytes"), data=place / "times.txt", output=folder, **OPTIONS)
    return folder


def count_calls(monkeypatch):
    calls = []
    plain = PreTrainedModel.__call__

    def counted(self, *arguments, **named):
        calls.append(1)
        return plain(self, *arguments, **named)

    monkeypatch.setattr(PreTrainedModel, "__call__", counted)
    return calls


@pytest.mark.parametrize("stop", [("times", 100), ("length 8", 100), ("length 64", 100)])
def test_a_broken_run_goes_on_and_finds_the_same(place, whole, tmp_path, monkeypatch, stop):
    calls = count_calls(monkeypatch)

    def run(progress=None):
        before = len(calls)
        evaluate_texts(
            str(place / "model-bytes"), data=place / "times.txt", output=tmp_path / "report",
            progress=progress, **OPTIONS,
        )  # fmt: skip
        return len(calls) - before

    def break_off(name, done, total):
        if stop[0] in name and done >= stop[1]:
            raise Killed

    with pytest.raises(Killed):
        run(break_off)
    spent = len(calls)
    again = run()
    assert figures(tmp_path / "report") == figures(whole)
    assert run() == 0
    # windows that were broken off are read again, nothing else
    alone = count_calls(monkeypatch)
    evaluate_texts(
        str(place / "model-bytes"), data=place / "times.txt", output=tmp_path / "fresh", **OPTIONS
    )
    assert len(alone) <= spent + again <= len(alone) + 10
    assert again < len(alone)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(place, whole, tmp_path):
    code = f"""
import time
from pathlib import Path
from h3lm.evals.text import evaluate_texts
evaluate_texts({str(place / "model-bytes")!r}, data=Path({str(place / "times.txt")!r}),
               output=Path("run"), progress=lambda *_: time.sleep(0.5), **{OPTIONS!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    path = tmp_path / "run" / "nats-0-tokens.npy"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and (~np.isnan(np.load(path))).sum() > 40:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    known = np.load(path)
    assert 40 < (~np.isnan(known)).sum() < len(known) - 1
    evaluate_texts(
        str(place / "model-bytes"), data=place / "times.txt", output=tmp_path / "run", **OPTIONS
    )
    after = np.load(path)
    assert is_known(after[1:])
    np.testing.assert_array_equal(after[~np.isnan(known)], known[~np.isnan(known)])
    (mine,), (theirs,) = (figures(f)[0].values() for f in (tmp_path / "run", whole))
    assert mine["lengths"]["by_length"] == theirs["lengths"]["by_length"]
    for metric, found in theirs["metrics"].items():
        assert mine["metrics"][metric]["value"] == pytest.approx(found["value"], rel=1e-5)


def test_what_is_kept_is_of_one_shape_and_whole(tmp_path):
    kept = KeptArrays(tmp_path, "nats-")
    found = kept("a", (3,), np.float32)
    assert not is_known(found)
    found[:2] = 1, 2
    del found
    assert kept("a", (3,), np.float32)[:2].tolist() == [1, 2]
    assert not list(tmp_path.glob("*.new"))
    with pytest.raises(UserError, match=r"nats-a.npy: is of another text; remove it"):
        kept("a", (4,), np.float32)
    for torn in (b"torn", b"", (tmp_path / "nats-a.npy").read_bytes()[:-1]):
        (tmp_path / "nats-b.npy").write_bytes(torn)
        with pytest.raises(UserError, match=r"nats-b.npy: is damaged; remove it"):
            kept("b", (3,), np.float32)
    with pytest.raises(UserError, match="cannot be used"):
        KeptArrays(tmp_path / "nowhere")("a", (1,))
