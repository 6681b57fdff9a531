import math

import numpy as np
import pytest
import torch

from h3lm.ssm import ShiftSSM


def golden_shift(golden, prefix):
    d_model, n = golden[f"{prefix}.shift_B"].shape
    ssm = ShiftSSM(d_model, n).double()
    with torch.no_grad():
        for name in "BCD":
            getattr(ssm, name).copy_(torch.from_numpy(golden[f"{prefix}.shift_{name}"]))
    return ssm


@pytest.mark.parametrize("prefix", ["hd1", "hd4"])
def test_golden_taps_and_states(data_dir, prefix):
    golden = np.load(data_dir / "h3_layer.npz")
    ssm = golden_shift(golden, prefix)
    taps = ssm.taps().detach().clone()
    taps[:, 0] -= ssm.D.detach()
    assert np.abs(taps.numpy() - golden[f"{prefix}.shift_kernel"]).max() < 1e-12
    k = torch.from_numpy(golden[f"{prefix}.k"])
    for start, name, length in (
        (None, "", k.shape[2]),
        ("init_shift_state", "_from_init", k.shape[2]),
        ("init_shift_state", "_short_from_init", 7),
    ):
        state = None if start is None else torch.from_numpy(golden[f"{prefix}.{start}"])
        outputs = []
        for t in range(length):
            y, state = ssm.step(k[..., t], state)
            outputs.append(y.detach())
        expected = golden[f"{prefix}.bilinear.final_shift_state{name}"]
        assert np.abs(state.detach().numpy() - expected).max() < 1e-12
        if start is None:
            shifted = torch.stack(outputs, -1).numpy()
            assert np.abs(shifted - golden[f"{prefix}.k_shifted"]).max() < 1e-12


def test_step_equals_the_taps():
    ssm = ShiftSSM(3, 5).double()
    with torch.no_grad():
        ssm.B.normal_()
    k = torch.randn(2, 3, 12, dtype=torch.float64)
    taps, state = ssm.taps(), None
    for t in range(12):
        y, state = ssm.step(k[..., t], state)
        expected = sum(taps[:, j] * k[..., t - j] for j in range(min(5, t + 1)))
        assert torch.allclose(y, expected, atol=1e-12)


def test_start():
    ssm = ShiftSSM(500, 64)
    assert torch.equal(ssm.B[:, 0], torch.ones(500))
    assert not ssm.B[:, 1:].any()
    assert ssm.C.abs().max() <= 1 / 8
    assert abs(ssm.C.std() - 1 / math.sqrt(3) / 8) < 1e-3
    taps = ssm.taps()
    assert torch.allclose(taps[:, 1:], ssm.C[:, 1:], atol=1e-6)
    assert torch.allclose(taps[:, 0], ssm.C[:, 0] + ssm.D, atol=1e-6)


def test_hints_name_real_parameters():
    for name in ShiftSSM.training_hints:
        assert isinstance(getattr(ShiftSSM(2, 4), name), torch.nn.Parameter)
