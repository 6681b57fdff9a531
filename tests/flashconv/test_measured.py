"""Choices by what was measured: the nearest sizes, words, and a compiler that follows."""

import pytest
import torch

from h3lm.flashconv import measured, op
from h3lm.flashconv.dispatch import Problem, choose_method, conv_algorithm
from h3lm.flashconv.measured import Table
from h3lm.ssm import DiagonalSSM
from h3lm.ssm.state_blocks import advance

METHODS = {
    "kinds": ("dtype", "d_state", "states"),
    "sizes": ("length", "rows"),
    "ways": ("scan", "fft_chunks"),
    "within": 4.0,
}
ALGORITHMS = {
    "kinds": ("gated",),
    "sizes": ("lags", "length", "rows"),
    "ways": ("blocks", "transforms"),
}


def method_row(length, rows, forward, both, dtype="bfloat16", d_state="64", states="no"):
    kinds = {"dtype": dtype, "d_state": d_state, "states": states}
    times = {
        f"{way} {what}": ms
        for what, pair in (("forward", forward), ("both", both))
        for way, ms in zip(METHODS["ways"], pair, strict=True)
    }
    return kinds | {"length": str(length), "rows": str(rows)} | times


@pytest.fixture
def _methods(monkeypatch):
    """Chunks win from 8192 positions on, where there are many rows, and always backward."""
    rows = [
        method_row(256, 1, (1.0, 2.0), (2.0, 1.0)),
        method_row(256, 64, (1.0, 2.0), (2.0, 1.0)),
        method_row(8192, 1, (1.0, 2.0), (2.0, 1.0)),
        method_row(8192, 64, (2.0, 1.0), (2.0, 1.0)),
        method_row(8192, 1, (2.0, 1.0), (1.0, 2.0), "float32", "128", "yes"),
    ]
    monkeypatch.setattr(measured, "METHODS", {9: Table("H200", rows, **METHODS)})


@pytest.mark.usefixtures("_methods")
@pytest.mark.parametrize(
    ("change", "dtype", "chosen"),
    [
        ({}, torch.bfloat16, "fft_chunks"),
        ({"rows": 17}, torch.float16, "fft_chunks"),
        ({"rows": 15}, torch.float16, "scan"),  # not within four of a measurement
        ({"rows": 1}, torch.float16, "scan"),
        ({"length": 2048}, torch.float16, "fft_chunks"),
        ({"gated": True}, torch.bfloat16, "scan"),  # not measured
        ({"gated": True, "backward": True}, torch.float16, "scan"),
        ({"length": 1024}, torch.float16, "scan"),  # as near to 256 in ratio: the smaller
        ({"length": 1000, "backward": True}, torch.bfloat16, "fft_chunks"),
        ({"length": 63, "backward": True}, torch.bfloat16, "scan"),
        ({"states": True, "num_modes": 33, "rows": 2}, torch.float32, "fft_chunks"),
        (
            {"states": True, "num_modes": 33, "rows": 2, "gated": True},
            torch.float32,
            "fft_chunks",
        ),
        ({"states": True, "num_modes": 33, "rows": 2, "backward": True}, torch.float32, "scan"),
        ({"states": True}, torch.bfloat16, "scan"),  # no such kinds were measured
        ({"capability": (8, 0)}, torch.bfloat16, "scan"),  # nor such a GPU
    ],
    ids=str,
)
def test_the_faster_method_of_the_nearest_measurement(change, dtype, chosen):
    problem = Problem(**{"length": 8192} | change)
    choice = choose_method("auto", True, torch.device("cuda"), problem, dtype)
    assert choice.backend == chosen


@pytest.mark.usefixtures("_methods")
def test_the_choice_says_what_was_measured():
    choice = choose_method("auto", True, torch.device("cuda"), Problem(length=9999), torch.bfloat16)
    expected = "measured forward, ms: scan 2, fft_chunks 1 (length 8192, rows 64, H200)"
    assert choice.reason == expected


@pytest.fixture
def _algorithms(monkeypatch):
    def row(lags, length, rows, forward, backward, gated="no"):
        where = {"gated": gated, "lags": str(lags), "length": str(length), "rows": str(rows)}
        times = (*forward, *backward)
        whats = ("forward", "backward")
        names = [f"{way} {what}" for what in whats for way in ALGORITHMS["ways"]]
        return where | dict(zip(names, times, strict=True))

    rows = [
        row(64, 64, 64, (1, 2), (1, 2)),
        row(64, 4096, 64, (1, 2), (3, 1)),
        row(256, 4096, 64, (1, 2), (3, 2)),
        row(1024, 1024, 8, (2, 1), (2, 1)),
        row(1024, 1024, 64, (1, 2), (2, 1)),
    ]
    monkeypatch.setattr(measured, "ALGORITHMS", {9: Table("H200", rows, **ALGORITHMS)})


@pytest.mark.usefixtures("_algorithms")
@pytest.mark.parametrize(
    ("change", "backward", "blocks"),
    [
        ({"length": 64}, True, True),
        ({"length": 4096, "lags": 64}, False, True),
        ({"length": 4096, "lags": 64}, True, False),
        ({"length": 4096, "lags": 256}, True, False),
        ({"length": 4096, "lags": 512}, False, True),  # not as rows of 1024 with 8 rows
        ({"length": 4096, "lags": 512, "rows": 8}, False, False),
        ({"length": 1024, "rows": 64}, False, True),
        ({"length": 1024, "rows": 8}, False, False),
        ({"length": 1024}, True, False),
        ({"length": 64, "gated": True}, False, False),  # not measured
    ],
    ids=str,
)
def test_the_faster_algorithm_of_the_nearest_measurement(change, backward, blocks):
    chosen = conv_algorithm(torch.bfloat16, Problem(**change), backward)
    assert chosen == ("Toeplitz blocks" if blocks else "block FFT")


@pytest.mark.usefixtures("_algorithms")
@pytest.mark.parametrize(("lags", "blocks"), [(64, False), (256, True)])
def test_transforms_of_float16_are_slower_than_measured(lags, blocks):
    chosen = conv_algorithm(torch.float16, Problem(length=4096, lags=lags), backward=True)
    assert chosen == ("Toeplitz blocks" if blocks else "block FFT")


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({"length": 65536, "lags": 512, "rows": 2}, (True, True)),
        ({"length": 65536, "lags": 384, "rows": 2}, (True, True)),
        ({"length": 65536, "lags": 128, "rows": 2}, (True, True)),
        ({"length": 65536, "lags": 128, "rows": 2, "gated": True}, (True, True)),
        ({"length": 64, "lags": 64, "rows": 64, "gated": True}, (True, True)),
        ({"length": 512, "lags": 64, "rows": 64, "gated": True}, (True, True)),
        ({"length": 4096, "lags": 384, "rows": 8}, (True, False)),
        ({"length": 512, "rows": 8}, (False, False)),
        ({"length": 256, "rows": 512}, (True, True)),
        ({"length": 1024, "rows": 128}, (True, False)),
        ({"length": 2048, "rows": 64}, (False, False)),
        ({"length": 8192, "rows": 16}, (False, False)),
        ({"length": 16384, "lags": 1024, "rows": 8}, (True, True)),
        ({"length": 16384, "rows": 1}, (False, False)),
        ({"length": 32768, "rows": 4}, (False, False)),
        ({"length": 65536, "lags": 4096, "rows": 2}, (False, False)),
        ({"length": 131072, "rows": 1}, (False, False)),
        ({"length": 131072, "rows": 1, "gated": True}, (False, False)),
        ({"length": 1 << 20, "rows": 1}, (False, False)),
    ],
    ids=str,
)
def test_what_the_committed_table_says_of_hopper(change, blocks):
    problem = Problem(**change)
    found = [conv_algorithm(torch.bfloat16, problem, backward) for backward in (False, True)]
    assert tuple(name == "Toeplitz blocks" for name in found) == blocks


@pytest.mark.usefixtures("_methods")
def test_a_compiler_is_asked_nothing_about_unknown_sizes(pytestconfig):
    if pytestconfig.getoption("jaxtyping_packages", None):
        pytest.skip("the compiler does not see through checks of shapes")
    device = torch.device("cuda")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(x):
        problem = Problem(length=x.shape[-1], rows=x.shape[0], backward=True)
        return x + (choose_method("auto", True, device, problem, x.dtype).backend == "scan")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    for B, L in ((2, 100), (64, 300), (2, 5000), (64, 8192)):
        x = torch.zeros(B, 7, L)
        assert torch.equal(compiled(x), x + 1)
    assert len(graphs) == 1


@pytest.mark.parametrize("part", ["a", "b", "c", "skip"])
def test_gradients_of_any_part_of_a_system_count(part):
    u, system = torch.randn(1, 3, 9), DiagonalSSM(3, 4).requires_grad_(False).system()
    assert not op._needs_gradients(u, None, system)
    getattr(system, part).requires_grad_()
    assert op._needs_gradients(u, None, system)
    with torch.no_grad():
        assert not op._needs_gradients(u, None, system)


@pytest.mark.parametrize("rows", [(), (2,), (2, 5)])
def test_a_power_takes_states_of_any_batch(rows):
    power, state = torch.randn(3, 4, 4), torch.randn(*rows, 3, 4)
    expected = torch.einsum("hij,...hj->...hi", power, state)
    torch.testing.assert_close(advance(power, state), expected)


def test_the_choice_of_a_method_is_told_of_gates(monkeypatch):
    told, right = [], op.choose_method
    monkeypatch.setattr(
        op, "choose_method", lambda *asked: (told.append(asked[3]), right(*asked))[1]
    )
    u, system = torch.randn(1, 3, 9), DiagonalSSM(3, 4).system()
    op.ssm_conv(u, system)
    op.ssm_conv(u, system, post_gate=u)
    assert [problem.gated for problem in told] == [False, True]
