"""S4's filters in few launches: in Triton's interpreter on a CPU, compiled on a GPU."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from h3lm.ssm import fused_filters as operator
from h3lm.ssm.dplr import DPLRSSM, DPLRSystem
from h3lm.ssm.fused_filters import fused_filters

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
NAMES = ("eigenvalues", "P", "B", "readouts", "dt")


def _leaves(H: int, d_state: int, readouts: int, dt_min: float = 1e-3) -> dict[str, Tensor]:
    ssm = DPLRSSM(H, d_state, dt_min=dt_min)
    with torch.no_grad():
        for parameter in (ssm.log_neg_A_real, ssm.A_imag, ssm.P, ssm.B):
            parameter.add_(0.1 * torch.randn_like(parameter))
        system = ssm.system()
        system.eigenvalues[0, 0] = -0.01 + 2j  # hardly decays
        more = torch.randn(readouts - 1, *system.c.shape, dtype=torch.complex64)
    c = torch.cat([system.c[None], more])
    tensors = (system.eigenvalues, system.P, system.B, c, system.dt)
    return {n: x.detach().to(DEVICE) for n, x in zip(NAMES, tensors, strict=True)}


def _everything(leaves: dict[str, Tensor], length: int, fused: bool) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    if fused:
        filters = fused_filters(*leaves.values(), length)
    else:
        eigenvalues, P, B, readouts, dt = leaves.values()
        system = DPLRSystem(eigenvalues, P, B, readouts[0], dt, torch.zeros_like(dt))
        filters = system.plain_filters(readouts, length)
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(filters.shape, generator=random).to(DEVICE, filters.dtype)
    grads = torch.autograd.grad(filters, list(leaves.values()), weight)
    found = {"filters": filters} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


@pytest.fixture(params=["powers", "generating function"])
def _algorithm(request, monkeypatch) -> None:
    monkeypatch.setattr(operator, "algorithm", lambda modes, length: request.param)


@pytest.mark.usefixtures("_algorithm")
@pytest.mark.parametrize(
    ("H", "d_state", "readouts", "length"),
    [(2, 4, 2, 64), (1, 6, 1, 1), (2, 2, 2, 7), (1, 40, 2, 300), (1, 8, 1, 517)],
)
def test_kernels_equal_float64_as_well_as_pytorch_does(
    H: int, d_state: int, readouts: int, length: int
) -> None:
    leaves = _leaves(H, d_state, readouts)
    wide = {True: torch.complex128, False: torch.float64}
    exact = _everything({n: x.to(wide[x.is_complex()]) for n, x in leaves.items()}, length, False)
    found, plain = _everything(leaves, length, True), _everything(leaves, length, False)
    for name, expected in exact.items():
        assert found[name].dtype == plain[name].dtype
        error, allowed = (
            float((x[name] - expected).norm() / expected.norm()) for x in (found, plain)
        )
        assert error <= 2 * allowed + 2e-8, f"{name}: {error:.1e}, plain PyTorch {allowed:.1e}"


@pytest.mark.usefixtures("_algorithm")
@pytest.mark.parametrize("length", [1, 2, 40])
def test_filters_both_ways(length: int, monkeypatch) -> None:
    ssm = DPLRSSM(3, 6).to(DEVICE)
    back = torch.randn(3, 3, dtype=torch.complex64, device=DEVICE, requires_grad=True)
    weight = torch.randn(2, 3, length, device=DEVICE)
    found = []
    for fused in (True, False):
        monkeypatch.setattr("h3lm.ssm.dplr.can_fuse", lambda *_, fused=fused: fused)
        filters = torch.stack(ssm.system().both_ways(back, length))
        leaves = [*ssm.parameters(), back]
        found.append([filters, *torch.autograd.grad(filters, leaves, weight)])
    assert not filters[1, :, 0].any()
    system = ssm.system()
    assert torch.allclose(filters[0, :, 0] - system.skip, system.filter(1)[:, 0], atol=1e-5)
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("H", "d_state", "length", "dt_min"),
    [
        (256, 4, 2048, 1e-3),
        (64, 64, 1000, 1e-3),
        (16, 64, 16384, 1e-4),
        (8, 32, 40000, 1e-3),
        (8, 128, 4096, 1e-3),
        (8, 128, 500, 1e-3),
    ],
)
def test_sizes_of_the_arena(H: int, d_state: int, length: int, dt_min: float) -> None:
    leaves = _leaves(H, d_state, 2, dt_min)
    wide = {True: torch.complex128, False: torch.float64}
    exact = _everything({n: x.to(wide[x.is_complex()]) for n, x in leaves.items()}, length, False)
    found, again = (_everything(leaves, length, True) for _ in range(2))
    plain = _everything(leaves, length, False)
    for name, expected in exact.items():
        error, allowed = (
            float((x[name] - expected).norm() / expected.norm()) for x in (found, plain)
        )
        assert error <= 2 * allowed + 2e-8, f"{name}: {error:.1e}, plain PyTorch {allowed:.1e}"
        assert torch.equal(found[name], again[name])


@pytest.mark.filterwarnings("ignore")  # of the checker itself
def test_opcheck() -> None:
    leaves = _leaves(1, 4, 2)
    pairs = [torch.view_as_real(leaves[n]).contiguous().requires_grad_() for n in NAMES[:4]]
    skip = torch.randn(1, device=DEVICE, requires_grad=True)
    for given in (skip, None):
        inputs = (*pairs, leaves["dt"].requires_grad_(), given, 9, given is not None)
        torch.library.opcheck(torch.ops.h3lm.dplr_filters_fwd.default, inputs)


def test_copies_side_by_side_are_more_systems() -> None:
    leaves = _leaves(4, 4, 2)
    whole = fused_filters(*leaves.values(), 16)
    copies = [x.unflatten(1 if n == "readouts" else 0, (2, 2)) for n, x in leaves.items()]
    apart = torch.vmap(lambda *x: fused_filters(*x, 16), (0, 0, 0, 1, 0))(*copies)
    assert torch.equal(whole, torch.cat(list(apart), 1))


def test_kernels_that_are_wrong_are_not_used(monkeypatch, caplog) -> None:
    from h3lm.ssm import filters_triton

    with torch.inference_mode():
        for kind in ("powers", "generating function"):
            assert not operator.fault.__wrapped__(DEVICE, kind, 8)
    assert torch.vmap(lambda x: x if operator.works(DEVICE, 2, 9) else -x)(torch.ones(2)).all()
    monkeypatch.setattr(filters_triton, "WRAPPED", 0.3)  # a circle on which much wraps around
    filters_triton.circle.cache_clear()
    operator.fault.cache_clear()
    assert "filters differs by" in operator.fault(DEVICE, "generating function", 8)
    assert "plain PyTorch takes over" in caplog.text
    operator.fault.cache_clear()
    filters_triton.circle.cache_clear()
    monkeypatch.setattr(operator, "has_kernels", lambda x: True)
    system = DPLRSSM(2, 4).to(DEVICE).system()
    for answer in (True, False):
        monkeypatch.setattr(operator, "works", lambda *_, answer=answer: answer)
        assert operator.can_fuse(system.eigenvalues, system.B, system.c[None], 9) is answer
    assert not operator.can_fuse(system.eigenvalues, system.B[None], system.c[None], 9)


def test_the_algorithm_is_chosen_by_states_and_taps() -> None:
    sizes = ((2, 9), (16, 99), (17, 1024), (32, 1025), (64, 256), (64, 257))
    chosen = [operator.algorithm(*at) == "powers" for at in sizes]
    assert chosen == [True, True, False, True, False, True]
