"""What every bidirectional layer promises."""

from itertools import pairwise

import pytest
import torch

from h3lm.layers import MIXERS, MixerSizes, mixer

SIZES = {"d_model": 4, "d_state": 8, "num_heads": 2, "rotary_dim": 2, "filter_length": 6}
CASES = {
    name: (name, MixerSizes(**SIZES, bidirectional=True))
    for name, kind in MIXERS.items()
    if kind.can_be_bidirectional
}
CASES["s4d-block"] = ("s4d", MixerSizes(**SIZES, bidirectional=True, s4d_block=True))
CASES["h3-head_dim-2"] = ("h3", MixerSizes(**SIZES, h3_head_dim=2, bidirectional=True))
LENGTH = 12


@pytest.fixture(params=CASES)
def layer(request):
    name, sizes = CASES[request.param]
    layer = mixer(name).build(sizes).double()
    with torch.no_grad():  # biases at zero would hide that masking the input is not enough
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


@pytest.fixture
def u():
    return torch.randn(2, LENGTH, 4, dtype=torch.float64)


def close(actual, expected):
    return torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_it_leaves_no_state_and_takes_none(layer, u):
    assert layer(u)[1] is None
    with pytest.raises((ValueError, TypeError), match="state"):
        layer(u, (torch.zeros(2, 4),))


def test_packed_equals_separate(layer, u):
    bounds = [0, 1, 5, LENGTH]
    packed, _ = layer(u[:1], cu_seqlens=torch.tensor(bounds))
    for start, end in pairwise(bounds):
        assert close(packed[:, start:end], layer(u[:1, start:end])[0])


@pytest.mark.parametrize("hidden", [slice(0, 4), slice(7, None), slice(3, 6)])
def test_masked_positions_are_as_if_they_were_not_there(layer, u, hidden):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, hidden] = 0
    masked, _ = layer(u, mask=mask)
    assert close(masked[0], layer(u)[0][0])
    kept = mask[1].bool()
    assert close(masked[1, kept], layer(u[1:, kept])[0][0])


def test_what_stands_behind_lengths_is_as_if_it_were_not_there(layer, u):
    lengths = torch.tensor([5, LENGTH])
    y, _ = layer(u, lengths=lengths)
    assert close(y[0, :5], layer(u[:1, :5])[0][0])
    assert close(y[1], layer(u[1:])[0][0])


def test_every_position_sees_both_sides(layer, u):
    u.requires_grad_()
    (grad,) = torch.autograd.grad(layer(u)[0][:, 5].sum(), u)
    seen = grad.abs().amax(-1)[0] > 0
    assert seen.all()


def test_the_present_is_counted_once(layer, u):
    """Alone in its row a position has nothing behind it, whatever the backward part is."""
    alone, _ = layer(u[:, :1])
    backward = [p for name, p in layer.named_parameters() if name.startswith("backward")]
    with torch.no_grad():
        for parameter in backward:
            parameter.normal_()
    assert close(layer(u[:, :1])[0], alone)
    assert not backward or not close(layer(u)[0][:, :1], alone)


def test_without_its_backward_part_it_is_the_causal_layer(layer, u, request):
    name, sizes = CASES[request.node.callspec.params["layer"]]
    if name == "attention":
        pytest.skip("one set of weights looks both ways")
    causal = mixer(name).build(MixerSizes(**(vars(sizes) | {"bidirectional": False}))).double()
    causal.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key.startswith("backward"):
                parameter.zero_()
    assert close(layer(u)[0], causal(u)[0])


@pytest.mark.parametrize("head_dim", [1, 2])
def test_h3_both_ways_is_a_double_loop(head_dim, u):
    """o_t[j] = sum_i q_t[i] (sum_{s<=t} K w_s + sum_{s>t} Kb w_s + skip w_t)[i, j]."""
    sizes = MixerSizes(d_model=4, d_state=8, h3_head_dim=head_dim, bidirectional=True)
    layer = mixer("h3").build(sizes).double()
    q, k, v = layer.qkv_proj(u).chunk(3, -1)
    taps = layer.shift_ssm.taps()
    system = layer.diagonal_ssm.system()
    back = torch.view_as_complex(layer.backward_readout.C)
    s = torch.zeros_like(k)
    for t in range(LENGTH):
        for j in range(min(t + 1, taps.shape[1])):
            s[:, t] += taps[:, j] * k[:, t - j]
    o = torch.zeros_like(q)
    for h in range(4 // head_dim):
        at = slice(h * head_dim, (h + 1) * head_dim)
        w = s[..., at, None] * v[..., None, at]
        for t in range(LENGTH):
            y = system.skip[h] * w[:, t]
            for r in range(LENGTH):
                c = system.c[h] if r <= t else back[h]
                lag = t - r if r <= t else r - t - 1
                y = y + 2 * (c * system.a[h] ** lag * system.b[h]).sum().real * w[:, r]
            o[:, t, at] += torch.einsum("bi,bij->bj", q[:, t, at], y)
    assert close(layer(u)[0], layer.output_proj(o))


def test_causal_layers_do_not_look_at_lengths(u):
    for name in ("h3", "s4d", "s4", "long_conv"):
        layer = mixer(name).build(MixerSizes(**SIZES)).double()
        assert close(layer(u, lengths=torch.tensor([3, 5]))[0], layer(u)[0])
