from pathlib import Path

import numpy as np
import pytest
import torch

from h3lm.flashconv import h3_core
from h3lm.layers.linear_attention import (
    FORMS,
    LinearAttention,
    accumulate,
    feature_map,
    linear_attention,
    time_varying_ssm,
)
from h3lm.ssm import DiagonalSystem

GOLDEN = np.load(Path(__file__).parent.parent / "data" / "mixers" / "linear_attention.npz")


def golden(name):
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def heads(name):
    return golden(name).transpose(1, 2)


def features():
    return feature_map(heads("q")), feature_map(heads("k")), heads("v")


def test_feature_map_is_the_golden_one_with_a_finite_gradient():
    assert (feature_map(golden("q")) - golden("phi_q")).abs().max() < 1e-14
    x = torch.tensor([-200.0, -1.0, 0.0, 1.0, 200.0], requires_grad=True)
    (grad,) = torch.autograd.grad(feature_map(x).sum(), x)
    assert torch.isfinite(grad).all()
    assert (feature_map(torch.zeros(1)) == 1).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", [None, "state"])
def test_every_form_is_the_golden_one(form, start):
    q, k, v = features()
    state = None
    if start:
        state = torch.cat([golden("S0"), golden("z0")[..., None]], -1)
    y, end = linear_attention(q, k, v, initial_state=state, form=form, chunk_length=8)
    suffix = "_from_state" if start else ""
    expected = golden("y_from_state" if start else "y_parallel")
    assert (y.transpose(1, 2) - expected).abs().max() < 1e-13
    if not start:
        assert (y.transpose(1, 2) - golden("y_recurrent")).abs().max() < 1e-13
    assert (end[..., :-1] - golden(f"S_final{suffix}")).abs().max() < 1e-12
    assert (end[..., -1] - golden(f"z_final{suffix}")).abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_numerator_is_the_golden_one(form):
    y, _ = accumulate(*features(), form=form, chunk_length=8)
    assert (y.transpose(1, 2) - golden("numerator")).abs().max() < 1e-12


@pytest.mark.parametrize("chunk_length", [1, 2, 7, 20, 21, 64])
def test_chunks_of_any_length_agree_with_sums(chunk_length):
    q, k, v = features()
    expected, end = linear_attention(q, k, v, form="sums")
    y, state = linear_attention(q, k, v, chunk_length=chunk_length)
    assert (y - expected).abs().max() < 1e-13
    assert (state - end).abs().max() < 1e-12


def test_time_varying_state_space_model_of_appendix_b():
    q, k, v = (x[0, 1] for x in features())  # one head of one row
    extended = torch.cat([v, torch.ones(len(v), 1, dtype=v.dtype)], -1)
    A, B, C = time_varying_ssm(q, k, extended.shape[-1])
    x, outputs = torch.zeros(A.shape[-1], dtype=v.dtype), []
    for t in range(len(v)):
        x = A[t] @ x + B[t] @ extended[t]
        outputs.append(C[t] @ x)
    o = torch.stack(outputs)
    expected, state = accumulate(q[None, None], k[None, None], extended[None, None])
    assert (o - expected[0, 0]).abs().max() < 1e-13
    assert (x - state.flatten()).abs().max() < 1e-13
    y = o[:, :-1] / (o[:, -1:] + 1e-6)
    assert (y - golden("y_parallel")[0, :, 1]).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head_dim", [1, 4])
def test_h3_head_of_an_identity_shift_and_an_integrator_is_the_numerator(dtype, head_dim):
    D, L = 8, 50
    # small integers: both sides are exact, so that they must be equal to the bit
    q, k, v = (torch.randint(-3, 4, (2, D, L)).to(dtype) for _ in range(3))
    H = D // head_dim
    ones = torch.ones(H, 1, dtype=torch.promote_types(dtype, torch.complex64))
    integrator = DiagonalSystem(a=ones, b=ones, c=ones / 2, skip=torch.zeros(H, dtype=dtype))
    taps = torch.zeros(D, 4, dtype=dtype)
    taps[:, 0] = 1
    for backend in ("torch", "reference"):
        o, _ = h3_core(q, k, v, taps, integrator, head_dim=head_dim, backend=backend)
        split = [x.unflatten(1, (H, head_dim)).mT for x in (q, k, v)]
        expected, _ = accumulate(*split)
        assert torch.equal(o, expected.mT.flatten(1, 2))


def test_empty_row_keeps_the_sums():
    q, k, v = features()
    _, end = linear_attention(q, k, v)
    for form in FORMS:
        y, same = linear_attention(
            q[:, :, :0], k[:, :, :0], v[:, :, :0], initial_state=end, form=form
        )
        assert y.shape == (2, 2, 0, 4)
        assert torch.equal(same, end)


def test_sums_stay_float32_in_a_half_layer():
    layer = LinearAttention(8, 2).to(torch.bfloat16)
    y, state = layer(torch.randn(1, 300, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_heads=3 must divide d_model=8"):
        LinearAttention(8, 3)
    # the suite's type checker refuses the word before the function does
    with pytest.raises((ValueError, TypeError), match="scan"):
        accumulate(*features(), form="scan")
    layer = LinearAttention(8)
    with pytest.raises(ValueError, match="not both"):
        layer(torch.zeros(1, 3, 8), mask=torch.ones(1, 3).bool(), cu_seqlens=torch.tensor([0, 3]))
