from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from h3lm.layers.gss import GSS
from h3lm.ssm.shared_modes import SharedModesSSM

GOLDEN = np.load(Path(__file__).parent.parent / "data" / "mixers" / "gss.npz")


def golden(name):
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def golden_layer():
    layer = GSS(6, d_ssm=4, d_gate=8, num_modes=5).double()
    with torch.no_grad():
        for name, linear in {
            "gate": layer.gate_proj,
            "in": layer.input_proj,
            "up": layer.up_proj,
            "o": layer.output_proj,
        }.items():
            linear.weight.copy_(golden(f"W_{name}"))
            linear.bias.copy_(golden(f"b_{name}"))
        layer.norm.weight.copy_(golden("ln2_g"))
        layer.norm.bias.copy_(golden("ln2_b"))
        ssm = layer.diagonal_ssm
        ssm.log_neg_A_real.copy_(golden("log_neg_lam_real"))
        ssm.log_A_imag.copy_(golden("log_lam_imag"))
        ssm.C.copy_(torch.stack([golden("C_re"), golden("C_im")], -1))
        ssm.D.copy_(golden("D"))
    return layer


def test_layer_is_the_golden_one_at_once_and_step_by_step():
    layer = golden_layer()
    x = golden("x")
    u = F.layer_norm(x, (6,), golden("ln1_g"), golden("ln1_b"), 1e-5)
    y, state = layer(u)
    assert (y - golden("out_parallel")).abs().max() < 1e-12
    assert (x + y - golden("out_with_residual")).abs().max() < 1e-12
    assert (state.modes - golden("state_final")).abs().max() < 1e-12
    state, steps = None, []
    for t in range(u.shape[1]):
        y, state = layer(u[:, t : t + 1], state)
        steps.append(y)
    assert (torch.cat(steps, 1) - golden("out_recurrent")).abs().max() < 1e-12


def test_filter_is_the_golden_one_without_a_factor_of_two():
    layer = golden_layer()
    system = layer.system().system
    assert (system.filter(18) - golden("K")).abs().max() < 1e-12
    y, _ = layer.mix(F.layer_norm(golden("u"), (4,), golden("ln2_g"), golden("ln2_b")).mT,
                     None, None, None)  # fmt: skip
    assert (y.mT - golden("y_dss")).abs().max() < 1e-12


def test_modes_are_shared_and_trained_gently():
    ssm = SharedModesSSM(4, 5)
    assert ssm.log_neg_A_real.shape == (5,)
    assert set(ssm.training_hints) == {"log_neg_A_real", "log_A_imag"}
    assert ssm.system().a.shape == (4, 5)
    with pytest.raises(ValueError, match="num_modes=0"):
        SharedModesSSM(4, 0)


def test_fast_and_slow_modes_stay_finite():
    ssm = SharedModesSSM(1, 2)
    with torch.no_grad():
        ssm.log_neg_A_real.copy_(torch.tensor([6.0, -20.0]))  # exp(-403) is 0 in float32
    K = ssm.system().filter(300)
    K.sum().backward()
    assert torch.isfinite(K).all()
    assert all(torch.isfinite(p.grad).all() for p in (ssm.log_neg_A_real, ssm.log_A_imag, ssm.C))


def test_sizes_are_the_published_ratios_and_too_small_a_width_is_refused():
    layer = GSS(32)
    assert (layer.d_ssm, layer.d_gate, layer.diagonal_ssm.num_modes) == (8, 128, 64)
    weights = sum(p.weight.numel() for p in (layer.gate_proj, layer.input_proj, layer.up_proj,
                                             layer.output_proj))  # fmt: skip
    assert weights == 9.25 * 32**2
    with pytest.raises(ValueError, match="d_model=3"):
        GSS(3)
