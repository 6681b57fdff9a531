from pathlib import Path

import numpy as np
import pytest
import torch

from h3lm.layers.both_ways import convolve_both_ways
from h3lm.layers.recurrence import RecurrentState
from h3lm.layers.s4d import S4D
from h3lm.ssm.shared_modes import TiedDiagonalSSM

GOLDEN = np.load(Path(__file__).parent.parent / "data" / "mixers" / "s4d.npz")


def golden(name):
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def golden_layer(rule="zoh", **options):
    layer = S4D(3, 8, discretization=rule, **options).double()
    ssm = layer.diagonal_ssm
    with torch.no_grad():
        for name in ("log_dt", "log_neg_A_real", "A_imag", "D"):
            getattr(ssm, name).copy_(golden(name))
        ssm.B.copy_(torch.view_as_real(golden("B")))
        ssm.C.copy_(torch.view_as_real(golden("C")))
        if layer.backward_readout is not None:
            layer.backward_readout.C.copy_(torch.view_as_real(golden("C_back")))
        kind = "out" if layer.output == "linear" else "glu"
        layer.output_proj.weight.copy_(golden(f"W_{kind}"))
        layer.output_proj.bias.copy_(golden(f"b_{kind}"))
    return layer


@pytest.mark.parametrize("output", ["linear", "glu"])
def test_layer_is_the_golden_one_at_once_and_step_by_step(output):
    layer, u = golden_layer(output=output), golden("u")
    y, state = layer(u)
    assert (y - golden(f"y_layer_{output}")).abs().max() < 1e-12
    assert (state.modes - golden("state_final_zoh")).abs().max() < 1e-12
    state, steps = None, []
    for t in range(u.shape[1]):
        y, state = layer(u[:, t : t + 1], state)
        steps.append(y)
    assert (torch.cat(steps, 1) - golden(f"y_layer_{output}")).abs().max() < 1e-12


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_system_is_the_golden_one(rule):
    layer, u = golden_layer(rule), golden("u")
    operators = layer.system()
    K = operators.system.filter(u.shape[1])
    assert (K - golden(f"K_{rule}")).abs().max() < 1e-12
    for start, suffix in ((None, ""), (RecurrentState(golden("x0")), "_from_x0")):
        y, end = layer.mix(u.mT, start, None, None)
        expected = f"y_ssm_{rule}_parallel" if start is None else f"y_ssm_{rule}_from_x0"
        assert (y.mT - golden(expected)).abs().max() < 1e-12
        assert (end.modes - golden(f"state_final_{rule}{suffix}")).abs().max() < 1e-12


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_bidirectional_system_is_the_golden_one(rule):
    layer = golden_layer(rule, bidirectional=True)
    y = convolve_both_ways(golden("u").mT, layer.system(), layer.backward_readout)
    assert (y.mT - golden(f"y_bidir_{rule}")).abs().max() < 1e-12


def test_tied_system_shares_its_modes_and_starts_at_unit_size():
    ssm = TiedDiagonalSSM(256, 64)
    system = ssm.system()
    assert {name: p.shape for name, p in ssm.named_parameters()}["A_imag"] == (32,)
    assert system.a.shape == (256, 32)
    # sum_j 2 |c_j / lambda_j|^2 is 1 on average: E|C|^2 = 1, and B is normalised so
    lam = torch.complex(-ssm.log_neg_A_real.exp(), ssm.A_imag)
    size = 2 * (torch.view_as_complex(ssm.C) / lam).abs().square().sum(1)
    # the smallest frequency dominates: the mean of 256 exponentials, 4 standard deviations
    assert size.mean().item() == pytest.approx(1, abs=0.25)
    assert set(ssm.training_hints) == {"log_dt", "log_neg_A_real", "A_imag"}


def test_unknown_output_is_refused():
    # the suite's type checker refuses such words before the layer does
    with pytest.raises((ValueError, TypeError), match="gated"):
        S4D(4, 8, output="gated")
    with pytest.raises(ValueError, match="even"):
        S4D(4, 7)
    with pytest.raises((ValueError, TypeError), match="euler"):
        S4D(4, 8, tied=True, discretization="euler")
    with pytest.raises(ValueError, match="dt_min"):
        S4D(4, 8, tied=True, dt_min=0.0)
    mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="not both"):
        S4D(4, 8)(torch.zeros(1, 3, 4), mask=mask, cu_seqlens=torch.tensor([0, 3]))
