import pytest
import torch

from h3lm.ssm import DiagonalSSM, SharedModesSSM
from h3lm.ssm.shared_modes import TiedDiagonalSSM

# rates from very slow, where the hold would cancel, to those of which one step is a turn
RANGE = {"init": "lin", "dt_min": 1e-5, "dt_max": 1.0}
SYSTEMS = {
    f"{kind.__name__}, {rule}": lambda kind=kind, rule=rule: kind(
        6, 8, discretization=rule, **RANGE
    )
    for kind in (DiagonalSSM, TiedDiagonalSSM)
    for rule in ("bilinear", "zoh")
} | {"SharedModesSSM": lambda: SharedModesSSM(6, 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", SYSTEMS.values(), ids=SYSTEMS)
def test_real_modes_are_those_of_the_system_with_all_gradients(make, dtype):
    torch.manual_seed(0)
    ssm = make().to(dtype)
    if isinstance(ssm, DiagonalSSM):
        torch.nn.init.normal_(ssm.B)
    system = ssm.system()
    a, weight = (torch.complex(*pair) for pair in ssm.real_modes())
    plain = system.a, system.b * system.c
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for found, expected in zip((a.expand_as(plain[0]), weight), plain, strict=True):
        assert found.dtype == expected.dtype
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance * 1e-3)
    grads = [torch.randn_like(x) for x in plain]
    leaves = [p for name, p in ssm.named_parameters() if name != "D"]
    back, plain_back = (
        torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        for outputs in ((a.expand_as(plain[0]), weight), plain)
    )
    for found, expected in zip(back, plain_back, strict=True):
        assert torch.allclose(found, expected, rtol=30 * tolerance, atol=30 * tolerance)
