"""Choices by what was measured: the nearest sizes, words, and a compiler that follows."""

import pytest
import torch

from h3lm.flashconv import measured
from h3lm.flashconv.dispatch import Problem, choose_method, conv_algorithm
from h3lm.flashconv.measured import Table

METHODS = {
    "kinds": ("dtype", "d_state", "states"),
    "sizes": ("length", "rows"),
    "ways": ("scan", "fft_chunks"),
    "whats": ("forward", "both"),
}
ALGORITHMS = {
    "kinds": ("gated",),
    "sizes": ("lags", "length", "rows"),
    "ways": ("blocks", "transforms"),
    "whats": ("forward", "backward"),
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
        ({"rows": 9}, torch.float16, "fft_chunks"),
        ({"rows": 7}, torch.float16, "scan"),
        ({"length": 1449}, torch.float16, "fft_chunks"),  # over sqrt(256 * 8192)
        ({"length": 1448}, torch.float16, "scan"),
        ({"length": 1, "backward": True}, torch.bfloat16, "fft_chunks"),
        ({"states": True, "num_modes": 33}, torch.float32, "fft_chunks"),
        ({"states": True, "num_modes": 33, "backward": True}, torch.float32, "scan"),
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
        names = [f"{way} {what}" for what in ALGORITHMS["whats"] for way in ALGORITHMS["ways"]]
        return where | dict(zip(names, times, strict=True))

    rows = [
        row(64, 64, 64, (1, 2), (1, 2)),
        row(64, 4096, 64, (1, 2), (2, 1)),
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
        ({"length": 512, "rows": 64}, False, True),
        ({"length": 512, "rows": 8}, False, False),
        ({"length": 512}, True, False),
        ({"length": 64, "gated": True}, False, False),  # not measured
    ],
    ids=str,
)
def test_the_faster_algorithm_of_the_nearest_measurement(change, backward, blocks):
    chosen = conv_algorithm(torch.bfloat16, Problem(**change), backward)
    assert chosen == ("Toeplitz blocks" if blocks else "block FFT")


@pytest.mark.usefixtures("_methods", "_algorithms")
def test_a_compiler_follows_with_unknown_sizes_in_few_graphs():
    device = torch.device("cuda")

    def run(x):
        problem = Problem(length=x.shape[-1], rows=x.shape[0])
        method = choose_method("auto", True, device, problem, x.dtype).backend
        blocks = conv_algorithm(torch.bfloat16, problem) == "Toeplitz blocks"
        return x + (1 if method == "scan" else 2) + (10 if blocks else 20)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    for B, L in ((2, 100), (64, 300), (2, 5000), (64, 5000), (3, 1000), (60, 900)):
        x = torch.zeros(B, 2, L)
        assert torch.equal(compiled(x), run(x))


def test_neighbours_that_agree_ask_nothing():
    rows = [method_row(length, rows, (1, 2), (1, 2)) for length in (256, 8192) for rows in (1, 8)]
    table = Table("H200", rows, **METHODS)

    class NoNumber:
        def __mul__(self, other):
            raise AssertionError("compared")

    kinds = ("bfloat16", "64", "no")
    assert table.faster(kinds, (NoNumber(), NoNumber()), "forward") == "scan"
    assert table.faster(("float32", "64", "no"), (1, 1), "forward") is None
