import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h3lm.flashconv import fft_conv, ssm_conv
from h3lm.ssm import DiagonalSSM


@settings(max_examples=20, deadline=None)
@given(
    L=st.integers(1, 200),
    gated=st.booleans(),
    stateful=st.booleans(),
    reverse=st.booleans(),
    packed=st.booleans(),
)
def test_torch_equals_reference_with_gradients(L, gated, stateful, reverse, packed):
    diagonal = DiagonalSSM(3, 8, dt_min=0.01).double()
    B = 1 if packed else 2
    bounds = torch.tensor(sorted({0, L // 3, L // 2, L})) if packed else None
    sequences = B if bounds is None else len(bounds) - 1
    tensors = [torch.randn(B, 3, L, dtype=torch.float64).requires_grad_() for _ in range(3)]
    u, pre, post = tensors
    gates = {"pre_gate": pre, "post_gate": post} if gated else {}
    state = None
    if stateful:
        state = torch.randn(sequences, 3, 4, dtype=torch.complex128).requires_grad_()
    wanted = [u, *gates.values(), *diagonal.parameters(), *([] if state is None else [state])]
    results = []
    for backend in ("reference", "torch"):
        y, end = ssm_conv(
            u, diagonal.system(), **gates, initial_state=state, return_final_state=True,
            cu_seqlens=bounds, reverse=reverse, backend=backend,
        )  # fmt: skip
        g = torch.Generator().manual_seed(1)
        weight = torch.randn(y.shape, generator=g, dtype=torch.float64)
        loss = (y * weight).sum() + end.abs().square().sum()
        results.append([y, end, *torch.autograd.grad(loss, wanted)])
    for actual, expected in zip(*reversed(results), strict=True):
        assert (actual - expected).norm() <= 1e-10 * expected.norm() + 1e-12


@pytest.mark.parametrize("method", ["scan", "fft_chunks"])
def test_an_empty_batch(method):
    u = torch.zeros(0, 3, 100)
    y, end = ssm_conv(u, DiagonalSSM(3, 8).system(), method=method, return_final_state=True)
    assert y.shape == (0, 3, 100)
    assert end.shape == (0, 3, 4)


def test_equals_convolution_with_its_filter():
    diagonal = DiagonalSSM(3, 8).double()
    u = torch.randn(2, 3, 301, dtype=torch.float64)
    system = diagonal.system()
    y, state = ssm_conv(u, system)
    expected = fft_conv(u, system.filter(301), skip=system.skip)
    assert state is None
    assert (y - expected).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(1, 4, 9)}, "system has 3 systems, u has 4 channels"),
        ({"method": "fft"}, "method='fft' is not one of"),
        ({"system": DiagonalSSM(3, 8)}, r"system is the module DiagonalSSM; .* its system\(\)"),
        ({"initial_state": torch.zeros(1, 3, 4)}, "initial_state is torch.float32 .* complex"),
        ({"pre_gate": torch.zeros(1, 3, 8)}, "pre_gate is"),
        ({"initial_state": torch.zeros(2, 3, 4).cfloat()}, r"this call needs \(1, 3, 4\)"),
    ],
)
def test_mistakes_are_one_clear_line(changes, message):
    arguments = {"u": torch.zeros(1, 3, 9), "system": DiagonalSSM(3, 8).system()} | changes
    with pytest.raises(ValueError, match=message):
        ssm_conv(**arguments)
