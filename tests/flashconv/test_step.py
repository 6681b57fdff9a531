"""A single step: in plain PyTorch, and the kernel in Triton's interpreter or on a GPU.

Everything is compared with the definition in float64 by relative Frobenius norm.
"""

import math
import os
from importlib.util import find_spec

import pytest
import torch

from h3lm.flashconv import RingState, StepOperators, h3_step, h3_step_in_place, reference
from h3lm.flashconv.dispatch import Choice, Problem, choose
from h3lm.flashconv.state import H3State, as_real_pairs, diagonal_shape, from_real_pairs
from h3lm.flashconv.step import roll_in_place, unrolled
from h3lm.ssm import DiagonalSSM
from h3lm.ssm.operators import DiagonalSystem

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# plain PyTorch computes in float32 and rounds the output once; the kernel does the same
FLOOR = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def problem(B, D, head_dim, modes, n_taps, dtype, steps):
    H = D // head_dim
    dt = torch.exp(torch.rand(H, 1, dtype=torch.float64) * 4.6 - 6.9)
    poles = torch.complex(torch.tensor(-0.5).double(), math.pi * torch.arange(modes).double())
    a = torch.exp(poles * dt)
    system = DiagonalSystem(
        a.to(torch.complex64), ((a - 1) / poles).to(torch.complex64),
        torch.randn(H, modes, dtype=torch.complex64), torch.randn(H),
    )  # fmt: skip
    taps = torch.randn(D, n_taps) / n_taps**0.5
    state = H3State(
        torch.randn(B, D, n_taps - 1).to(dtype),
        torch.randn(diagonal_shape(B, H, head_dim, modes), dtype=torch.complex64),
    )
    qkv = torch.randn(steps, B, 3 * D).to(dtype)
    return taps, system, state, qkv


def exact(taps, system, state, qkv, head_dim):
    wide = DiagonalSystem(
        *(z.to(torch.complex128) for z in (system.a, system.b, system.c)), system.skip.double()
    )
    state = H3State(state.shift.double(), state.diagonal.to(torch.complex128))
    q, k, v = qkv.double().permute(1, 2, 0).chunk(3, 1)
    o, end = reference.h3_core(q, k, v, taps.double(), wide, head_dim=head_dim, initial_state=state)
    return o.permute(2, 0, 1), end


def run_in_place(taps, system, state, qkv, head_dim, backend, start, size=None):
    """All steps on `DEVICE`; `start` is where each row's ring goes on."""
    B, D = state.shift.shape[:2]
    operators = StepOperators(*(x.to(DEVICE) for x in StepOperators.of(taps, system).tensors()))
    ring = RingState(
        torch.full((B, D, taps.shape[1]), math.nan, dtype=qkv.dtype, device=DEVICE),
        start.to(DEVICE).clone(),
        as_real_pairs(state.diagonal).to(DEVICE).clone(),
    )
    roll_in_place(ring.ring, ring.position, state.shift.to(DEVICE))
    outputs = []
    for step in qkv.to(DEVICE):
        q, k, v = step.chunk(3, -1)
        if backend == "kernel":
            from h3lm.flashconv.kernels import step_triton

            o = step_triton.step(q, k, v, *operators[:5], *ring[:3], head_dim=head_dim, size=size)
        else:
            o = h3_step_in_place(q, k, v, operators, ring, head_dim=head_dim, backend=backend)
        outputs.append(o)
        ring.position.add_(1)
    end = H3State(unrolled(ring.ring, ring.position), from_real_pairs(ring.diagonal))
    return torch.stack(outputs), end


def error(x, expected):
    x = x.cpu().to(expected.dtype)
    return float((x - expected).norm() / expected.norm())


def check(B, D, head_dim, modes, n_taps, dtype, steps, backend, size=None, start=None):
    taps, system, state, qkv = problem(B, D, head_dim, modes, n_taps, dtype, steps)
    expected, end = exact(taps, system, state, qkv, head_dim)
    if start is None:
        start = torch.randint(0, 3 * n_taps, (B,))
    o, actual = run_in_place(taps, system, state, qkv, head_dim, backend, start, size)
    assert o.dtype == dtype
    assert error(o, expected) <= 2 * FLOOR[dtype]
    assert error(actual.diagonal, end.diagonal) <= 2 * FLOOR[torch.float32]
    assert torch.equal(actual.shift.cpu().double(), end.shift)  # lossless


@pytest.mark.parametrize("head_dim", [1, 2, 8])
@pytest.mark.parametrize("n_taps", [2, 5, 16])
def test_steps_in_place_equal_the_definition(head_dim, n_taps):
    check(3, 16, head_dim, 8, n_taps, torch.float32, 2 * n_taps + 1, "torch")


KERNEL_CASES = [
    # B, D, head_dim, modes, n_taps
    (1, 8, 1, 8, 16),
    (5, 12, 1, 16, 16),  # a program's columns and rows are not full
    (3, 8, 1, 24, 48),  # neither is a power of two
    (2, 8, 2, 8, 7),
    (3, 16, 4, 8, 16),
    (2, 16, 8, 8, 3),
]


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # the interpreter
@pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_kernel_equals_the_definition(case, dtype):
    check(*case, dtype, 3, "kernel")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *KERNEL_CASES,
        (1, 2048, 1, 32, 64),
        (64, 768, 1, 32, 64),
        (512, 96, 1, 32, 64),
        (7, 256, 8, 32, 64),
        (3, 64, 1, 64, 128),
    ],
    ids=str,
)
def test_kernel_equals_the_definition_on_the_gpu(case, dtype):
    check(*case, dtype, 5, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("size", [(4, 1, 1), (16, 4, 4), (16, 2, 4)], ids=str)
@pytest.mark.parametrize("case", [(1, 48, 1, 32, 64), (7, 2048, 1, 32, 64), (64, 112, 1, 32, 64)])
def test_the_lean_kernel_equals_the_definition(case, size, alike, dtype):
    from h3lm.flashconv.kernels.step_triton import StepSize

    start = torch.full(case[:1], 70) if alike else None
    rows, stages, warps = size
    size = StepSize(4 * warps, rows, warps, stages=stages, lean=True)
    check(*case, dtype, 3, "kernel", size, start)


def test_a_strided_state_is_refused_by_kernels(monkeypatch):
    taps, system, state, qkv = problem(2, 8, 1, 8, 16, torch.float32, 1)
    strided = as_real_pairs(state.diagonal).transpose(0, 1).contiguous().transpose(0, 1)
    ring = RingState(torch.zeros(2, 8, 16), torch.zeros(2, dtype=torch.int64), strided)
    monkeypatch.setattr("h3lm.flashconv.step.choose", lambda *a: Choice("triton", "asked for"))
    with pytest.raises(ValueError, match="must be contiguous"):
        h3_step_in_place(*qkv[0].chunk(3, -1), StepOperators.of(taps, system), ring)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [1, 8])
def test_a_captured_step_equals_an_eager_one(head_dim):
    taps, system, state, qkv = problem(6, 64, head_dim, 32, 64, torch.bfloat16, 9)
    start = torch.arange(6) * 31
    expected, end = run_in_place(taps, system, state, qkv, head_dim, "triton", start)
    operators = StepOperators(*(x.cuda() for x in StepOperators.of(taps, system).tensors()))
    ring = RingState(
        torch.zeros(6, 64, 64, dtype=torch.bfloat16, device="cuda"),
        start.cuda(),
        torch.zeros_like(as_real_pairs(state.diagonal)).cuda(),
    )
    x = qkv[0].cuda()

    def step():
        o = h3_step_in_place(*x.chunk(3, -1), operators, ring, head_dim=head_dim)
        ring.position.add_(1)
        return o

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    ring.position.copy_(start)
    roll_in_place(ring.ring, ring.position, state.shift.cuda())
    ring.diagonal.copy_(as_real_pairs(state.diagonal))
    for new, wanted in zip(qkv.cuda(), expected, strict=True):
        x.copy_(new)
        graph.replay()
        assert torch.equal(o, wanted)
    assert torch.equal(from_real_pairs(ring.diagonal), end.diagonal)


def test_rings_roll_and_unroll():
    shift, position = torch.randn(3, 4, 6), torch.tensor([0, 3, 20])
    ring = torch.full((3, 4, 7), math.nan)
    roll_in_place(ring, position, shift)
    assert torch.equal(unrolled(ring, position), shift)


def test_a_step_of_half_inputs_is_as_good_as_the_functional_one():
    taps, system, state, qkv = problem(2, 8, 1, 8, 16, torch.bfloat16, 1)
    o, _ = run_in_place(taps, system, state, qkv, 1, "torch", torch.tensor([0, 5]))
    q, k, v = qkv[0].to(DEVICE).chunk(3, -1)
    moved = DiagonalSystem(*(z.to(DEVICE) for z in (system.a, system.b, system.c, system.skip)))
    state = H3State(*(x.to(DEVICE) for x in state))
    expected, _ = h3_step(q, k, v, taps.to(DEVICE), moved, state)
    assert torch.equal(o[0], expected)


def test_what_the_step_kernel_takes():
    cuda, bf16 = torch.device("cuda"), torch.bfloat16

    def chosen(**fields):
        return choose("h3_step", cuda, bf16, problem=Problem(1, has_triton=True, **fields))

    assert chosen().backend == "triton"
    assert chosen(capability=(8, 6), num_modes=64, n_taps=128, head_dim=8).backend == "triton"
    assert "head_dim" in chosen(head_dim=16).reason
    assert "taps" in chosen(n_taps=129).reason
    assert "d_state" in chosen(num_modes=65).reason
    assert chosen(complex64=False).backend == "torch"
    with pytest.raises(ValueError, match="the Hopper kernel is for h3_core"):
        choose("h3_step", cuda, bf16, "gluon", Problem(1, has_triton=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 4, 1)}, r"q must be \(B, D\), got \(2, 4, 1\)"),
        ({"v": torch.zeros(2, 3)}, r"v is \(2, 3\) .* q is \(2, 4\)"),
        ({"taps": torch.zeros(4, 5)}, r"initial_state has shift \(2, 4, 6\) .* needs \(2, 4, 4\)"),
        ({"state": None}, "zero_state makes the one before anything was seen"),
        ({"state": (1, 2)}, "must be an H3State, not tuple"),
        ({"head_dim": 3}, "head_dim=3 times 4 systems must be the 4 channels"),
        ({"system": DiagonalSSM(4, 8).system().chunk_operators()}, "not a ChunkOperators"),
    ],
)
def test_mistakes_of_a_step_are_one_clear_line(changes, message):
    taps, system, state, qkv = problem(2, 4, 1, 4, 7, torch.float32, 1)
    q, k, v = qkv[0].chunk(3, 1)
    arguments = {"q": q, "k": k, "v": v, "taps": taps, "system": system, "state": state} | changes
    with pytest.raises(ValueError, match=message):
        h3_step(**arguments)
