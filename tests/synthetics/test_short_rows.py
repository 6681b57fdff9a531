import pytest
import torch

from h3lm.layers import mixers
from h3lm.layers.mixers import MixerSizes
from h3lm.ssm import DiagonalSSM
from h3lm.ssm.shared_modes import TiedDiagonalSSM
from h3lm.synthetics.short_rows import MAX_LENGTH, attend, response, shorten


def build(name):
    torch.manual_seed(0)
    name, head_dim, num_taps = (*name.split(":"), 1, None)[:3]
    return mixers.mixer(name).build(
        MixerSizes(
            d_model=8,
            d_state=16,
            h3_head_dim=int(head_dim),
            h3_num_taps=num_taps and int(num_taps),
        )
    )


def output_and_gradients(run, layer, u):
    y = run(u)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, [u, *layer.parameters()], torch.randn_like(y))]


@pytest.mark.parametrize("length", [1, 2, 22, 64, 65, MAX_LENGTH])
@pytest.mark.parametrize("name", ["h3", "h3:2", "h3:1:4", "s4d", "s4", "gss", "attention"])
def test_short_form_is_the_layer_with_all_its_gradients(name, length):
    layer, other = build(name), build(name)
    shorten(other)
    u = torch.randn(3, length, 8, requires_grad=True)
    usual = output_and_gradients(lambda u: layer(u)[0], layer, u)
    short = (lambda u: attend(other, u)) if name == "attention" else (lambda u: other(u)[0])
    for a, b in zip(usual, output_and_gradients(short, other, u), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5 * (a.abs().max().item() + 1e-3))


def test_modes_that_die_out_within_a_step_leave_finite_gradients():
    # training may drive the decay of GSS there: exp(-exp(5)) is 0 in float32
    layer, other = build("gss"), build("gss")
    shorten(other)
    for one in (layer, other):
        with torch.no_grad():
            one.diagonal_ssm.log_neg_A_real[:3] = torch.tensor([4.6, 5.0, 6.0])
    u = torch.randn(3, 22, 8, requires_grad=True)
    usual = output_and_gradients(lambda u: layer(u)[0], layer, u)
    for a, b in zip(usual, output_and_gradients(lambda u: other(u)[0], other, u), strict=True):
        assert torch.isfinite(b).all()
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5 * (a.abs().max().item() + 1e-3))


@pytest.mark.parametrize("rule", ["bilinear", "zoh"])
@pytest.mark.parametrize("kind", [DiagonalSSM, TiedDiagonalSSM])
def test_responses_in_real_numbers_are_those_of_the_system(kind, rule):
    torch.manual_seed(0)
    # rates from very slow, where the hold would cancel, to those of which one step is a turn
    ssm = kind(6, 8, discretization=rule, init="lin", dt_min=1e-5, dt_max=1.0)
    system = ssm.system()
    filters = system.filter(40)
    taps = response(ssm, 40)
    assert torch.allclose(taps[:, 1:], filters[:, 1:], rtol=1e-5, atol=1e-6)
    assert torch.allclose(taps[:, 0], filters[:, 0] + ssm.D, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["h3", "s4d"])
def test_longer_rows_and_states_take_the_layers_own_way(name):
    layer, other = build(name), build(name)
    shorten(other)
    u = torch.randn(2, MAX_LENGTH + 1, 8)
    with torch.no_grad():
        y, state = layer(u)
        short_y, short_state = other(u)
        assert torch.equal(y, short_y)
        assert torch.equal(layer(u, state)[0], other(u, short_state)[0])


def test_dropout_multiplies_the_weights_of_attention():
    layer, u = build("attention"), torch.randn(2, 5, 8)
    keep = torch.zeros(2, 1, 5, 5)
    with torch.no_grad():
        assert torch.allclose(attend(layer, u, keep), layer.output_proj.bias.expand(2, 5, 8))
        assert torch.allclose(attend(layer, u, keep + 1), layer(u)[0], atol=1e-6)
