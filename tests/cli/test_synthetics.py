import json
import sys

import pytest

from h3lm.cli import main


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["h3lm", "synthetics", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_trains_and_reports(monkeypatch, capsys, tmp_path):
    status = call(
        monkeypatch,
        *("--task", "recall", "--mixer", "attention", "--seeds", "1", "--max-steps", "157"),
        *("--length", "6", "--num-test", "50", "--device", "cpu", "--out", str(tmp_path)),
    )
    out = capsys.readouterr().out
    assert status == 0
    assert "recall-l6-tests50 attention: 1 model(s) on cpu" in out
    assert "any value of the row" in out
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert run["planned_steps"] == 157
    assert run["steps"] <= 157
    assert (tmp_path / "accuracy.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "recal"], "unknown task 'recal': did you mean 'recall'?"),
        (["--mixer", "attenton"], "unknown mixer 'attenton': did you mean 'attention'?"),
        (["--vocab-size", "3"], "vocab_size=3 is too small for induction"),
        (["--task", "mqar-4", "--num-pairs", "32"], "length 64 cannot hold 32 pairs"),
        (["--task", "mqar-4", "--vocab-size", "8"], "4 pairs need as many keys"),
        (["--mixer", "h3+h3+h3"], "mixers names 3 layers, num_hidden_layers is 2"),
        (["--mixer", "s4-bidirectional"], "does not fit a causal model"),
        (["--device", "abacus"], "there is no device 'abacus' here"),
    ],
)
def test_bad_input_ends_in_one_line(monkeypatch, capsys, tmp_path, words, message):
    assert call(monkeypatch, *words, "--out", str(tmp_path / "lab")) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
