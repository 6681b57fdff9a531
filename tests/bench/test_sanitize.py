"""`bench.sanitize` without the tool: what it runs, what it reads, what it says where it cannot."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
from h3lm.bench import sanitize
from h3lm.bench.sanitize import Kernels

PROGRAM = """
import sys
def well(): pass
def badly(): raise ValueError("off")
def late(): print("found: 3 things"); sys.exit(3)
NAMES = {"well": well, "badly": badly, "late": late}
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def test_problems_reach_every_algorithm_and_both_ends_of_a_size():
    found = [problem for _, problem in sanitize.problems()]
    algorithms = {problem.algorithm for problem in found}
    assert algorithms == {"Toeplitz blocks", "block FFT", "block FFT through memory"}
    assert all(max(p.taps, p.taps_reverse) <= p.L for p in found)
    assert {option for p in found for option in p.options} == set("gsc")


@pytest.mark.parametrize(
    ("output", "said", "clean"),
    [
        ("right, x\n========= ERROR SUMMARY: 0 errors\n", "ERROR SUMMARY: 0 errors", True),
        ("right, x\n========= ERROR SUMMARY: 10 errors\n", "ERROR SUMMARY: 10 errors", False),
        (
            "right, x\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            True,
        ),
        (
            "========= ERROR SUMMARY: 2 errors\nright, x\n========= ERROR SUMMARY: 0 errors",
            "ERROR SUMMARY: 2 errors; ERROR SUMMARY: 0 errors",
            False,
        ),
        ("right, x\nDevice not supported", "no summary: Device not supported", False),
        ("========= ERROR SUMMARY: 0 errors", "the program did not end: ========= ", False),
        ("", "the program did not end: no output", False),
    ],
)
def test_a_verdict_is_the_tools_own_summary_of_a_whole_run(output, said, clean):
    found = sanitize.verdict(output, "right, x")
    assert found[0].startswith(said)
    assert found[1] == clean


def test_names_of_other_programs_stand_beside_its_own(program):
    every = sanitize.every_name([program], "*")
    assert [kernels.name for kernels in every if kernels.program] == ["well", "badly", "late"]
    assert len(every) == len(sanitize.NAMES) + 3
    assert sanitize.every_name([program], "w*") == [Kernels("well", program)]


def test_wrong_and_unfinished_runs_are_not_clean(program):
    every = sanitize.every_name([program], "[wbl]*")  # all three
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    stand_in = [sys.executable, "-c", "raise SystemExit('no such device')"]
    end = time.monotonic() + 300
    found = [sanitize.run_under([], kernels, end) for kernels in every]
    assert [ran.clean for ran in found] == [True, False, False]
    assert found[1].verdict == "the program did not end: ValueError: off"
    assert not sanitize.run_under(stand_in, every[0], end).clean
    soon = time.monotonic() + 1
    assert sanitize.run_under(slow, every[0], soon).verdict == "not done: out of time"
    assert sanitize.run_under([], every[0], 0.0).verdict == "not run: out of time"


def test_each_tool_runs_what_is_right_alone(program, tmp_path):
    tool = tmp_path / "tool"
    tool.write_text(
        "#!/bin/sh\nfor last; do true; done\n"
        f'while [ "$1" != "{sys.executable}" ]; do shift; done\n'
        '"$@" && echo "========= ERROR SUMMARY: 0 errors"\n'
    )
    tool.chmod(0o755)
    every = sanitize.every_name([program], "[wb]*")
    end = time.monotonic() + 300
    found = sanitize.sanitize(str(tool), every, ["memcheck", "synccheck"], end, 2)
    verdicts = {(kernels.name, name): (ran.verdict, ran.clean) for kernels, name, ran in found}
    assert verdicts == {
        ("badly", "none"): ("the program did not end: ValueError: off", False),
        ("well", "memcheck"): ("ERROR SUMMARY: 0 errors", True),
        ("well", "synccheck"): ("ERROR SUMMARY: 0 errors", True),
    }


def test_runs_on_one_machine_share_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize.measure, "gpu_name", lambda: "gpu")
    environment = dict.fromkeys((*sanitize.SAME, "command"), "a")

    def row(kernels, verdict):
        return {"kernels": kernels, "tool": "memcheck", "verdict": verdict}

    def said(path):
        rows = json.loads(path.with_suffix(".json").read_text())["rows"]
        return {row["kernels"]: row["verdict"] for row in rows}

    sanitize.write(tmp_path, environment, [row("x", "old"), row("y", "old")])
    path = sanitize.write(tmp_path, environment | {"command": "b"}, [row("x", "new")])
    assert said(path) == {"x": "new", "y": "old"}
    assert said(sanitize.write(tmp_path, environment | {"torch": "b"}, [row("z", "new")])) == {
        "z": "new"
    }


def test_without_the_tool_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setattr("sys.argv", ["sanitize"])
    assert sanitize.main() == 1
    assert "needs a CUDA device and compute-sanitizer" in capsys.readouterr().err
