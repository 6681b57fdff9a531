"""The loss without whole logits equals the loss of whole logits."""

import pytest
import torch
from torch.nn import functional as F

from h3lm.models import H3Config, H3ForCausalLM, loss
from h3lm.models.loss import IGNORED, head_loss


def problem(dtype=torch.float32, positions=50, vocab=41, width=8):
    torch.manual_seed(0)
    hidden = torch.randn(2, positions // 2, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocab, (2, positions // 2))
    targets[0, 3:9] = IGNORED
    return hidden, weight, targets


def exact(hidden, weight, targets, num_items):
    """Loss and gradients in float64, of whole logits."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    total = F.cross_entropy((h @ w.T).flatten(0, 1), targets.flatten(), reduction="sum")
    value = total / ((targets != IGNORED).sum() if num_items is None else num_items)
    return value, torch.autograd.grad(value, (h, w))


@pytest.mark.parametrize("way", ["chunks", "torch"])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(30)])
@pytest.mark.parametrize("chunk_logits", [1, 41 * 7, 1 << 20])
def test_loss_and_gradients_are_those_of_whole_logits(monkeypatch, way, num_items, chunk_logits):
    if way == "chunks":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    elif not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    hidden, weight, targets = problem()
    value = head_loss(hidden, weight, targets, num_items, chunk_logits=chunk_logits)
    expected, grads = exact(hidden, weight, targets, num_items)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    for mine, grad in zip(torch.autograd.grad(value, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(mine.double(), grad, rtol=1e-5, atol=1e-6)


def test_under_autocast_it_is_no_more_wrong_than_whole_logits():
    hidden, weight, targets = problem(positions=400, vocab=300, width=32)
    expected, grads = exact(hidden, weight, targets, None)
    with torch.autocast("cpu", torch.bfloat16):
        ours = head_loss(hidden, weight, targets, chunk_logits=300 * 64)
        logits = F.linear(hidden, weight).float().flatten(0, 1)
        plain = F.cross_entropy(logits, targets.flatten())

    def wrong(value):
        mine = torch.autograd.grad(value, (hidden, weight))
        far = [float((a - b).abs().max()) for a, b in zip(mine, grads, strict=True)]
        return [float((value - expected).abs().detach()), *far]

    assert all(a <= 2 * b + 1e-7 for a, b in zip(wrong(ours), wrong(plain), strict=True))


def test_whole_logits_are_never_made(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    hidden, weight, targets = problem()
    made = []
    linear = F.linear
    monkeypatch.setattr(loss.F, "linear", lambda *a: made.append(linear(*a)) or made[-1])
    head_loss(hidden, weight, targets, chunk_logits=41 * 10).backward()
    assert {len(x) for x in made} == {10}
    assert len(made) == 10  # five parts, and again for the gradient


@pytest.mark.parametrize("shifted", [False, True])
def test_a_model_without_logits_has_the_same_loss(shifted):
    torch.manual_seed(0)
    model = H3ForCausalLM(
        H3Config(vocab_size=24, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    model.eval()
    ids = torch.randint(0, 24, (2, 20))
    more = {"shift_labels": ids.flip(1), "num_items_in_batch": 9} if shifted else {}
    whole = model(ids, labels=ids, use_cache=False, **more)
    lean = model(ids, labels=ids, use_cache=False, skip_logits=True, **more)
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, whole.loss, rtol=1e-6, atol=0)
