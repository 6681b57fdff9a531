"""The kernel of the head's loss: in Triton's interpreter on a CPU, compiled on a GPU."""

from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from h3lm.models import H3Config, H3ForCausalLM
from tests.models.test_loss import exact, problem

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
HALF = torch.bfloat16 if GPU else torch.float16  # numpy, and so the interpreter, has no bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows_at_once", "vocab"), [(1, 300), (7, 304), (100, 300), (100, 304)])
def test_the_kernel_is_no_more_wrong_than_whole_logits(dtype, rows_at_once, vocab):
    from h3lm.models.loss_triton import head_loss_sum

    hidden, weight, targets = problem(positions=50, vocab=vocab, width=32)
    expected, grads = exact(hidden, weight, targets, 1)
    h, w = (x.detach().to(DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    t = targets.flatten().to(DEVICE)

    def wrong(value):
        mine = torch.autograd.grad(3 * value, (h, w))
        far = [float((a.cpu() / 3 - b).norm() / b.norm()) for a, b in zip(mine, grads, strict=True)]
        return [float((value.cpu() - expected).abs().detach() / expected.detach()), *far]

    size = rows_at_once * vocab * dtype.itemsize
    ours = wrong(head_loss_sum(h.flatten(0, 1), w, t, size, True)[0])
    logits = F.linear(h, w).float().flatten(0, 1)
    plain = wrong(F.cross_entropy(logits, t, reduction="sum"))
    assert all(a <= 2 * b + 1e-6 for a, b in zip(ours, plain, strict=True)), (ours, plain)
    alone = head_loss_sum(h.flatten(0, 1), w, t, size, False)
    torch.testing.assert_close(
        float(alone[0].detach().cpu()), float(expected.detach()), rtol=1e-2, atol=0
    )
    assert not alone[1].numel()
    assert not alone[2].numel()


def test_the_kernel_is_an_operator_of_pytorch():
    from h3lm.models.loss_triton import head_loss_sum

    hidden, weight, targets = problem()
    h, w, t = (
        x.to(DEVICE) for x in (hidden.flatten(0, 1).detach(), weight.detach(), targets.flatten())
    )
    torch.library.opcheck(
        head_loss_sum,
        (h.requires_grad_(), w.requires_grad_(), t, 1 << 12, True),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.gpu
def test_on_a_gpu_a_model_has_the_loss_and_gradients_of_whole_logits():
    torch.manual_seed(0)
    config = H3Config(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = H3ForCausalLM(config).cuda()
    ids = torch.randint(0, 1000, (2, 128), device="cuda")
    whole = model(ids, labels=ids, use_cache=False).loss
    expected = torch.autograd.grad(whole, list(model.parameters()))
    lean = model(ids, labels=ids, use_cache=False, skip_logits=True).loss
    torch.testing.assert_close(lean, whole, rtol=1e-5, atol=0)
    for mine, grad in zip(
        torch.autograd.grad(lean, list(model.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(mine, grad, rtol=1e-3, atol=1e-5)
