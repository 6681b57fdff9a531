from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from h3lm.layers.both_ways import convolve_both_ways
from h3lm.layers.s4 import S4

GOLDEN = np.load(Path(__file__).parent.parent / "data" / "mixers" / "s4.npz")


def golden(name):
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def golden_layer(**options):
    layer = S4(3, 8, **options).double()
    ssm, lam = layer.dplr_ssm, golden("lam")
    with torch.no_grad():
        ssm.log_dt.copy_(golden("log_dt"))
        ssm.log_neg_A_real.copy_(torch.log(-lam.real))
        ssm.A_imag.copy_(lam.imag)
        for name in ("P", "B", "C"):
            getattr(ssm, name).copy_(torch.view_as_real(golden(name)))
        ssm.D.copy_(golden("D"))
    return layer


@pytest.mark.parametrize("output", ["linear", "glu"])
def test_layer_is_the_golden_system_between_its_projections(output):
    layer, u = golden_layer(output=output), golden("u")
    y, state = layer(u)
    h = layer.output_proj(F.gelu(golden("y_parallel")))
    expected = h if output == "linear" else h[..., :3] * torch.sigmoid(h[..., 3:])
    assert (y - expected).abs().max() < 1e-12
    assert (state.modes - golden("state_final")).abs().max() < 1e-12


def test_bidirectional_is_a_double_loop():
    layer, u = golden_layer(bidirectional=True), golden("u").mT
    L = u.shape[-1]
    system = layer.system()
    K = system.filter(L)
    A, b, _ = system.dense()
    C = torch.view_as_complex(layer.backward_readout.C)
    row = torch.cat([2 * C.real, -2 * C.imag], -1)
    Kb = [
        (row * (torch.linalg.matrix_power(A, s) @ b[..., None])[..., 0]).sum(-1) for s in range(L)
    ]
    expected = system.skip[:, None] * u
    for t in range(L):
        for s in range(L):
            lag = K[:, t - s] if s <= t else Kb[s - t - 1]
            expected = expected.index_add(-1, torch.tensor([t]), (lag * u[..., s])[..., None])
    assert (
        convolve_both_ways(u, layer.system(), layer.backward_readout) - expected
    ).abs().max() < 1e-12


def test_empty_row_keeps_the_state():
    layer = golden_layer()
    _, state = layer(golden("u"))
    y, same = layer.mix(golden("u").mT[..., :0], state, None, None)
    assert y.shape == (2, 3, 0)
    assert torch.equal(same.modes, state.modes)


def test_unknown_output_is_refused():
    # the suite's type checker refuses the word before the layer does
    with pytest.raises((ValueError, TypeError), match="gated"):
        S4(4, 8, output="gated")
