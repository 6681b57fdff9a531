import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h3lm.ssm import DiagonalSSM, DiagonalSystem, discretize


def system(H=3, half=4, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    a = torch.exp(torch.complex(-normal(H, half).abs() * 0.2, normal(H, half)))
    b, c = (torch.complex(normal(H, half), normal(H, half)) for _ in range(2))
    return DiagonalSystem(*(x.requires_grad_() for x in (a, b, c, normal(H))))


def impulse_response(s, length):
    u = torch.zeros(1, s.num_systems, length, dtype=s.skip.dtype)
    u[..., 0] = 1
    outputs, state = [], None
    for t in range(length):
        y, state = s.step(u[..., t], state)
        outputs.append(y)
    response = torch.stack(outputs, -1)[0]
    return torch.cat([response[:, :1] - s.skip[:, None], response[:, 1:]], 1)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("zoh", (0.19508230199714, 0.18556802585902)),
        ("bilinear", (0.19512195121951, 0.18560380725758)),
    ],
)
def test_one_mode_by_hand(rule, expected):
    A = torch.full((1, 1), -0.5, dtype=torch.complex128)
    one = torch.ones(1, 1, dtype=torch.complex128)
    a, b = discretize(A, one, torch.tensor([0.1], dtype=torch.float64), rule)
    taps = DiagonalSystem(a, b, one, torch.zeros(1, dtype=torch.float64)).filter(2)
    assert torch.allclose(taps, torch.tensor([expected], dtype=torch.float64), atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(2, 300), seed=st.integers(0, 9))
def test_filter_is_the_impulse_response_with_gradients(length, seed):
    s = system(seed=seed)
    expected, actual = impulse_response(s, length), s.filter(length)
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()
    weight = torch.randn(expected.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((x * weight).sum(), [s.a, s.b, s.c]) for x in (actual, expected)]
    for got, want in zip(*grads, strict=True):
        assert (got - want).abs().max() <= 1e-10 * want.abs().max().clamp(min=1)


@settings(max_examples=15, deadline=None)
@given(T=st.integers(1, 70), n_taps=st.integers(1, 90))
def test_chunk_operators_are_what_they_say(T, n_taps):
    s = system()
    taps = torch.randn(6, n_taps, dtype=torch.float64)
    ops = s.chunk_operators(taps, T)
    t, u = torch.arange(T)[:, None], torch.arange(T)
    response = s.filter(T).detach()
    response[:, 0] += s.skip.detach()
    M = torch.where(t >= u, response[:, (t - u).clamp(min=0)], 0.0)
    assert (ops.M - M).abs().max() < 1e-12
    power = s.a.detach()[..., None] ** torch.arange(T + 1)
    K = s.b[..., None] * power[..., :T].flip(-1)
    P = 2 * s.c[..., None] * power[..., 1:]
    assert (ops.K - torch.cat([K.real, K.imag], 1)).abs().max() < 1e-12
    assert (ops.P - torch.cat([P.real, -P.imag], 1).mT).abs().max() < 1e-12
    assert (ops.decay - power[..., T]).abs().max() < 1e-13
    assert ops.F.shape == (6, 1 + math.ceil((n_taps - 1) / T), T, T)
    for m in range(ops.F.shape[1]):
        lag = m * T + t - u
        inside = (lag >= 0) & (lag < n_taps)
        F = torch.where(inside, taps[:, lag.clamp(0, n_taps - 1)], 0.0)
        assert torch.equal(ops.F[:, m], F)
    assert ops.system is s
    assert ops.chunk_length == T


def test_single_precision_operators_carry_no_more_than_its_rounding():
    ssm = DiagonalSSM(16)
    wide = ssm.system()
    exact = DiagonalSystem(*(x.detach().to(torch.complex128) for x in (wide.a, wide.b, wide.c)),
                           wide.skip.detach().double()).chunk_operators()  # fmt: skip
    ops = wide.chunk_operators()
    for name in ("M", "K", "P", "decay"):
        got, want = getattr(ops, name), getattr(exact, name)
        assert got.dtype in (torch.float32, torch.complex64)
        assert (got - want).abs().max() <= 4e-7 * want.abs().max(), name


def test_long_filter_keeps_its_phase():
    # a power taken in float32 is off by 1e-3 here
    a = torch.tensor([[0.9999 * np.exp(3j)]], dtype=torch.complex64)
    one = torch.ones(1, 1, dtype=torch.complex64)
    taps = DiagonalSystem(a, one, one, torch.zeros(1)).filter(4096)
    exact = 2 * (complex(a[0, 0]) ** np.arange(4096)).real
    assert np.abs(taps[0].numpy() - exact).max() < 1e-5


def test_a_mode_of_zero_has_powers_and_gradients_without_nan():
    a = torch.zeros(1, 1, dtype=torch.complex128, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.complex128)
    taps = DiagonalSystem(a, one, one, torch.zeros(1, dtype=torch.float64)).filter(3)
    assert taps.tolist() == [[2.0, 0.0, 0.0]]
    (grad,) = torch.autograd.grad(taps.sum(), a)
    assert torch.isfinite(torch.view_as_real(grad)).all()


@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
def test_start(init):
    ssm = DiagonalSSM(200, init=init)
    assert ssm.log_dt.min() >= math.log(1e-3)
    assert ssm.log_dt.max() <= math.log(1e-1)
    assert torch.allclose(ssm.log_neg_A_real, torch.tensor(math.log(0.5)))
    assert torch.equal(ssm.B[..., 0], torch.ones(200, 32))
    assert abs(ssm.C.pow(2).sum(-1).mean() - 1) < 0.05
    assert (ssm.system().a.abs() < 1).all()


def test_golden_filters(data_dir):
    golden = np.load(data_dir / "h3_layer.npz")
    for prefix in ("hd1", "hd4"):
        for rule in ("bilinear", "zoh"):
            ssm = load_golden(golden, prefix, rule)
            expected = golden[f"{prefix}.{rule}.diag_kernel"]
            taps = ssm.system().filter(expected.shape[1]).detach().numpy()
            assert np.abs(taps - expected).max() < 1e-12


def load_golden(golden, prefix, rule):
    heads, half = golden[f"{prefix}.diag_A_imag"].shape
    ssm = DiagonalSSM(heads, 2 * half, discretization=rule).double()
    names = {"inv_A_real": "log_neg_A_real", "A_imag": "A_imag", "B": "B", "C": "C"}
    names |= {"log_dt": "log_dt", "D": "D"}
    with torch.no_grad():
        for theirs, ours in names.items():
            getattr(ssm, ours).copy_(torch.from_numpy(golden[f"{prefix}.diag_{theirs}"]))
    return ssm


def test_parameters_stay_float32_and_lossless():
    ssm = DiagonalSSM(4)
    before = {name: p.detach().clone() for name, p in ssm.named_parameters()}
    for narrow in (ssm.to(torch.bfloat16), ssm.half(), ssm.to("cpu", torch.float16)):
        for name, p in narrow.named_parameters():
            assert p.dtype == torch.float32
            assert torch.equal(p, before[name])
    assert ssm.double().system().a.dtype == torch.complex128


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="discretization='euler'"):
        DiagonalSSM(4, discretization="euler")
    with pytest.raises(ValueError, match="dt_min"):
        DiagonalSSM(4, dt_min=1.0, dt_max=0.1)
    with pytest.raises(ValueError, match="num_systems=0 must be positive"):
        DiagonalSSM(0)
    one = torch.ones(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="share one shape"):
        DiagonalSystem(one, one, one[:1], torch.zeros(2))
    with pytest.raises(ValueError, match="chunk_length=0"):
        system().chunk_operators(chunk_length=0)
