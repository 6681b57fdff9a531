import os
import re
from importlib.util import find_spec

import pytest
import torch

from h3lm.bench import accuracy
from h3lm.bench.accuracy import as_a_whole, by_steps, everything, random_problem, widened

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_plain_path_rounds_once_and_steps_round_several_times(dtype: torch.dtype) -> None:
    problem = random_problem(2, 16, 300, 32, 64, dtype, True, 2, device=CPU)
    exact = everything(as_a_whole(2), widened(problem), True)
    once, steps = (everything(run(2), problem, True) for run in (as_a_whole, by_steps))
    for name in ("o", "dq", "dk", "dv"):
        size = exact[name].norm() * accuracy.ROUNDING[dtype]
        a, b = (float((x[name].double() - exact[name]).norm() / size) for x in (once, steps))
        assert 0.9 < a < 1.15, name
        assert 1.5 < b < 3, name


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_rows_of_the_table_hold_both_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "SHAPES", ((1, 4, 70, None), (1, 4, 70, accuracy.HARDLY)))
    monkeypatch.setattr(accuracy, "DRAWS", 1)
    rows = list(accuracy.errors("triton", 1, torch.float16, DEVICE))
    assert [row["B×D×L"] for row in rows] == ["1×4×70", "1×4×70, a = 0.9999 in size, b = 1"]
    for row in rows:
        for name in ("o", "dk", "end x", "dx", "dskip"):
            ratio, strict = re.fullmatch(r"([\d.]+) \(([\d.]+)\)", str(row[name])).groups()
            assert 0 < float(ratio) < 4, name
            assert 0 < float(strict) < 8, name
