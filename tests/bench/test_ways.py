"""Ways beside each other: right before they are timed, and the package's table as reported."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from h3lm.bench import ways
from h3lm.bench.ways import CHUNKS, SCAN, WHOLE, MethodCase
from h3lm.flashconv import measured

REPORTS = Path(__file__).parents[2] / "docs" / "benchmarks"
CASES = [
    MethodCase(torch.bfloat16, 16, False, 2, 300),
    MethodCase(torch.bfloat16, 16, True, 2, 70),
    MethodCase(torch.float32, 16, False, 1, 300),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_way_is_compared_with_float64(case, monkeypatch):
    monkeypatch.setattr(ways, "MAX_FFT_LENGTH", 256)
    errors = ways.method_errors(case, "cpu")
    whole = case.length > 256 and not case.states
    assert {name.partition(", ")[2] for name in errors} == {SCAN, CHUNKS, *[WHOLE] * whole}
    assert 0 < max(errors.values()) <= ways.ALLOWED[case.dtype] / 3


def test_a_wrong_way_is_seen(monkeypatch):
    right = ways._call

    def wrong(case, way, *given, **more):
        run, leaves = right(case, way, *given, **more)
        return (lambda: run() * (1.02 if way == CHUNKS else 1.0)), leaves

    monkeypatch.setattr(ways, "_call", wrong)
    errors = ways.method_errors(CASES[0], "cpu")
    with pytest.raises(RuntimeError, match=f"y, {CHUNKS} is off by 2"):
        ways.refuse_wrong(CASES[0], errors)
    del errors[f"y, {CHUNKS}"], errors[f"du, {CHUNKS}"]
    ways.refuse_wrong(CASES[0], errors)
    with pytest.raises(RuntimeError, match="is off by nan"):
        ways.refuse_wrong(CASES[0], errors | {"dy": float("nan")})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_gradients_are_timed(case, monkeypatch):
    ran = []
    monkeypatch.setattr(ways, "CORE_CHANNELS", 2)
    monkeypatch.setattr(ways, "_graph_ms", lambda call: (float(not ran.append(call())), True))
    (row,) = ways.method_rows([case], "cpu")
    forward, grads = ran[0], ran[1]
    assert forward.shape == (case.rows, 2, case.length)
    assert len(grads) == 7
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert row[f"{SCAN} forward"] == row[f"{CHUNKS} both"] == 1.0
    assert row["launched"].startswith("scan forward, scan both, ")


def test_a_time_says_whether_it_was_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(ways.measure, "median_ms", lambda call, *_, **__: 2.0)
    for replayed, expected in (((1.0, ""), (1.0, False)), ((float("nan"), "no"), (2.0, True))):
        monkeypatch.setattr(ways.measure, "replayed_ms", lambda call, n, r=replayed: r)
        assert ways._graph_ms(lambda: None) == expected


class Case(NamedTuple):
    rows: int

    def columns(self):
        return {"rows": str(self.rows)}


@pytest.fixture
def _two_cases(monkeypatch):
    """Two cases of each half, timed at once."""
    monkeypatch.setattr(ways, "checked", iter)
    monkeypatch.setattr(
        ways.measure, "environment", lambda command: {"gpu": "G", "commit": "c", "ran": command}
    )
    monkeypatch.setattr(ways.measure, "gpu_name", lambda: "g")
    for name in ("method_rows", "algorithm_rows"):
        monkeypatch.setattr(ways, name, lambda cases: ({**x.columns(), "ms": 2.0} for x in cases))
    for name in ("method_cases", "algorithm_cases"):
        monkeypatch.setattr(ways, name, lambda: [Case(1), Case(2)])


@pytest.mark.usefixtures("_two_cases")
@pytest.mark.parametrize(("minutes", "timed"), [(0.0, 1), (1.0, 2)])
def test_what_was_timed_is_written_whatever_comes(minutes, timed, tmp_path):
    said = []
    ways.run(tmp_path, said.append, minutes)
    for name in ("methods", "algorithms"):
        content = json.loads((tmp_path / f"conv_g_{name}.json").read_text())
        assert len(content["rows"]) == timed
        assert content["notes"].endswith("1 of 2 cases: the clock left out the rest.") == (
            timed < 2
        )
        assert content["environment"]["ran"].startswith("python -m h3lm.bench.ways --time")
    assert any("out of time" in line for line in said) == (timed == 1)


@pytest.mark.usefixtures("_two_cases")
@pytest.mark.parametrize(("gpu", "expected"), [("G", [1.0, 2.0]), ("another", [2.0])])
def test_runs_on_like_machines_add_up(gpu, expected, tmp_path):
    before = {"rows": "1", "ms": 1.0, "launched": "ms"}
    content = {"environment": {"gpu": gpu, "commit": "c"}, "notes": "", "rows": [before]}
    (tmp_path / "conv_g_methods.json").write_text(json.dumps(content))
    ways.run(tmp_path, lambda line: None, 0.0, "methods")
    found = json.loads((tmp_path / "conv_g_methods.json").read_text())
    assert [row["ms"] for row in found["rows"]] == expected


def test_cases_are_timed_when_they_were_right_and_nothing_else_runs(monkeypatch):
    running, asked = [], []

    def errors(case):
        running.append(case)
        asked.append(case)
        wrong = case is cases[4]
        running.remove(case)
        return {"y": 1.0 if wrong else 0.0}

    cases = [CASES[0]._replace(length=300 + i) for i in range(5)]
    monkeypatch.setattr(ways, "ProcessPoolExecutor", lambda n, **__: ThreadPoolExecutor(n))
    monkeypatch.setattr(ways.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(ways, "_errors", errors)
    came = ways.checked(cases)
    for i in range(4):
        assert next(came) is cases[i]
        assert not running
        assert len(asked) == i // 2 * 2 + 2  # of two processes, no case of the next batch
    with pytest.raises(RuntimeError, match="y is off"):
        next(came)


def test_the_table_is_made_of_reports(tmp_path):
    environment = {"gpu": "NVIDIA H100"}
    for name, row in (("methods", {"length": "8", "scan both": 1.23456, "launched": "scan"}),
                      ("algorithms", {"lags": "9", "blocks forward": 123.4})):  # fmt: skip
        content = {"environment": environment, "rows": [row]}
        path = tmp_path / f"conv_nvidia_h100_80gb_hbm3_{name}.json"
        path.write_text(json.dumps(content))
    ways.write_table(tmp_path, tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == {
        "9": {
            "algorithms": {
                "gpu": "NVIDIA H100",
                "rows": [{"lags": "9", "blocks forward": 123.0}],
            },
            "methods": {"gpu": "NVIDIA H100", "rows": [{"length": "8", "scan both": 1.23}]},
        }
    }


def test_the_packages_table_is_what_the_committed_reports_say():
    assert json.loads(measured.FILE.read_text()) == ways.table(REPORTS)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # the interpreter
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
@pytest.mark.parametrize("gated", [False, True])
def test_every_algorithm_is_compared_with_float64(gated, monkeypatch):
    right = ways._tensors

    def few(case, device, channels):  # the interpreter has no bfloat16
        return [x.half() if x.dtype == torch.bfloat16 else x for x in right(case, device, 2)]

    monkeypatch.setattr(ways, "_tensors", few)
    errors = ways.algorithm_errors(ways.AlgorithmCase(gated, 64, 130, 3), "cpu")
    assert len(errors) == (8 if gated else 6)
    assert max(errors.values()) < 1e-3
