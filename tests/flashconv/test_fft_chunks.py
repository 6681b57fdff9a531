"""Chunks joined by a state against one long convolution, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h3lm.flashconv import fft_chunks, fft_conv, fft_operators, ssm_conv
from h3lm.flashconv.dispatch import Problem, choose_method
from h3lm.ssm import DPLRSSM, DiagonalSSM

MODULES = {
    "diagonal": lambda: DiagonalSSM(3, 8, dt_min=0.01).double(),
    "S4": lambda: DPLRSSM(3, 8, dt_min=0.01).double(),
}


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(MODULES)),
    L=st.integers(1, 300),
    C=st.sampled_from([1, 7, 64, 100, 128]),
    gated=st.booleans(),
    stateful=st.booleans(),
    reverse=st.booleans(),
    packed=st.booleans(),
)
def test_equals_the_definition_with_states_and_gradients(
    kind, L, C, gated, stateful, reverse, packed
):
    module = MODULES[kind]()
    bounds = torch.tensor(sorted({0, L // 3, L // 2, L})) if packed else None
    B = 1 if packed else 2
    sequences = B if bounds is None else len(bounds) - 1
    u, pre, post = (normal(B, 3, L) for _ in range(3))
    gates = {"pre_gate": pre, "post_gate": post} if gated else {}
    state = normal(sequences, 3, 4, dtype=torch.complex128) if stateful else None
    wanted = [u, *gates.values(), *module.parameters(), *([] if state is None else [state])]
    results = []
    for backend in ("reference", "torch"):
        system = module.system()
        if backend == "torch":
            system = fft_operators(system, L, chunk_length=C)
        y, end = ssm_conv(
            u, system, **gates, initial_state=state, return_final_state=True,
            cu_seqlens=bounds, reverse=reverse, method="fft_chunks", backend=backend,
        )  # fmt: skip
        g = torch.Generator().manual_seed(1)
        weight = torch.randn(y.shape, generator=g, dtype=torch.float64)
        loss = (y * weight).sum() + end.abs().square().sum()
        results.append([y, end, *torch.autograd.grad(loss, wanted)])
    for actual, expected in zip(*reversed(results), strict=True):
        assert (actual - expected).norm() <= 1e-9 * expected.norm() + 1e-12


@pytest.mark.parametrize("kind", sorted(MODULES))
def test_is_one_long_convolution(kind, monkeypatch):
    monkeypatch.setattr(fft_chunks.fft_operators, "__defaults__", (512,))
    system = MODULES[kind]().system()
    u = torch.randn(2, 3, 5000, dtype=torch.float64)
    y, state = ssm_conv(u, system, method="fft_chunks")
    expected = fft_conv(u, system.filter(5000), skip=system.skip)
    assert state is None
    assert (y - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_long_memory_in_low_precision(dtype):
    module = DPLRSSM(4, 64, dt_min=1e-4, dt_max=1e-3)  # nothing is forgotten within a chunk
    u = torch.randn(1, 4, 20000).to(dtype)
    with torch.no_grad():
        y, _ = ssm_conv(u, module.system())
        module.double()
        exact, _ = ssm_conv(u.double(), fft_operators(module.system(), 20000, 20000))
    error = (y.double() - exact).norm() / exact.norm()
    # rounded once by the convolution, once with what the state adds
    assert error < {torch.bfloat16: 3.3e-3, torch.float32: 2e-6}[dtype]


@pytest.mark.parametrize("kind", sorted(MODULES))
def test_autocast_changes_nothing(kind):
    system = MODULES[kind]().float().system()
    u = torch.randn(2, 3, 300).bfloat16()
    state = torch.randn(2, 3, 4, dtype=torch.complex64)
    options = {"initial_state": state, "return_final_state": True, "method": "fft_chunks"}
    expected = ssm_conv(u, system, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = ssm_conv(u, system, **options)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", sorted(MODULES))
def test_on_a_gpu_by_the_kernels(kind):
    module = MODULES[kind]().float().cuda()
    u = torch.randn(2, 3, 40000, device="cuda").bfloat16().requires_grad_()
    results = []
    for wide in (False, True):
        system = module.system()
        x = u.double() if wide else u
        y, end = ssm_conv(
            x, system, return_final_state=True, method="fft_chunks",
            backend="torch" if wide else "triton",
        )  # fmt: skip
        grads = torch.autograd.grad(y.double().square().mean(), [u, *module.parameters()])
        results.append([y, torch.view_as_real(end), *grads])
    for found, expected in zip(*results, strict=True):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < 8e-3


def test_without_gradients_the_spectrum_is_made_once():
    operators = fft_operators(MODULES["S4"]().float().system(), 90, 40)
    u, prepared = torch.randn(2, 3, 90), operators.filter.prepared
    fresh, _ = ssm_conv(u, operators)
    assert not prepared
    with torch.no_grad():
        first, _ = ssm_conv(u, operators)
        made = dict(prepared)
        again, _ = ssm_conv(u, operators)
    assert len(made) == 2  # chunks of 40, and the tail of 10
    assert all(prepared[key] is made[key] for key in made)
    assert torch.equal(first, again)
    torch.testing.assert_close(fresh, first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "diagonal", "change", "chosen", "word"),
    [
        ("auto", True, {"capability": (8, 0)}, "scan", "fewest bytes"),
        ("auto", True, {"packed": True}, "scan", "one by one"),
        ("auto", True, {"num_modes": 128}, "fft_chunks", "d_state up to 128"),
        ("auto", False, {}, "fft_chunks", "not diagonal"),
        ("fft_chunks", True, {}, "fft_chunks", "asked for"),
    ],
)
def test_the_method_follows_from_the_problem_and_says_why(method, diagonal, change, chosen, word):
    problem = Problem(**{"length": 4096} | change)
    choice = choose_method(method, diagonal, torch.device("cuda"), problem, torch.bfloat16)
    assert choice.backend == chosen
    assert word in choice.reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "scan"}, "method='scan' is for diagonal systems"),
        ({"method": "chunks"}, "method='chunks' is not one of auto, scan, fft_chunks"),
        ({"u": torch.zeros(1, 4, 9)}, "system has 3 systems, u has 4 channels"),
    ],
)
def test_mistakes_are_one_clear_line(changes, message):
    arguments = {"u": torch.zeros(1, 3, 9), "system": DPLRSSM(3, 8).system()} | changes
    with pytest.raises(ValueError, match=message):
        ssm_conv(**arguments)
