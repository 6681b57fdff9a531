"""Kernels of discretisation and short filter: against plain PyTorch, in Triton's interpreter."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from h3lm.ssm import DiagonalSSM, ShiftSSM
from h3lm.ssm import fused_parameters as fused
from h3lm.ssm.diagonal import plain_bilinear
from h3lm.ssm.shift import plain_taps

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def _system(H: int, modes: int) -> tuple[Tensor, ...]:
    return (
        torch.rand(H) * 4.6 - 6.9, torch.randn(H, modes) / 3 - 0.7,
        3.1416 * torch.arange(modes) + torch.randn(H, modes), torch.randn(H, modes, 2),
    )  # fmt: skip


def _shift(rows: int, slots: int) -> tuple[Tensor, ...]:
    return torch.randn(rows, slots), torch.randn(rows, slots) / 8, torch.randn(rows)


def _everything(run, given) -> list[Tensor]:
    given = [x.detach().to(DEVICE).requires_grad_() for x in given]
    found = run(*given)
    found = [torch.view_as_real(x) for x in found] if isinstance(found, tuple) else [found]
    random = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=random).to(DEVICE, x.dtype)).sum() for x in found
    )
    return [x.detach() for x in (*found, *torch.autograd.grad(loss, given))]


@pytest.mark.parametrize("shape", [(2, 32), (1, 5), (3, 64)])
@pytest.mark.parametrize(
    ("kernel", "plain", "make"),
    [(fused.bilinear, plain_bilinear, _system), (fused.shift_taps, plain_taps, _shift)],
)
def test_kernels_equal_float64_as_well_as_pytorch_does(kernel, plain, make, shape) -> None:
    torch.manual_seed(0)
    given = make(*shape)
    exact = _everything(plain, [x.double() for x in given])
    found, allowed = _everything(kernel, given), _everything(plain, given)
    for x, y, z in zip(found, exact, allowed, strict=True):
        error, limit = (float((w - y).norm() / y.norm()) for w in (x, z))
        assert error <= 2 * limit + 1e-7


def test_modules_use_them_on_a_gpu_alone(monkeypatch) -> None:
    diagonal, shift = DiagonalSSM(3, 8), ShiftSSM(3, 8)
    assert not fused.can_discretize(diagonal.A_imag)
    assert not fused.can_filter(shift.B)
    plain = diagonal.system(), shift.taps()
    monkeypatch.setattr("h3lm.ssm.diagonal.can_discretize", lambda x: True)
    monkeypatch.setattr("h3lm.ssm.shift.can_filter", lambda x: True)
    if not GPU:
        system = diagonal.system()
        torch.testing.assert_close((system.a, system.b), (plain[0].a, plain[0].b))
        torch.testing.assert_close(shift.taps(), plain[1])
    zoh = DiagonalSSM(3, 8, discretization="zoh")
    a = torch.exp(
        torch.exp(zoh.log_dt)[:, None] * torch.complex(-zoh.log_neg_A_real.exp(), zoh.A_imag)
    )
    torch.testing.assert_close(zoh.system().a, a)


def test_kernels_are_checked_and_pytorch_takes_over(monkeypatch, caplog) -> None:
    from h3lm.ssm import parameters_triton

    assert fused._compare(DEVICE) == ""
    right = parameters_triton.taps_backward
    monkeypatch.setattr(
        parameters_triton, "taps_backward", lambda *x: tuple(1.1 * y for y in right(*x))
    )
    assert "dB of taps differs by" in fused._compare(DEVICE)
    fused.parameters_fault.cache_clear()
    assert not fused._works(DEVICE)
    assert "kernels of the parameters are off, PyTorch takes over" in caplog.text
    fused.parameters_fault.cache_clear()


@pytest.mark.filterwarnings("ignore")  # of the checker
def test_opcheck() -> None:
    given = [x.to(DEVICE).requires_grad_() for x in _system(2, 4)]
    torch.library.opcheck(torch.ops.h3lm.bilinear_fwd.default, given)
    given = [x.to(DEVICE).requires_grad_() for x in _shift(2, 6)]
    torch.library.opcheck(torch.ops.h3lm.shift_taps_fwd.default, given)


def test_copies_side_by_side_are_more_systems() -> None:
    for run, make in ((fused.bilinear, _system), (fused.shift_taps, _shift)):
        given = [x.to(DEVICE) for x in make(3, 6)]
        copies = [torch.stack([x, 2 * x]) for x in given]
        apart = torch.vmap(run)(*copies)
        for i, factor in enumerate((1, 2)):
            one = run(*(factor * x for x in given))
            pairs = zip(apart, one, strict=True) if isinstance(one, tuple) else [(apart, one)]
            for many, x in pairs:
                torch.testing.assert_close(many[i], x)
