"""The border between (B, L, D) and (B, D, L)."""

import pytest
import torch
from torch import nn

from h3lm.layers import projection
from h3lm.layers.projection import bias_as_input, project_channel_first, project_channel_last


@pytest.mark.parametrize("bias", [False, True])
def test_channel_first_and_back_are_the_linear_layers(bias):
    up, down = nn.Linear(6, 9, bias=bias).double(), nn.Linear(9, 4).double()
    u = torch.randn(2, 5, 6, dtype=torch.float64)
    y = project_channel_first(up, u)
    assert y.transpose(0, 1).is_contiguous()
    torch.testing.assert_close(y, up(u).mT)
    torch.testing.assert_close(project_channel_last(down, y), down(up(u)))


def test_a_bias_may_be_the_weight_of_one_more_input(monkeypatch):
    linear = nn.Linear(6, 9)
    u = torch.randn(2, 5, 6, requires_grad=True)
    leaves = [u, linear.weight, linear.bias]
    expected = project_channel_first(linear, u)
    grads = torch.autograd.grad(expected.square().sum(), leaves)
    monkeypatch.setattr(projection, "_adds_in_product", lambda *_: True)
    found = project_channel_first(linear, u)
    torch.testing.assert_close(found, expected)
    for x, y in zip(torch.autograd.grad(found.square().sum(), leaves), grads, strict=True):
        torch.testing.assert_close(x, y)
    rows, weight = bias_as_input(u[0], linear.weight, linear.bias, torch.bfloat16)
    assert rows.dtype == weight.dtype == torch.bfloat16
    assert rows.shape == (5, 14)


@pytest.mark.gpu
def test_on_a_gpu_it_is_so_in_training_in_half_precision():
    linear, u = nn.Linear(64, 96, device="cuda"), torch.randn(2, 64, 64, device="cuda")
    exact = linear.double()(u.double()).mT
    linear.float()
    with torch.autocast("cuda", torch.bfloat16):
        assert projection._adds_in_product(u, linear.weight)
        trained = project_channel_first(linear, u)
        with torch.no_grad():
            assert not projection._adds_in_product(u, linear.weight)
            plain = project_channel_first(linear, u)
    assert trained.dtype == plain.dtype == torch.bfloat16
    error, allowed = ((x.double() - exact).norm().item() for x in (trained, plain))
    assert error <= 1.05 * allowed
    assert not projection._adds_in_product(u, linear.weight)
