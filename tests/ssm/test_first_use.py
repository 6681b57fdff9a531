import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from h3lm.ssm.first_use import first_use


@pytest.mark.parametrize(
    ("wrong", "told"), [("", ""), ("y differs", "y differs"), (OSError("a\nb"), "OSError: a")]
)
def test_a_check_runs_once_and_is_remembered(caplog, wrong, told):
    calls, found = [], {}

    @first_use(logging.getLogger("h3lm.ssm"), "{0} of {1} is off", found)
    def fault(name: str, length: int) -> str:
        calls.append(name)
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    with caplog.at_level("WARNING"):
        assert [fault("fft", 8), fault("fft", 8)] == [told, told]
    assert calls == ["fft"]
    assert found == {("fft", 8): told}
    assert [r.getMessage() for r in caplog.records] == (
        [f"fft of 8 is off: {told}"] if told else []
    )


def test_a_check_within_a_checkpointed_block_leaves_the_block_alone():
    @first_use(logging.getLogger("h3lm.ssm"), "{0} is off", {})
    def fault(name: str) -> str:
        y = torch.ones(3, requires_grad=True).exp().exp()
        torch.autograd.grad(y.sum(), y)
        return ""

    def block(x):
        assert fault("fft") == ""
        return (x * x).exp()

    x = torch.ones(2, requires_grad=True)
    # the block's own tensors alone are counted, in the forward pass and when it runs again
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert torch.allclose(x.grad, 2 * torch.ones(2).exp())


def test_a_check_under_vmap_is_no_part_of_it():
    @first_use(logging.getLogger("h3lm.ssm"), "{0} is off", {})
    def fault(name: str) -> str:
        x = torch.randn(3, requires_grad=True)
        (grad,) = torch.autograd.grad((2 * x).sum(), x)
        return "" if float(grad.sum()) == 6 else "y differs"

    assert torch.vmap(lambda x: x if fault("fft") == "" else -x)(torch.ones(2)).all()
    assert fault("fft") == ""


def test_a_check_within_torch_func_is_none_of_its_business():
    @first_use(logging.getLogger("h3lm.ssm"), "{0} is off", {})
    def fault(name: str) -> str:
        y = torch.randn(3, requires_grad=True).exp()
        torch.autograd.grad(y.sum(), y)
        return ""

    def loss(x):
        assert fault("fft") == ""
        return (x * x).sum()

    assert torch.equal(torch.func.grad(loss)(torch.ones(2)), 2 * torch.ones(2))
