import numpy as np
import pytest
import torch

from h3lm.ssm import diagonal_eigenvalues, legs_matrices, legs_normal_plus_low_rank


def test_golden(data_dir):
    golden = np.load(data_dir / "mixers" / "hippo.npz")
    A, B = legs_matrices(8)
    parts = legs_normal_plus_low_rank(8)
    for actual, name in (
        (A, "A"),
        (B, "B"),
        (parts.eigenvalues, "lam_half"),
        (parts.P, "P_half"),
        (parts.B, "B_half"),
        (diagonal_eigenvalues("lin", 8), "s4d_lin"),
        (diagonal_eigenvalues("inv", 8), "s4d_inv"),
        (diagonal_eigenvalues("legs", 8), "s4d_legs"),
    ):
        assert np.abs(actual.numpy() - golden[name]).max() < 1e-12, name


@pytest.mark.parametrize("d_state", [2, 4, 8, 64])
def test_normal_plus_low_rank_reconstructs_the_matrix(d_state):
    A, _ = legs_matrices(d_state)
    parts = legs_normal_plus_low_rank(d_state)
    normal = 2 * ((parts.V * parts.eigenvalues) @ parts.V.mH).real
    P = torch.sqrt(torch.arange(d_state, dtype=torch.float64) + 0.5)
    assert (normal - torch.outer(P, P) - A).abs().max() < 1e-12 * d_state**2


def test_known_values():
    legs = diagonal_eigenvalues("legs", 64).imag
    assert torch.allclose(legs[:3], torch.tensor([0.26386, 0.90586, 1.70297]).double(), atol=1e-5)
    assert abs(legs[-1] - 1303.27) < 0.01
    assert abs(diagonal_eigenvalues("inv", 64).imag[0] - 1283.425) < 1e-3  # N = 64, not 32
    assert torch.allclose(diagonal_eigenvalues("lin", 64).imag[-1], torch.tensor(97.389).double())


@pytest.mark.parametrize("d_state", [0, 1, 7])
def test_odd_or_empty_state_is_refused(d_state):
    with pytest.raises(ValueError, match="even and positive"):
        diagonal_eigenvalues("lin", d_state)


def test_unknown_init_is_refused():
    with pytest.raises(ValueError, match="'random' is not one of lin, inv, legs"):
        diagonal_eigenvalues("random", 4)


def test_made_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert diagonal_eigenvalues("legs", 8).device.type == "cpu"
