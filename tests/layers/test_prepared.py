"""Layers that only have a filter keep it, and its spectrum, while that is safe."""

import pytest
import torch

from h3lm.flashconv import fft_library
from h3lm.layers.long_conv import LongConv
from h3lm.layers.s4 import S4

LAYERS = {
    "S4": lambda: S4(4, 8),
    "S4 both ways": lambda: S4(4, 8, bidirectional=True),
    "learned filter": lambda: LongConv(4, 40),
    "learned filters both ways": lambda: LongConv(4, 40, bidirectional=True),
}


@pytest.fixture
def spectra(monkeypatch):
    """Lengths of rows that a spectrum was made for."""
    made = []
    prepare = fft_library._prepare
    monkeypatch.setattr(
        fft_library, "_prepare", lambda u, *rest: made.append(u.shape[-1]) or prepare(u, *rest)
    )
    return made


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_eval_mode_makes_a_spectrum_once_and_says_the_same(name, spectra):
    layer, u = LAYERS[name]().eval(), torch.randn(2, 60, 4)
    exact = layer(u)[0]
    assert not spectra  # with gradients
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(layer(u)[0], exact, rtol=1e-4, atol=1e-5)
    assert spectra == [60]


@pytest.mark.parametrize("name", sorted(LAYERS))
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.train().eval(),
        lambda layer: layer.load_state_dict(
            {key: x * 1.1 for key, x in layer.state_dict().items()}
        ),
        lambda layer: [p.mul_(1.1) for p in layer.parameters()],
        lambda layer: layer.double().float(),
    ],
    ids=["mode", "load", "in place", "dtype"],
)
def test_what_was_kept_is_dropped_when_parameters_may_have_changed(name, change, spectra):
    layer, u = LAYERS[name]().eval(), torch.randn(2, 60, 4)
    with torch.no_grad():
        layer(u)
        change(layer)
        found = layer(u)[0]
    assert spectra == [60, 60]
    torch.testing.assert_close(found, layer(u)[0].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_nothing_is_kept_in_training(name, spectra):
    layer, u = LAYERS[name]().train(), torch.randn(2, 60, 4)
    with torch.no_grad():
        layer(u)
        for p in layer.parameters():
            p.data = p.data * 1.1  # as sharding engines do: no version is counted
        found = layer(u)[0]
    torch.testing.assert_close(found, layer(u)[0].detach(), rtol=1e-4, atol=1e-5)
    assert spectra == [60, 60]


def test_rows_of_several_lengths_share_a_filter(monkeypatch):
    layer = S4(4, 8).eval()
    calls = []
    system = type(layer.system())
    made = system.filter
    monkeypatch.setattr(system, "filter", lambda self, n: calls.append(n) or made(self, n))
    with torch.no_grad():
        for length in (64, 40, 50, 33):
            layer(torch.randn(2, length, 4))
    assert calls == [64]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("name", sorted(LAYERS))
@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(name, training, pytestconfig):
    if pytestconfig.getoption("jaxtyping_packages", None):
        pytest.skip("the compiler does not look through the type checker")
    layer, u = LAYERS[name]().train(training), torch.randn(2, 60, 4)
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, lambda x: layer(x)[0]):
        with torch.set_grad_enabled(training):
            y = run(u)
        parameters = list(layer.parameters())
        grads = torch.autograd.grad(y.square().sum(), parameters) if training else ()
        results.append([y, *grads])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
