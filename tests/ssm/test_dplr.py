from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from h3lm.flashconv import ssm_conv
from h3lm.ssm import dplr
from h3lm.ssm.dplr import DPLRSSM, DPLRSystem

GOLDEN = np.load(Path(__file__).parent.parent / "data" / "mixers" / "s4.npz")
LENGTHS = [1, 2, 3, 7, 16, 31, 64, 65, 130, 257]


def golden(name):
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def golden_system():
    return DPLRSystem(
        eigenvalues=golden("lam"),
        P=golden("P"),
        B=golden("B"),
        c=golden("C"),
        dt=torch.exp(golden("log_dt")),
        skip=golden("D"),
    )


def perturbed(num_systems=3, d_state=8, dtype=torch.float64, noise=0.3, **options):
    torch.manual_seed(0)
    ssm = DPLRSSM(num_systems, d_state, **options)
    with torch.no_grad():
        for parameter in (ssm.log_neg_A_real, ssm.A_imag, ssm.P, ssm.B):
            parameter.add_(noise * torch.randn_like(parameter))
    return ssm.to(dtype)


def run_steps(system, u, state=None):
    outputs = []
    for t in range(u.shape[-1]):
        y, state = system.step(u[..., t], state)
        outputs.append(y)
    return torch.stack(outputs, -1), state


def convolve(system, u):
    length = u.shape[-1]
    K = system.filter(length)
    toeplitz = torch.stack([nn.functional.pad(K, (t, 0))[:, :length] for t in range(length)], 1)
    return torch.einsum("bhs,hst->bht", u, toeplitz) + system.skip[:, None] * u


def dense_steps(system, u, x):
    A, b, c = system.dense()
    outputs = []
    for t in range(u.shape[-1]):
        x = torch.einsum("hij,bhj->bhi", A, x) + b * u[..., t, None]
        outputs.append((c * x).sum(-1) + system.skip * u[..., t])
    return torch.stack(outputs, -1), x


@pytest.mark.parametrize(("name", "length"), [("K", 16), ("K_2L", 32), ("K_odd", 13)])
def test_filter_is_the_golden_one(name, length):
    assert (golden_system().filter(length) - golden(name)).abs().max() < 1e-13


def test_stored_readout_is_c_and_gives_the_golden_c_tilde():
    system = golden_system()
    A, _, row = system.dense()
    tilde = row - (row[:, None] @ torch.linalg.matrix_power(A, 16))[:, 0]
    half = system.num_modes
    tilde = torch.complex(tilde[:, :half], -tilde[:, half:]) / 2
    assert (tilde - golden("C_tilde_L")).abs().max() < 1e-13


def test_dense_view_is_the_golden_matrix_on_real_coordinates():
    system = golden_system()
    A, b, _ = system.dense()
    half = system.num_modes
    # golden basis: the stored half, then the conjugates; x' = M x + M2 conj(x)
    M, M2 = golden("Abar")[:, :half, :half], golden("Abar")[:, :half, half:]
    top = torch.cat([(M + M2).real, (M2 - M).imag], -1)
    bottom = torch.cat([(M + M2).imag, (M - M2).real], -1)
    assert (A - torch.cat([top, bottom], -2)).abs().max() < 1e-13
    stored = golden("Bbar")[:, :half]
    assert (b - torch.cat([stored.real, stored.imag], -1)).abs().max() < 1e-13
    moduli = torch.linalg.eigvals(A).abs().sort().values
    assert (moduli - golden("mu_abs_sorted")).abs().max() < 1e-10


def test_outputs_and_state_are_the_golden_ones_by_filter_and_by_step():
    system, u = golden_system(), golden("u").mT
    stepped, state = run_steps(system, u)
    for y in (stepped, convolve(system, u)):
        assert (y.mT - golden("y_parallel")).abs().max() < 1e-13
        assert (y.mT - golden("y_recurrent")).abs().max() < 1e-13
    for x in (state, system.final_state(u)):
        assert (x - golden("state_final")).abs().max() < 1e-13


@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["legs", "perturbed"])
def test_dense_view_solves_the_bilinear_equations(noise):
    ssm = perturbed(3, 16, noise=noise)
    system = ssm.system()
    lam, P, B = system.eigenvalues, system.P, system.B
    full = [torch.cat([x, x.conj()], -1) for x in (lam, P, B)]
    A = torch.diag_embed(full[0]) - full[1][..., :, None] * full[1].conj()[..., None, :]
    identity = torch.eye(16, dtype=A.dtype)
    half_step = system.dt[:, None, None] / 2
    Abar = torch.linalg.solve(identity - half_step * A, identity + half_step * A)
    Bbar = torch.linalg.solve(identity - half_step * A, 2 * half_step * full[2][..., None])[..., 0]
    dense, into, _ = system.dense()
    x = torch.randn(3, 8, dtype=torch.complex128)
    moved = (Abar @ torch.cat([x, x.conj()], -1)[..., None])[:, :8, 0]
    real = (dense @ torch.cat([x.real, x.imag], -1)[..., None])[..., 0]
    assert (torch.complex(*real.chunk(2, -1)) - moved).abs().max() < 1e-12
    assert (torch.complex(*into.chunk(2, -1)) - Bbar[:, :8]).abs().max() < 1e-12


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["legs", "perturbed"])
def test_parallel_equals_recurrent_equals_dense_at_every_length(length, noise):
    system = perturbed(d_state=16, noise=noise).system()
    generator = torch.Generator().manual_seed(length)
    u = torch.randn(2, 3, length, dtype=torch.float64, generator=generator)
    x0 = torch.randn(2, 3, 8, dtype=torch.complex128, generator=generator)
    stepped, state = run_steps(system, u, x0)
    parallel = convolve(system, u) + system.initial_response(x0, length)
    dense, x = dense_steps(system, u, torch.cat([x0.real, x0.imag], -1))
    assert (parallel - stepped).abs().max() < 1e-9
    assert (parallel - dense).abs().max() < 1e-9
    assert (system.final_state(u, x0) - state).abs().max() < 1e-9
    assert (torch.complex(*x.chunk(2, -1)) - state).abs().max() < 1e-9


@pytest.mark.parametrize("length", [1024, 1025])
def test_parallel_equals_recurrent_at_full_size_and_in_fp32(length):
    u = torch.randn(1, 2, length, dtype=torch.float64)
    exact = perturbed(2, 64, noise=0.0)
    stepped, state = run_steps(exact.system(), u)
    assert (convolve(exact.system(), u) - stepped).abs().max() < 1e-9
    single = exact.float()
    narrow, narrow_state = run_steps(single.system(), u.float())
    scale = stepped.abs().max()
    # the parameters are the same numbers: only arithmetic in float32 differs
    assert (convolve(single.system(), u.float()) - stepped).abs().max() < 5e-5 * scale
    assert (narrow - stepped).abs().max() < 5e-5 * scale
    assert (narrow_state - state).abs().max() < 5e-5 * state.abs().max()


def test_node_at_minus_one_is_finite_and_exact():
    # lengths 2 and 4 have few nodes: an infinite or rounded one would be visible in each tap
    system = golden_system()
    A, b, c = system.dense()
    taps = [
        (c * (torch.linalg.matrix_power(A, l) @ b[..., None])[..., 0]).sum(-1) for l in range(4)
    ]
    for length in (2, 4):
        assert (system.filter(length) - torch.stack(taps[:length], -1)).abs().max() < 1e-15


def test_split_anywhere_with_carried_state():
    system = perturbed(d_state=8).system()
    u = torch.randn(2, 3, 20, dtype=torch.float64)
    whole, state = convolve(system, u), system.final_state(u)
    for split in range(21):
        x = system.final_state(u[..., :split])
        second = convolve(system, u[..., split:]) if split < 20 else u[..., split:]
        second = second + system.initial_response(x, 20 - split)
        assert torch.allclose(second, whole[..., split:], rtol=0, atol=1e-12)
        assert torch.allclose(system.final_state(u[..., split:], x), state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 22, 31, 256])
@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["legs", "perturbed"])
def test_quick_filter_is_the_filter_to_the_last_place_of_float32(length, noise):
    system = perturbed(d_state=64, noise=noise).system()
    exact = system.filter(1024)
    off = system.quick_filter(length) - exact[:, :length]
    assert off.abs().max() < 3e-8 * exact.abs().max()


def test_filter_of_length_zero_is_empty_and_a_negative_one_refused():
    system = golden_system()
    assert system.filter(0).shape == (3, 0)
    assert system.initial_response(golden("state_final"), 0).shape == (2, 3, 0)
    with pytest.raises(ValueError, match="length=-1"):
        system.filter(-1)


def test_step_contracts_for_any_low_rank_part():
    system = perturbed(4, 32, noise=3.0).system()
    A, _, _ = system.dense()
    assert torch.linalg.eigvals(A).abs().max() < 1


@pytest.mark.parametrize("length", [5, 6])
def test_gradients_of_every_parameter(length):
    ssm = perturbed(2, 4)
    names = [name for name, _ in ssm.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in ssm.parameters())
    u = torch.randn(1, 2, length, dtype=torch.float64)
    x0 = torch.randn(1, 2, 2, dtype=torch.complex128, requires_grad=True)

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.ssm = ssm

        def forward(self, x0):
            system = self.ssm.system()
            state = torch.view_as_real(system.final_state(u, x0))
            return convolve(system, u) + system.initial_response(x0, length), state

    model = Parallel()

    def function(x0, *values):
        named = {f"ssm.{name}": v for name, v in zip(names, values, strict=True)}
        return torch.func.functional_call(model, named, (x0,))

    assert torch.autograd.gradcheck(function, (x0, *values))


def test_long_filters_are_made_in_groups_with_the_same_values_and_gradients(monkeypatch):
    ssm = perturbed(5, 8)

    def values():
        ssm.zero_grad()
        system = ssm.system()
        x0 = torch.ones(2, 5, 4, dtype=torch.complex128)
        K = torch.cat([system.filter(12), system.initial_response(x0, 12).flatten(0, 1)])
        (K * torch.arange(12)).sum().backward()
        return K.detach(), [p.grad.clone() for p in ssm.parameters() if p.grad is not None]

    K, gradients = values()
    monkeypatch.setattr(dplr, "_MAX_ENTRIES", 2 * 4 * 7)
    grouped, grouped_gradients = values()
    assert torch.allclose(K, grouped, rtol=0, atol=1e-14)
    assert len(gradients) == 6  # all but the skip
    for one, other in zip(gradients, grouped_gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_diagonal_form_is_refused_near_legs_and_exact_away_from_it():
    with pytest.raises(
        ValueError, match=r"system 0 have condition number .*, more than 1e\+06"
    ) as caught:
        DPLRSSM(1, 16).double().system().diagonalized()
    assert "use step() and filter()" in str(caught.value)
    system = perturbed(3, 8, noise=1.0).system()
    diagonal = system.diagonalized()
    assert (diagonal.filter(100) - system.filter(100)).abs().max() < 1e-9
    u = torch.randn(2, 3, 70, dtype=torch.float64)
    y, _ = ssm_conv(u, diagonal)
    assert (y - convolve(system, u)).abs().max() < 1e-9


def test_untouched_legs_has_the_known_eigenvalues():
    ssm = DPLRSSM(1, 8).double()
    ssm.reset_parameters()
    A, _, _ = ssm.system().dense()
    dt = ssm.log_dt.exp().item()
    k = torch.arange(1, 9, dtype=torch.float64)
    expected = (1 - dt * k / 2) / (1 + dt * k / 2)
    assert torch.allclose(
        torch.linalg.eigvals(A).real.sort(descending=True).values, expected, atol=1e-9
    )


def test_parameters_stay_float32_and_carry_hints():
    ssm = DPLRSSM(4, 8).to(torch.bfloat16)
    assert {p.dtype for p in ssm.parameters()} == {torch.float32}
    capped = {name for name, hint in ssm.training_hints.items() if hint.weight_decay == 0}
    assert capped == {"log_dt", "log_neg_A_real", "A_imag", "P", "B"}
    with pytest.raises(ValueError, match="even"):
        DPLRSSM(4, 7)
    with pytest.raises(ValueError, match="dt_min"):
        DPLRSSM(4, 8, dt_min=1.0, dt_max=0.1)


def test_half_inputs_keep_their_dtype():
    system = DPLRSSM(2, 8).system()
    y, state = system.step(torch.ones(1, 2, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.complex64


@pytest.mark.parametrize("length", [0, 1, 17, 32])
def test_several_readouts_share_a_filter_pass(length, monkeypatch):
    from dataclasses import replace

    system = DPLRSSM(3, 8).double().system()
    readouts = torch.randn(2, 3, 4, dtype=torch.complex128)
    expected = torch.stack([replace(system, c=c).filter(length) for c in readouts])
    assert torch.allclose(system.filters(readouts, length), expected, atol=1e-12)
    monkeypatch.setattr("h3lm.ssm.dplr._MAX_ENTRIES", 1)  # channel by channel
    assert torch.allclose(system.filters(readouts, length), expected, atol=1e-12)
