"""What `bench conv` can do without a GPU: floors, ratios, refusals, the picture, layers."""

import math
from contextlib import nullcontext

import pytest
import torch

from h3lm.bench import conv
from h3lm.bench.registry import Shape, conv_shapes
from h3lm.bench.roofline import Ceilings, Work, conv_work
from h3lm.bench.scaling import TIME
from h3lm.errors import UserError
from h3lm.flashconv.kernels.fft_size import Size
from h3lm.layers.long_conv import LongConv
from h3lm.layers.s4 import S4

CEILINGS = Ceilings(bytes_per_ms=4.32e9, flop_per_ms=790e9)


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="bench conv times a GPU"):
        conv.run(tmp_path, print)


def test_shapes_are_one_size_up_to_one_row():
    shapes = conv_shapes()
    assert {shape.elements for shape in shapes[:-1]} == {100_663_296}
    assert shapes[-1].elements == 805_306_368


@pytest.mark.parametrize(
    ("N1", "N2", "forward", "both"),
    # the design's table: forward 0.131, 0.261, 0.392 ms, backward 0.196, 0.392, 0.587 ms
    [(64, 32, 0.131, 0.327), (128, 64, 0.261, 0.653), (128, 128, 0.392, 0.979)],
)
def test_floors_of_the_block_fft(N1, N2, forward, both):
    pytest.importorskip("triton")
    works = conv_work(Size(N1, N2, 4), 0)
    shape = Shape(64, 768, 2048)
    assert CEILINGS.floor_ms(shape.elements, works[0]) == pytest.approx(forward, abs=1e-3)
    assert conv.floor_of_both(CEILINGS, shape, *works) == pytest.approx(both, abs=2e-3)


def test_floors_of_toeplitz_blocks_and_gates():
    pytest.importorskip("triton")
    from h3lm.flashconv.kernels import toeplitz_size as toeplitz

    forward, backward = conv_work(toeplitz.ToeplitzSize(255), 2)
    assert forward == Work(bytes=8, flop=256 + 128)
    assert backward == Work(bytes=14, flop=3 * (256 + 128))
    assert CEILINGS.floor_ms(100_663_296, Work(4, 1)) == pytest.approx(0.093, abs=1e-3)


def test_ratios_are_over_the_fastest_peer_and_a_picture_is_drawn(tmp_path):
    shape = Shape(64, 768, 2048)
    times = {
        "h3lm": (0.5, 2.0, 1.0),
        "torch.fft": (4.0, 10.0, 4.0),
        "FlashFFTConv": (2.0, 8.0, 2.0),
    }
    rows = [
        {"shape": str(shape), "gated": "no", "dtype": "bfloat16", "path": path}
        | {"forward ms": f, TIME: b, conv.MEMORY: m}
        for path, (f, b, m) in times.items()
    ]
    found = conv._ratios(rows[0], rows[1:])
    assert found == {"forward ratio": 0.25, "both ratio": 0.25, "memory ratio": 0.25}
    rows[0]["both floor"] = 0.3
    rows += [rows[0] | {"dtype": "float16"}]
    conv.plot(tmp_path / "conv.png", [shape], rows)
    assert (tmp_path / "conv.png").stat().st_size > 1000


def test_time_limit_keeps_what_was_measured():
    said = []
    clock = conv._Clock(0.0)
    rows = conv._collect(({"shape": str(i)} for i in range(5)), clock, said.append)
    assert rows == [{"shape": "0"}]
    assert "out of time" in said[-1]


@pytest.mark.parametrize(
    ("replayed", "expected"),
    [((0.5, ""), {"step ms": 0.5}), ((math.nan, "no graph"), {"step ms": 1.0, "note": "no graph"})],
)
@pytest.mark.parametrize("make", [lambda: S4(8, 4), lambda: LongConv(8, 32)], ids=["S4", "learned"])
def test_the_training_step_that_is_timed_moves_the_layer(make, replayed, expected, monkeypatch):
    layer = make()
    monkeypatch.setattr(conv.measure, "median_ms", lambda call, *_, **__: float(call() is None))
    monkeypatch.setattr(conv.measure, "extra_bytes", lambda call: 0)
    monkeypatch.setattr(conv.measure, "replayed_ms", lambda call, repeats: replayed)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    before = [p.detach().clone() for p in layer.parameters()]
    row = conv.time_layer(layer, 32, "torch")
    assert row == expected | {"eager ms": 1.0, "peak GiB": 0.0}
    moved = [not torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True)]
    assert all(moved)
