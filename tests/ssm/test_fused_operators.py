"""The kernels that make chunk operators: against plain PyTorch, in Triton's interpreter."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from h3lm.ssm import fused_operators as fused
from h3lm.ssm.fused_operators import fused_operators
from h3lm.ssm.operators import DiagonalSystem

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
NAMES = ("a", "b", "c", "skip", "taps")


def _leaves(H: int, modes: int, D: int, n_taps: int) -> dict[str, Tensor]:
    angle = (torch.rand(H, modes) - 0.5) * 6.28
    a = torch.polar(0.5 + 0.4999 * torch.rand(H, modes), angle)
    a[0, 0] = 0  # its powers are 0, and so is its gradient
    b, c = (torch.randn(H, modes, dtype=torch.complex64) for _ in range(2))
    leaves = {"a": a, "b": b, "c": c, "skip": torch.randn(H)}
    if n_taps:
        leaves["taps"] = torch.randn(D, n_taps)
    return {name: x.to(DEVICE) for name, x in leaves.items()}


def _everything(leaves: dict[str, Tensor], T: int, fused: bool) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    given = [leaves.get(name) for name in NAMES]
    if fused:
        made = dict(zip("MKPFd", fused_operators(*given, T), strict=True))
    else:
        plain = DiagonalSystem(*given[:4]).chunk_operators(given[4], T)
        made = {n: getattr(plain, n) for n in "MKPF"} | {"d": plain.decay}
    made = {name: x for name, x in made.items() if x is not None}
    random = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for x in made.values():
        real = torch.view_as_real(x) if x.is_complex() else x
        weight = torch.randn(real.shape, generator=random).to(DEVICE, real.dtype)
        loss = loss + (real * weight).sum(dtype=torch.float64)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = made | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


@pytest.mark.parametrize(
    ("H", "modes", "D", "n_taps", "T"),
    [(2, 8, 4, 64, 64), (1, 12, 1, 1, 16), (2, 4, 2, 130, 64), (2, 32, 2, 0, 64)],
)
def test_kernels_equal_float64_as_well_as_pytorch_does(
    H: int, modes: int, D: int, n_taps: int, T: int
) -> None:
    leaves = _leaves(H, modes, D, n_taps)
    wide = {True: torch.complex128, False: torch.float64}
    exact = _everything({n: x.to(wide[x.is_complex()]) for n, x in leaves.items()}, T, False)
    found, plain = _everything(leaves, T, True), _everything(leaves, T, False)
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        error, allowed = (
            float((x[name] - expected).norm() / expected.norm()) for x in (found, plain)
        )
        assert error <= 2 * allowed + 1e-7, f"{name}: {error:.1e}, plain PyTorch {allowed:.1e}"
    assert found["P"].is_contiguous()
    if not GPU:
        assert found["da"][0, 0] == 0


def test_kernels_are_checked_and_pytorch_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from h3lm.ssm import operators_triton

    fused.operators_fault.cache_clear()
    assert fused.operators_fault(DEVICE) == ""
    right = operators_triton.make_backward

    def wrong(*given: Tensor) -> tuple[Tensor, ...]:
        da, *others = right(*given)
        return 1.01 * da, *others

    monkeypatch.setattr(operators_triton, "make_backward", wrong)
    fused.operators_fault.cache_clear()
    assert "da differs" in fused.operators_fault(DEVICE)
    assert "PyTorch takes over" in caplog.text
    assert not fused._works(DEVICE)
    fused.operators_fault.cache_clear()


@pytest.mark.filterwarnings("ignore")  # of the checker itself
def test_opcheck() -> None:
    leaves = _leaves(1, 4, 2, 3)
    pairs = [torch.view_as_real(leaves[n]).contiguous().requires_grad_() for n in "abc"]
    rest = [leaves[n].requires_grad_() for n in ("skip", "taps")]
    inputs = (*pairs, *rest, 16)
    torch.library.opcheck(torch.ops.h3lm.chunk_operators_fwd.default, inputs)


def test_copies_side_by_side_are_more_systems() -> None:
    leaves = _leaves(4, 4, 4, 3)
    given = [leaves[name] for name in NAMES]
    whole = fused_operators(*given, 16)
    copies = [x.unflatten(0, (2, 2)) for x in given]
    apart = torch.vmap(lambda *x: fused_operators(*x, 16))(*copies)
    for one, two in zip(whole, apart, strict=True):
        assert torch.equal(one, two.flatten(0, 1))


def test_kernels_known_to_be_wrong_stay_off_inside_of_a_cuda_graph(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(fused, "_found", {})
    assert fused._works(device)
    fused._found[device] = "wrong"
    assert not fused._works(device)
