"""What every mixer promises, whatever it is made of."""

import copy
import inspect
from itertools import pairwise

import pytest
import torch
from torch import nn

from h3lm import flashconv
from h3lm.layers import MIXERS, MixerSizes, mixer
from h3lm.layers.long_conv import LongConv
from h3lm.layers.s4 import S4

SIZES = MixerSizes(d_model=8, d_state=16, h3_head_dim=1, num_heads=2, rotary_dim=2)
CASES = {
    "h3": ("h3", SIZES),
    "h3-head_dim-4": ("h3", MixerSizes(d_model=8, d_state=16, h3_head_dim=4)),
    "h3-taps-4": ("h3", MixerSizes(d_model=8, d_state=16, h3_num_taps=4)),
    "attention": ("attention", SIZES),
    "s4d": ("s4d", SIZES),
    "s4": ("s4", SIZES),
    "long_conv": ("long_conv", MixerSizes(d_model=8, filter_length=11)),
    "gss": ("gss", SIZES),
    "linear_attention": ("linear_attention", SIZES),
}
LENGTH = 37


@pytest.fixture(params=CASES)
def layer(request) -> nn.Module:
    name, sizes = CASES[request.param]
    torch.manual_seed(3)
    layer = mixer(name).build(sizes).double().eval()
    with torch.no_grad():  # biases at zero would hide that masking the input is not enough
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.fixture
def u() -> torch.Tensor:
    return torch.randn(2, LENGTH, 8, dtype=torch.float64)


def test_every_mixer_is_a_case():
    assert {name for name, _ in CASES.values()} == set(MIXERS)


def test_causal_by_gradient(layer, u):
    u.requires_grad_()
    leak = (
        1e-14 if isinstance(layer, S4 | LongConv) else 0.0
    )  # an FFT spreads its rounding over the row
    for t in (0, 5, LENGTH - 1):
        y, _ = layer(u)
        (grad,) = torch.autograd.grad(y[:, t].sum(), u)
        assert not (grad[:, t + 1 :].abs() > leak * grad.abs().max()).any()
        assert grad[:, t].abs().max() > 0


def test_a_state_that_is_not_wanted_is_not_made(layer, u):
    if "with_state" not in inspect.signature(layer.forward).parameters:
        pytest.skip("its state costs nothing")
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :9] = False
    for masked in (None, mask):
        expected, _ = layer(u, mask=masked)
        found, none = layer(u, mask=masked, with_state=False)
        assert_close(found, expected)
        assert none is None


def test_s4_without_a_state_convolves_whole_rows(monkeypatch):
    seen = []
    right = flashconv.fft_operators
    monkeypatch.setattr(
        flashconv, "fft_operators", lambda s, L, C: (seen.append((L, C)), right(s, L, C))[1]
    )
    layer = mixer("s4").build(MixerSizes(d_model=2, d_state=4)).double()
    u = torch.randn(1, 9000, 2, dtype=torch.float64)
    expected, _ = layer(u)
    found, _ = layer(u, with_state=False)
    assert_close(found, expected)
    assert seen == [(9000, 8192), (9000, 9000)]


def test_parallel_equals_recurrent(layer, u):
    expected, end = layer(u)
    state, steps = None, []
    for t in range(LENGTH):
        y, state = layer(u[:, t : t + 1], state)
        steps.append(y)
    assert_close(torch.cat(steps, 1), expected)
    assert_states_close(state, end)


def test_parallel_equals_chunks_at_every_split(layer, u):
    expected, end = layer(u)
    for split in range(1, LENGTH):
        first, state = layer(u[:, :split])
        second, state = layer(u[:, split:], state)
        assert_close(torch.cat([first, second], 1), expected)
        assert_states_close(state, end)


@pytest.mark.parametrize("pattern", ["left", "right", "inside", "empty-row"])
def test_masked_positions_are_as_if_they_were_not_there(layer, u, pattern):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if pattern == "left":
        mask[0, :9] = 0
    elif pattern == "right":
        mask[1, -4:] = 0
    elif pattern == "inside":
        mask[0, 3:30:3] = 0
    else:
        mask[0] = 0
    _, warm = layer(torch.randn(2, 5, 8, dtype=torch.float64))
    for state in (None, warm):
        y, _ = layer(u, state, mask=mask)
        tail = torch.randn(2, 3, 8, dtype=torch.float64)
        after, _ = layer(tail, layer(u, state, mask=mask)[1])
        for row in range(2):
            kept = mask[row].bool()
            alone_state = None if state is None else type(state)(*(x[row, None] for x in state))
            alone = u[row, kept][None]
            if kept.any():
                expected, alone_state = layer(alone, alone_state)
                assert_close(y[row, kept], expected[0])
            assert_close(after[row], layer(tail[row, None], alone_state)[0][0])


def test_a_mistaken_mask_is_refused(layer, u):
    for mask in (torch.ones(len(u), u.shape[1] - 1), torch.ones(len(u) + 1, u.shape[1])):
        with pytest.raises(ValueError, match=r"mask is .*, the input has"):
            layer(u, mask=mask.int())


def test_no_positions(layer, u):
    y, _ = layer(u[:, :0])
    assert y.shape == u[:, :0].shape
    y, _ = layer(u[:0])
    assert y.shape == u[:0].shape


def test_a_masked_single_step_moves_nothing(layer, u):
    _, state = layer(u)
    mask = torch.tensor([[1], [0]])
    _, new = layer(torch.randn(2, 1, 8, dtype=torch.float64), state, mask=mask)
    probe = torch.randn(2, 1, 8, dtype=torch.float64)
    after, before = layer(probe, new)[0], layer(probe, state)[0]
    assert_close(after[1], before[1])
    assert (after[0] - before[0]).abs().max() > 1e-6


def test_packed_equals_separate(layer, u):
    bounds = [0, 1, 14, 15, LENGTH]
    packed, _ = layer(u[:1], cu_seqlens=torch.tensor(bounds))
    for start, end in pairwise(bounds):
        assert_close(packed[:, start:end], layer(u[:1, start:end])[0])


def test_gradients_flow_through_the_state(layer, u):
    u.requires_grad_()
    whole, _ = layer(u)
    (expected,) = torch.autograd.grad(whole[:, 20:].pow(2).sum(), u)
    _, state = layer(u[:, :20])
    second, _ = layer(u[:, 20:], state)
    (grad,) = torch.autograd.grad(second.pow(2).sum(), u)
    assert_close(grad, expected)


def test_low_precision_projections_stay_finite_and_near(layer, u):
    layer.float()
    low = copy.deepcopy(layer).to(torch.bfloat16)
    expected, _ = layer(u.float())
    y, _ = low(u.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


def test_save_and_load_bit_exact(layer, u, tmp_path):
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other(u)  # fills whatever is kept between calls
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(layer(u)[0], other(u)[0])


def test_constant_state_packs_and_unpacks(layer, u):
    _, state = layer(u)
    if not hasattr(layer, "pack_state"):
        assert layer(torch.cat([u, u], 1))[1].keys.shape[2] == 2 * LENGTH
        return
    packed = layer.pack_state(state)
    assert all(part is None or (part.shape[0] == 2 and not part.is_complex()) for part in packed)
    assert_states_close(layer.unpack_state(*packed), state)
    longer = layer.pack_state(layer(torch.cat([u, u], 1))[1])
    assert [p.shape for p in packed if p is not None] == [p.shape for p in longer if p is not None]


def assert_close(actual, expected):
    scale = expected.detach().abs().max().clamp(min=1.0)
    assert (actual - expected).abs().max() <= 1e-10 * scale


def assert_states_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        if a.is_floating_point() or a.is_complex():
            assert_close(a, b)


@pytest.mark.parametrize("name", ["s4", "s4d", "long_conv", "gss"])
def test_a_layer_under_autocast_convolves_in_its_dtype(name, monkeypatch):
    seen = []
    for op in ("ssm_conv", "fft_conv"):
        right = getattr(flashconv, op)

        def spy(u, *rest, right=right, **options):
            seen.append(u.dtype)
            return right(u, *rest, **options)

        monkeypatch.setattr(flashconv, op, spy)
    layer = mixer(name).build(MixerSizes(d_model=8, d_state=16, filter_length=11))
    u = torch.randn(2, 30, 8)
    plain, _ = layer(u)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, _ = layer(u)
    assert seen == [torch.float32, torch.bfloat16]
    assert (narrow.float() - plain).norm() < 5e-2 * plain.norm()  # projections are narrow, too
