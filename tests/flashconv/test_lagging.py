"""Steps whose states lag behind: in plain PyTorch, and the kernel in the interpreter or on a GPU.

As in `test_step`, everything is compared with the definition in float64.
"""

import math
import os
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from tests.flashconv.test_step import FLOOR, error, exact, problem

from h3lm.flashconv import RingState, StepOperators, h3_step_in_place, lagging
from h3lm.flashconv.state import H3State, as_real_pairs
from h3lm.flashconv.step import roll_in_place, unrolled

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
in_the_interpreter = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def start(taps, system, state, dtype):
    """A state that lags behind, with nothing behind it, and its operators."""
    operators = StepOperators.of(taps, system, lags=True)
    operators = StepOperators(*(x.to(DEVICE) for x in operators.tensors()))
    B, D, n_taps = *state.shift.shape[:2], taps.shape[1]
    pairs = as_real_pairs(state.diagonal).to(DEVICE).clone()
    ring = RingState(
        lagging.innermost(torch.full((B, D, n_taps), math.nan, dtype=dtype, device=DEVICE), 1),
        torch.zeros(B, dtype=torch.int64, device=DEVICE),
        lagging.innermost(pairs, 1),
        # nothing of it may be read
        torch.full_like(lagging.new_recent(B, D, pairs), math.nan),
    )
    roll_in_place(ring.ring, ring.position, state.shift.to(DEVICE))
    return operators, ring


def advance(operators, ring, qkv, how):
    outputs = []
    for step in qkv.to(DEVICE):
        q, k, v = step.chunk(3, -1)
        if isinstance(how, str):
            outputs.append(h3_step_in_place(q, k, v, operators, ring, backend=how))
        else:
            from h3lm.flashconv.kernels import step_lagging

            of = *operators[:4], operators.response
            size = step_lagging.LaggingSize(*how)
            outputs.append(step_lagging.step(q, k, v, *of, *ring, size=size))
        ring.position.add_(1)
    return torch.stack(outputs)


def end_of(operators, ring):
    return H3State(unrolled(ring.ring, ring.position), lagging.caught_up(ring, operators))


def check(B, D, modes, n_taps, dtype, steps, how):
    """Some steps, a row that begins again meanwhile, and the state after each stretch."""
    taps, system, state, qkv = problem(B, D, 1, modes, n_taps, dtype, sum(steps))
    operators, ring = start(taps, system, state, dtype)
    bounds = [0, *torch.tensor(steps).cumsum(0).tolist()]
    for begin, end in pairwise(bounds):
        expected, after = exact(taps, system, state, qkv[begin:end], 1)
        o = advance(operators, ring, qkv[begin:end], how)
        found = end_of(operators, ring)
        assert o.dtype == dtype
        assert error(o, expected) <= 2 * FLOOR[dtype]
        assert error(found.diagonal, after.diagonal) <= 2 * FLOOR[torch.float32]
        assert torch.equal(found.shift.cpu().double(), after.shift)  # lossless
        # row 0 goes on from another state, the others stay somewhere in their blocks
        state = H3State(found.shift.cpu(), found.diagonal.cpu())
        state.shift[0], state.diagonal[0] = torch.randn(D, n_taps - 1), torch.randn(D, modes)
        ring.position[0] = 0
        row = torch.zeros(n_taps, dtype=dtype, device=DEVICE).expand(1, D, -1).clone()
        roll_in_place(row, ring.position[:1], state.shift[:1].to(DEVICE))
        ring.ring[0] = row[0]
        ring.diagonal[0] = as_real_pairs(state.diagonal[0]).to(DEVICE)


@pytest.mark.parametrize("case", [(3, 512, 4, 16), (2, 96, 8, 12), (1, 32, 4, 8)], ids=str)
def test_steps_equal_the_definition(case):
    check(*case, torch.float32, (21, 1, 13), "torch")


@needs_triton
@in_the_interpreter
@pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("size", [(1, 2, 2, 32, 2), (4, 1, 4, 128, 4)], ids=str)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [((3, 64, 4, 8), torch.float32), ((1, 256, 4, 8), torch.float16)],
    ids=str,
)
def test_the_kernel_equals_the_definition(case, dtype, size):
    check(*case, dtype, (9, 3), size)


@needs_triton
@in_the_interpreter
@pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("rows", [16, 64])
def test_the_sizes_that_are_shipped_equal_the_definition(rows):
    from h3lm.flashconv.kernels import step_lagging

    size = step_lagging.SIZES[rows]
    fields = size.split, size.modes, size.rows, size.wide, size.warps
    check(2, 64, 32, 64, torch.float32, (9, 2), fields)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize(
    "case",
    [(1, 2048, 32, 64), (64, 768, 32, 64), (7, 96, 24, 48), (16, 256, 64, 128), (300, 32, 32, 64)],
    ids=str,
)
def test_the_kernel_equals_the_definition_on_the_gpu(case, dtype):
    check(*case, dtype, (21, 1, 13), "triton")


@pytest.mark.gpu
def test_every_size_of_the_kernel_equals_the_definition():
    from h3lm.flashconv.kernels import step_lagging

    for size in {*step_lagging.SIZES.values(), step_lagging.LaggingSize(2, 8, 8, 128)}:
        fields = size.split, size.modes, size.rows, size.wide, size.warps
        check(9, 2048, 32, 64, torch.bfloat16, (12, 5), fields)


@pytest.mark.gpu
def test_a_captured_step_equals_an_eager_one():
    taps, system, state, qkv = problem(6, 512, 1, 32, 64, torch.bfloat16, 19)
    operators, ring = start(taps, system, state, torch.bfloat16)
    expected = advance(operators, ring, qkv, "triton")
    end = end_of(operators, ring)
    operators, ring = start(taps, system, state, torch.bfloat16)
    kept = [x.clone() for x in ring]
    x = qkv[0].cuda()

    def step():
        o = h3_step_in_place(*x.chunk(3, -1), operators, ring)
        ring.position.add_(1)
        return o

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    for mine, old in zip(ring, kept, strict=True):
        mine.copy_(old)
    for new, wanted in zip(qkv.cuda(), expected, strict=True):
        x.copy_(new)
        graph.replay()
        assert torch.equal(o, wanted)
    assert torch.equal(end_of(operators, ring).diagonal, end.diagonal)


def test_operators_must_be_made_for_the_state():
    taps, system, state, qkv = problem(2, 32, 1, 4, 8, torch.float32, 1)
    operators, ring = start(taps, system, state, torch.float32)
    x = qkv[0].to(DEVICE).chunk(3, -1)
    with pytest.raises(ValueError, match="lags=True"):
        h3_step_in_place(*x, operators._replace(response=None), ring, backend="torch")
    with pytest.raises(ValueError, match="lags=True"):
        h3_step_in_place(*x, operators, ring._replace(recent=None), backend="torch")


@pytest.mark.parametrize("channels", [16, 48])
def test_states_that_cannot_lag_are_refused(channels):
    taps, system, state, qkv = problem(1, channels, 1, 4, 8, torch.float32, 1)
    operators, ring = start(taps, system, state, torch.float32)
    with pytest.raises(ValueError, match=f"not with head_dim 1, {channels} channels and 8 taps"):
        h3_step_in_place(*qkv[0].to(DEVICE).chunk(3, -1), operators, ring, backend="torch")


def test_what_lags():
    assert lagging.takes(1, 64, 8)
    assert not lagging.takes(2, 64, 64)
    assert not lagging.takes(1, 48, 64)
    assert not lagging.takes(1, 64, 7)
