"""`bench.sanitize` without the tool: what it runs, what it reads, what it says where it cannot."""

import shutil

import pytest

pytest.importorskip("triton")
from h3lm.bench import sanitize


def test_problems_reach_every_algorithm_and_both_ends_of_a_size():
    found = list(sanitize.problems())
    assert {name for name, _ in found} == {
        "Toeplitz blocks",
        "block FFT",
        "block FFT through memory",
    }
    assert all(taps <= L and reverse <= L for _, (_, _, L, taps, reverse, _) in found)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("a\n========= ERROR SUMMARY: 0 errors\n", "ERROR SUMMARY: 0 errors"),
        (
            "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
        ),
        ("Device not supported", "no summary: Device not supported"),
        ("", "no summary: no output"),
    ],
)
def test_a_verdict_is_the_tools_own_summary(output, said):
    assert sanitize.verdict(output) == said


def test_without_the_tool_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setattr("sys.argv", ["sanitize"])
    assert sanitize.main() == 1
    assert "needs a CUDA device and compute-sanitizer" in capsys.readouterr().err
