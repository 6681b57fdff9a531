"""Batch norm and gate by kernels: in Triton's interpreter on a CPU, compiled on a GPU."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from h3lm import H3ClassificationConfig, H3ForSequenceClassification
from h3lm.layers import border
from h3lm.layers.batch_norm import BatchNorm
from h3lm.layers.s4d import finish

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
HALF = torch.bfloat16 if GPU else torch.float16  # numpy, and so the interpreter, has no bfloat16
ERROR = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "") -> None:
    error = float((found.double() - expected).detach().norm() / expected.detach().norm())
    assert error <= ERROR[dtype], f"{name}: {error:.1e}"


@pytest.fixture
def _on(monkeypatch):
    """Kernels wherever the tensors are."""
    monkeypatch.setattr(border, "_usable", lambda x: x.dtype != torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("positions_last", [False, True])
@pytest.mark.parametrize("lengths", [None, [70, 1, 33]])
@pytest.mark.usefixtures("_on")
def test_batch_norm_equals_float64(dtype, positions_last, lengths):
    x = 3 * torch.randn(3, 70, 40, device=DEVICE) + 50  # a mean that cancels badly
    dy = torch.randn(3, 70, 40, device=DEVICE).to(dtype)
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    results = []
    for wide in (False, True):
        torch.manual_seed(1)
        norm = BatchNorm(40).to(DEVICE)
        with torch.no_grad():
            norm.weight.normal_()
            norm.bias.normal_()
        norm = norm.double() if wide else norm
        leaf = x.to(norm.weight.dtype).requires_grad_()
        y = norm(leaf, lengths, dtype=None if wide else dtype, positions_last=positions_last)
        g = dy.to(y.dtype)
        if lengths is not None:
            g = g * (torch.arange(70, device=DEVICE) < lengths[:, None])[..., None]
            y = y * (torch.arange(70, device=DEVICE) < lengths[:, None])[..., None]
        grads = torch.autograd.grad(y, [leaf, norm.weight, norm.bias], g)
        results.append((y, *grads, norm.running_mean, norm.running_var))
        if not wide:
            assert y.dtype == dtype
    for name, found, exact in zip(
        ("y", "dx", "dweight", "dbias", "mean", "variance"), *results, strict=True
    ):
        close(found, exact, dtype if name == "y" else torch.float32, name)


@pytest.mark.usefixtures("_on")
def test_batch_norm_hides_padding_and_keeps_positions_together():
    norm, x = BatchNorm(5).to(DEVICE), torch.randn(2, 9, 5, device=DEVICE)
    y = norm(x, torch.tensor([9, 4], device=DEVICE), positions_last=True)
    assert not y[1, 4:].any()
    assert y.transpose(1, 2).is_contiguous()
    x[1, 4:] = float("nan")
    again = norm(x, torch.tensor([9, 4], device=DEVICE))
    assert torch.equal(again, y)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.usefixtures("_on")
def test_the_gated_end_of_a_layer_equals_float64(dtype, bias):
    projection = nn.Linear(24, 80, bias=bias).to(DEVICE)
    u = torch.randn(3, 24, 70, device=DEVICE).to(dtype)
    dy, r = (torch.randn(3, 70, 40, device=DEVICE).to(t) for t in (dtype, torch.float32))
    results = []
    for wide in (False, True):
        module = projection if not wide else nn.Linear(24, 80, bias=bias).to(DEVICE).double()
        module.load_state_dict(projection.state_dict())
        leaf = u.double().requires_grad_() if wide else u.detach().requires_grad_()
        y = finish(module, leaf, "glu")
        grads = torch.autograd.grad(y, [leaf, *module.parameters()], dy.to(y.dtype))
        residual = r.to(module.weight.dtype).requires_grad_()
        added = finish(module, leaf, "glu", residual)
        assert added.dtype == residual.dtype
        grads += torch.autograd.grad(
            added, [residual, leaf, *module.parameters()], dy.to(residual.dtype)
        )
        results.append((y, *grads, added))
    assert results[0][0].dtype == dtype
    for found, exact in zip(*results, strict=True):
        close(found, exact, dtype)


def test_kernels_that_are_wrong_are_not_used(monkeypatch, caplog):
    assert not border.fault.__wrapped__(DEVICE)
    monkeypatch.setattr(F, "glu", lambda x, dim: x.chunk(2, dim)[0])
    border.fault.cache_clear()
    assert "gate differs by" in border.fault(DEVICE)
    assert "modules take over" in caplog.text
    border.fault.cache_clear()


@pytest.mark.filterwarnings("ignore")  # of the checker itself
@pytest.mark.parametrize("positions_last", [False, True])
def test_opcheck(positions_last):
    x, weight, bias = (torch.randn(*s, device=DEVICE) for s in ((2, 5, 3), (3,), (3,)))
    lengths = torch.tensor([5, 2], device=DEVICE)
    op = torch.ops.h3lm.batch_norm_fwd.default
    torch.library.opcheck(op, (x, weight, bias, lengths, 1e-5, 2, positions_last))
    dy = torch.randn((2, 3, 5) if positions_last else (2, 5, 3), device=DEVICE)
    statistics = torch.rand(4, 3, device=DEVICE) + 1
    for residual in (None, torch.randn(2, 5, 3, device=DEVICE)):
        given = (dy, residual, x, weight, lengths, statistics, 1e-5, positions_last)
        torch.library.opcheck(torch.ops.h3lm.batch_norm_bwd.default, given)
    y = torch.randn(2, 6, 5, device=DEVICE, requires_grad=True)
    b = torch.randn(6, device=DEVICE, requires_grad=True)
    r = torch.randn(2, 5, 3, device=DEVICE, requires_grad=True)
    for residual in (None, r):
        torch.library.opcheck(torch.ops.h3lm.gate_fwd.default, (y, b, residual))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("mixers", ["s4d", "long_conv", "attention"])
def test_a_classifier_trains_by_kernels_as_without(mixers, norm_position, monkeypatch):
    config = H3ClassificationConfig(
        mixers=mixers, num_channels=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        d_state=8, filter_length=9, num_labels=3, bidirectional=True, norm="batch", pooling="mean",
        norm_position=norm_position, intermediate_size=32,
    )  # fmt: skip
    model = H3ForSequenceClassification(config).to(DEVICE)
    values = torch.randn(3, 20, 2, device=DEVICE)
    mask = torch.arange(20) < torch.tensor([[20], [7], [11]])
    labels = torch.tensor([0, 2, 1], device=DEVICE)
    found = []
    for use in (True, False):
        monkeypatch.setattr(border, "_usable", lambda x, use=use: use)
        loss = model(input_values=values, attention_mask=mask.to(DEVICE), labels=labels).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found.append([loss.detach(), *grads])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6  # some are 0
