"""A row in slices over processes equals the row in one, forward and backward."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from h3lm.flashconv import h3_core, ssm_conv
from h3lm.flashconv.sequence_parallel import slice_boundaries
from h3lm.ssm import DiagonalSSM, ShiftSSM


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    """Of rows over 2 and 4 processes, relative; see `sliced_rows.py`."""
    command = [sys.executable, "-m", "tests.flashconv.sliced_rows"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("slices", ["even", "uneven", "forgets", "packed", "packed-short"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-13), ("float32", 5e-6)])
def test_slices_equal_the_whole_row_with_all_gradients(differences, slices, dtype, bound):
    cases = {
        case: off
        for case, off in differences.items()
        if case.startswith(f"{slices} ") and case.endswith(dtype)
    }
    assert len(cases) == 3  # h3_core with both head_dims, ssm_conv
    for case, off in cases.items():
        assert off["inputs"] > 0, case  # it was compared
        assert max(off.values()) < bound, (case, off)


def test_a_slice_knows_where_sequences_begin():
    whole = torch.tensor([0, 17, 40, 115, 120])
    slices = [slice_boundaries(whole, *at).tolist() for at in ((0, 40), (40, 70), (70, 120))]
    # a sequence that begins with its slice is told by a second 0
    assert slices == [[0, 0, 17, 40], [0, 0, 30], [0, 45, 50]]


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_mistakes_are_one_line(alone):
    x = torch.randn(1, 2, 10)
    taps, system = ShiftSSM(2, 4).taps(), DiagonalSSM(2, 8).system()
    with pytest.raises(ValueError, match="reverse with a process_group"):
        h3_core(x, x, x, taps, system, reverse=True, process_group=alone)
    with pytest.raises(ValueError, match="a slice is empty"):
        ssm_conv(x[..., :0], system, process_group=alone)
    o, _ = h3_core(x, x, x, taps, system, process_group=alone)
    torch.testing.assert_close(o, h3_core(x, x, x, taps, system)[0])
