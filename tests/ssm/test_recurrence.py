"""Both SSMs stepped from a state, against the release's layer in float64."""

import numpy as np
import pytest
import torch

from h3lm.ssm import DiagonalSSM, ShiftSSM


@pytest.mark.parametrize("prefix", ["hd1", "hd4"])
@pytest.mark.parametrize("rule", ["bilinear", "zoh"])
@pytest.mark.parametrize(
    ("start", "suffix", "length"),
    [(False, "", 53), (True, "_from_init", 53), (True, "_short_from_init", 7)],
)
def test_steps_from_a_state_are_the_releases(data_dir, prefix, rule, start, suffix, length):
    stored = np.load(data_dir / "h3_layer.npz")
    g = {k.removeprefix(f"{prefix}."): torch.from_numpy(stored[k]) for k in stored.files}
    D, N = g["shift_B"].shape
    head_dim = int(prefix[-1])
    shift = ShiftSSM(D, N).double()
    diagonal = DiagonalSSM(D // head_dim, N, discretization=rule).double()
    with torch.no_grad():
        for name in "BCD":
            getattr(shift, name).copy_(g[f"shift_{name}"])
            getattr(diagonal, name).copy_(g[f"diag_{name}"])
        diagonal.log_neg_A_real.copy_(g["diag_inv_A_real"])
        diagonal.A_imag.copy_(g["diag_A_imag"])
        diagonal.log_dt.copy_(g["diag_log_dt"])
        system = diagonal.system()
        slots = g["init_shift_state"] if start else None
        x = g["init_diag_state"] if start else None
        outputs = []
        for t in range(length):
            kappa, slots = shift.step(g["k"][..., t], slots)
            heads = (2, D // head_dim)
            w = kappa.view(*heads, head_dim, 1) * g["v"][..., t].view(*heads, 1, head_dim)
            y, x = system.step(w, x)
            o = (g["q"][..., t].view(*heads, head_dim, 1) * y).sum(2)
            outputs.append(o.transpose(1, 2).flatten(1))  # the release's order: member, head
    o = torch.stack(outputs, -1)
    assert (o - g[f"{rule}.o{suffix}"]).abs().max() < 1e-9
    assert (slots - g[f"{rule}.final_shift_state{suffix}"]).abs().max() < 1e-9
    assert (x - g[f"{rule}.final_diag_state{suffix}"]).abs().max() < 1e-9
