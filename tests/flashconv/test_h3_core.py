"""The H3 core: plain PyTorch against the definition, states, packing, direction, mistakes."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h3lm.flashconv import (
    H3State,
    chunked,
    h3_core,
    h3_end_state,
    h3_step,
    stepwise,
    zero_state,
)
from h3lm.flashconv.fft_chunks import fft_operators
from h3lm.ssm import DPLRSSM, DiagonalSSM, DiagonalSystem, ShiftSSM


def make(head_dim=1, D=4, n_taps=20, dtype=torch.float64):
    diagonal = DiagonalSSM(D // head_dim, 8, dt_min=0.01).to(dtype)
    shift = ShiftSSM(D, n_taps).to(dtype)
    with torch.no_grad():
        shift.B.normal_()
    return diagonal, shift


def inputs(B, D, L, dtype=torch.float64):
    return [torch.randn(B, D, L, dtype=torch.float64).to(dtype) for _ in range(3)]


def random_state(rows, k, taps, system, head_dim):
    zero = zero_state(rows, k, taps, system, head_dim)
    diagonal = torch.randn(*zero.diagonal.shape, 2, dtype=torch.float64)
    return H3State(
        torch.randn(zero.shift.shape, dtype=torch.float64).to(zero.shift.dtype).requires_grad_(),
        torch.view_as_complex(diagonal).to(zero.diagonal.dtype).requires_grad_(),
    )


def run_with_gradients(backend, q, k, v, diagonal, shift, state, chunk_length=64, **options):
    """Output, final state and every gradient, for fixed random weights of the loss."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    taps, system = shift.taps(), diagonal.system()
    made = system if backend == "reference" else system.chunk_operators(taps, chunk_length)
    o, end = h3_core(
        *leaves, taps, made,
        initial_state=state, return_final_state=True, backend=backend, **options,
    )  # fmt: skip
    results = [o, end.shift, torch.view_as_real(end.diagonal)]
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, generator=g, dtype=torch.float64) for r in results]
    loss = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    wanted = [*leaves, *diagonal.parameters(), *shift.parameters(), *(state or ())]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True)]
    return [*results, *(torch.view_as_real(x) if x.is_complex() else x for x in grads)]


def assert_close(actual, expected, tolerance=1e-10):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).norm() <= tolerance * e.norm() + tolerance


@settings(max_examples=25, deadline=None)
@given(
    head_dim=st.sampled_from([1, 2, 4]),
    L=st.integers(1, 150),
    n_taps=st.sampled_from([1, 2, 20, 40]),
    T=st.sampled_from([1, 4, 7, 16, 64]),
    stateful=st.booleans(),
    reverse=st.booleans(),
)
def test_torch_equals_reference_with_all_gradients(head_dim, L, n_taps, T, stateful, reverse):
    diagonal, shift = make(head_dim, n_taps=n_taps)
    q, k, v = inputs(2, 4, L)
    state = None
    if stateful:
        state = random_state(2, k, shift.taps(), diagonal.system(), head_dim)
    options = {"head_dim": head_dim, "reverse": reverse}
    expected = run_with_gradients("reference", q, k, v, diagonal, shift, state, **options)
    actual = run_with_gradients("torch", q, k, v, diagonal, shift, state, T, **options)
    assert_close(actual, expected)


@settings(max_examples=15, deadline=None)
@given(
    head_dim=st.sampled_from([1, 2]),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    T=st.sampled_from([8, 64]),
    stateful=st.booleans(),
    reverse=st.booleans(),
)
def test_packed_rows_equal_separate_sequences(head_dim, lengths, T, stateful, reverse):
    diagonal, shift = make(head_dim)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = inputs(1, 4, int(bounds[-1]))
    state = None
    if stateful:
        state = random_state(len(lengths), k, shift.taps(), diagonal.system(), head_dim)
    options = {"head_dim": head_dim, "reverse": reverse, "cu_seqlens": bounds}
    expected = run_with_gradients("reference", q, k, v, diagonal, shift, state, **options)
    actual = run_with_gradients("torch", q, k, v, diagonal, shift, state, T, **options)
    assert_close(actual, expected)
    with torch.no_grad():
        for s, (a, b) in enumerate(pairwise(bounds)):
            alone, _ = h3_core(
                q[..., a:b], k[..., a:b], v[..., a:b], shift.taps(), diagonal.system(),
                head_dim=head_dim, reverse=reverse,
                initial_state=state and H3State(*(x[s : s + 1] for x in state)),
            )  # fmt: skip
            assert_close([actual[0][..., a:b]], [alone])


@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("lengths", [(70,), (40, 1, 29)])
def test_steps_that_round_are_the_definition_where_they_do_not(lengths, head_dim, monkeypatch):
    diagonal, shift = make(head_dim)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = inputs(1, 4, 70)
    state = random_state(len(lengths), k, shift.taps(), diagonal.system(), head_dim)
    options = {"head_dim": head_dim, "cu_seqlens": bounds}
    expected = run_with_gradients("reference", q, k, v, diagonal, shift, state, **options)

    def steps(q, k, v, operators, **options):
        return stepwise.h3_core(q, k, v, operators.taps, operators.system, **options)

    monkeypatch.setattr(chunked, "h3_core", steps)
    actual = run_with_gradients("torch", q, k, v, diagonal, shift, state, **options)
    assert_close(actual, expected)


@pytest.mark.parametrize("head_dim", [1, 4])
def test_many_chunks_go_through_every_level_of_the_scan(head_dim):
    diagonal, shift = make(head_dim, D=4)
    q, k, v = inputs(1, 4, 1100)  # 275 chunks of 4: three levels of groups of 16
    expected = run_with_gradients("reference", q, k, v, diagonal, shift, None, head_dim=head_dim)
    actual = run_with_gradients("torch", q, k, v, diagonal, shift, None, 4, head_dim=head_dim)
    assert_close(actual, expected)


@pytest.mark.parametrize("prefix", ["hd1", "hd4"])
@pytest.mark.parametrize("rule", ["bilinear", "zoh"])
def test_golden_layer(data_dir, prefix, rule):
    golden = np.load(data_dir / "h3_layer.npz")
    head_dim = int(prefix[-1])
    q, k, v = (torch.from_numpy(golden[f"{prefix}.{x}"]) for x in "qkv")
    D, N = golden[f"{prefix}.shift_B"].shape
    shift, diagonal = (
        ShiftSSM(D, N).double(),
        DiagonalSSM(D // head_dim, N, discretization=rule).double(),
    )
    with torch.no_grad():
        for name in "BCD":
            getattr(shift, name).copy_(torch.from_numpy(golden[f"{prefix}.shift_{name}"]))
            getattr(diagonal, name).copy_(torch.from_numpy(golden[f"{prefix}.diag_{name}"]))
        diagonal.log_neg_A_real.copy_(torch.from_numpy(golden[f"{prefix}.diag_inv_A_real"]))
        diagonal.A_imag.copy_(torch.from_numpy(golden[f"{prefix}.diag_A_imag"]))
        diagonal.log_dt.copy_(torch.from_numpy(golden[f"{prefix}.diag_log_dt"]))
        o, end = h3_core(
            q, k, v, shift.taps(), diagonal.system(), head_dim=head_dim, return_final_state=True
        )
    heads = D // head_dim
    plain = torch.from_numpy(golden[f"{prefix}.{rule}.o"])  # channels (member, head)
    ours = plain.unflatten(1, (head_dim, heads)).transpose(1, 2).flatten(1, 2)
    assert (o - ours).abs().max() < 1e-9
    expected = torch.from_numpy(golden[f"{prefix}.{rule}.final_diag_state"])
    assert (end.diagonal.reshape(expected.shape) - expected).abs().max() < 1e-9


@pytest.mark.parametrize(("name", "head_dim"), [("h3", 2), ("h3_headdim1", 1)])
def test_golden_mixer(data_dir, name, head_dim):
    g = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(
        data_dir / "mixers" / f"{name}.npz").items()}  # fmt: skip
    u = g["u"]
    q, k, v = ((u @ g[f"W_{x}"].T + g[f"b_{x}"]).transpose(1, 2) for x in "qkv")
    taps = g["shift_taps"].clone()
    taps[:, 0] += g["shift_D"]
    half = g["A_imag"].shape[1]
    for rule in ("bilinear", "zoh"):
        diagonal = DiagonalSSM(g["log_dt"].shape[0], 2 * half, discretization=rule).double()
        with torch.no_grad():
            diagonal.log_dt.copy_(g["log_dt"])
            diagonal.log_neg_A_real.copy_(g["log_neg_A_real"])
            diagonal.A_imag.copy_(g["A_imag"])
            diagonal.B.copy_(torch.view_as_real(g["B"]))
            diagonal.C.copy_(torch.view_as_real(g["C"]))
            diagonal.D.copy_(g["diag_D"])
            o, end = h3_core(
                q, k, v, taps, diagonal.system(), head_dim=head_dim, return_final_state=True
            )
        out = o.transpose(1, 2) @ g["W_o"].T + g["b_o"]
        assert (out - g[f"out_{rule}_parallel"]).abs().max() < 1e-9
        newest_first = end.shift.flip(-1)
        assert (newest_first - g["state_shift"][..., : newest_first.shape[-1]]).abs().max() < 1e-9
        state = g[f"state_diag_{rule}"]
        assert (end.diagonal.reshape(state.shape) - state).abs().max() < 1e-9


@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_end_state_is_the_final_state(backend, head_dim):
    diagonal, shift = make(head_dim)
    q, k, v = inputs(2, 4, 77)
    with torch.no_grad():
        taps, system = shift.taps(), diagonal.system()
        start = random_state(2, k, taps, system, head_dim)
        _, end = h3_core(q, k, v, taps, system, head_dim=head_dim, initial_state=start,
                         return_final_state=True)  # fmt: skip
        alone = h3_end_state(
            k, v, taps, system, head_dim=head_dim, initial_state=start, backend=backend
        )
    assert_close([alone.shift, alone.diagonal], [end.shift, end.diagonal])


@pytest.mark.parametrize("head_dim", [1, 2])
def test_step_continues_the_core(head_dim):
    diagonal, shift = make(head_dim)
    q, k, v = inputs(2, 4, 40)
    with torch.no_grad():
        taps, system = shift.taps(), diagonal.system()
        expected, end = h3_core(q, k, v, taps, system, head_dim=head_dim, return_final_state=True)
        _, state = h3_core(
            q[..., :30], k[..., :30], v[..., :30], taps, system,
            head_dim=head_dim, return_final_state=True,
        )  # fmt: skip
        for t in range(30, 40):
            o, state = h3_step(
                q[..., t], k[..., t], v[..., t], taps, system, state, head_dim=head_dim
            )
            assert_close([o], [expected[..., t]])
    assert_close([state.shift, state.diagonal], [end.shift, end.diagonal])


def test_any_strides_of_batch_and_channels():
    diagonal, shift = make()
    q, k, v = inputs(2, 4, 33)
    with torch.no_grad():
        expected, _ = h3_core(q, k, v, shift.taps(), diagonal.system())
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
        assert strided[0].stride() != q.stride()
        actual, _ = h3_core(*strided, shift.taps(), diagonal.system())
        channel_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        also, _ = h3_core(*channel_last, shift.taps(), diagonal.system())
    assert_close([actual, also], [expected, expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_rounding_the_exact_result(dtype):
    # the torch path computes in float32: in a narrow dtype only the result is rounded
    diagonal, shift = make(dtype=torch.float32, D=8, n_taps=64)
    q, k, v = inputs(2, 8, 1000, dtype)
    with torch.no_grad():
        o, _ = h3_core(q, k, v, shift.taps(), diagonal.system())
        s = diagonal.system()
        wide = DiagonalSystem(*(x.to(torch.complex128) for x in (s.a, s.b, s.c)), s.skip.double())
        exact, _ = h3_core(*(x.double() for x in (q, k, v)), shift.taps().double(), wide)
    assert o.dtype == dtype
    rounding = (exact.to(dtype).double() - exact).norm()
    assert (o.double() - exact).norm() <= 2 * rounding + 1e-6 * exact.norm()


def test_autocast_leaves_the_core_alone():
    diagonal, shift = make(dtype=torch.float32)
    q, k, v = inputs(1, 4, 100, torch.float32)
    with torch.no_grad():
        expected, _ = h3_core(q, k, v, shift.taps(), diagonal.system())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual, _ = h3_core(q, k, v, shift.taps(), diagonal.system())
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_empty_sequence_returns_the_state(backend):
    diagonal, shift = make()
    q, k, v = inputs(2, 4, 0)
    state = random_state(2, k, shift.taps(), diagonal.system(), 1)
    o, end = h3_core(
        q, k, v, shift.taps(), diagonal.system(),
        initial_state=state, return_final_state=True, backend=backend,
    )  # fmt: skip
    assert o.shape == (2, 4, 0)
    assert end is state


def test_gradcheck_in_double_precision():
    diagonal, shift = make(D=2, n_taps=3)
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 9))
    a, b, c, skip = (x.detach().requires_grad_() for x in vars(diagonal.system()).values())
    taps = shift.taps().detach().requires_grad_()

    def run(q, k, v, taps, a, b, c, skip):
        made = DiagonalSystem(a, b, c, skip).chunk_operators(taps, 4)
        return h3_core(q, k, v, taps, made)[0]

    assert torch.autograd.gradcheck(run, (q, k, v, taps, a, b, c, skip))


def call(**changes):
    diagonal, shift = make(dtype=torch.float32)
    q, k, v = inputs(2, 4, 10, torch.float32)
    arguments = {"q": q, "k": k, "v": v, "taps": shift.taps(), "system": diagonal.system()}
    arguments |= changes
    return h3_core(**arguments)


MISTAKES = {
    "two-dimensional": ({"q": torch.zeros(4, 10)}, r"q must be \(B, D, L\)"),
    "integers": ({"q": torch.zeros(2, 4, 10).long()}, "torch.int64; use float32"),
    "lengths": ({"k": torch.zeros(2, 4, 9)}, "k is .2, 4, 9. .* q is .2, 4, 10."),
    "dtypes": ({"v": torch.zeros(2, 4, 10).half()}, "they must agree"),
    "taps": ({"taps": torch.zeros(3, 20)}, "taps is .3, 20., k has 4 channels"),
    "heads": ({"head_dim": 3}, "head_dim=3 times 4 systems must be the 4 channels"),
    "state": (
        {"initial_state": H3State(torch.zeros(2, 4, 5), torch.zeros(2, 4, 4).cfloat())},
        r"initial_state has shift \(2, 4, 5\) .* needs \(2, 4, 19\)",
    ),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 10])}, "one row, the batch has 2"),
    "float boundaries": (
        {"q": torch.zeros(1, 4, 10), "k": torch.zeros(1, 4, 10), "v": torch.zeros(1, 4, 10),
         "cu_seqlens": torch.tensor([0.0, 10.0])},
        "at least two integers",
    ),
    "falling boundaries": (
        {"q": torch.zeros(1, 4, 10), "k": torch.zeros(1, 4, 10), "v": torch.zeros(1, 4, 10),
         "cu_seqlens": torch.tensor([0, 5, 5, 10])},
        r"must increase from 0 to the length 10, got \[0, 5, 5, 10\]",
    ),
    "short boundaries": (
        {"q": torch.zeros(1, 4, 10), "k": torch.zeros(1, 4, 10), "v": torch.zeros(1, 4, 10),
         "cu_seqlens": torch.tensor([0, 9])},
        "to the length 10",
    ),
    "backend": ({"backend": "cuda"}, "backend='cuda' is not one of"),
    "no tensor": ({"q": [1.0]}, "q must be a tensor, not list"),
    "the short filter's module": (
        {"taps": ShiftSSM(4, 20)}, r"taps is the module ShiftSSM; .* its taps\(\)"
    ),
    "half taps": ({"taps": torch.zeros(4, 20).half()}, "taps is torch.float16 on cpu; .* float32"),
    "the diagonal SSM's module": (
        {"system": DiagonalSSM(4, 8)}, r"system is the module DiagonalSSM; .* its system\(\)"
    ),
    "no system": ({"system": None}, "system must be a DiagonalSystem or the like, not NoneType"),
    "a system that is not diagonal": (
        {"system": DPLRSSM(4, 8).system()}, "has diagonal systems, not a DPLRSystem"
    ),
    "a system elsewhere": (
        {"system": DiagonalSSM(4, 8, device="meta").system()}, "system is on meta, .* are on cpu"
    ),
    "a pair as state": (
        {"initial_state": (torch.zeros(2, 4, 19), torch.zeros(2, 4, 4).cfloat())},
        "initial_state must be an H3State, not tuple",
    ),
    "a real state": (
        {"initial_state": H3State(torch.zeros(2, 4, 19), torch.zeros(2, 4, 4))},
        "initial_state.diagonal is torch.float32 .* need complex",
    ),
    "boundaries elsewhere": (
        {"q": torch.zeros(1, 4, 10), "k": torch.zeros(1, 4, 10), "v": torch.zeros(1, 4, 10),
         "cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")},
        "cu_seqlens is on meta, the inputs are on cpu",
    ),
    "a shift state elsewhere": (
        {"initial_state": H3State(torch.zeros(2, 4, 19, device="meta"),
                                  torch.zeros(2, 4, 4).cfloat())},
        "initial_state.shift is on meta",
    ),
    "operators of Algorithm 2": (
        {"system": fft_operators(DiagonalSSM(4, 8).system(), 16)},
        "has diagonal systems, not a FFTOperators",
    ),
    "a list of boundaries": ({"cu_seqlens": [0, 10]}, "cu_seqlens must be a tensor, not list"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_clear_line(name):
    changes, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as caught:
        call(**changes)
    assert "\n" not in str(caught.value)


def test_operators_of_other_taps_are_refused():
    diagonal, _ = make(dtype=torch.float32)
    with pytest.raises(ValueError, match="the operators were made with no taps"):
        call(system=diagonal.system().chunk_operators())
