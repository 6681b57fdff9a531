"""Captures of CUDA graphs are not disturbed by what the collector would destroy."""

import gc

import pytest
import torch

from h3lm.models.capture import without_collection
from h3lm.synthetics.ensemble import capture
from h3lm.train.graphs import record


def test_the_collector_is_back_when_the_last_capture_is_done():
    assert gc.isenabled()
    with without_collection():
        with without_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="ours"), without_collection():
        raise RuntimeError("ours")
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["train", "lab"])
def test_a_graph_that_is_garbage_ends_no_capture(way):
    x = torch.zeros(4, device="cuda")
    held: list[object] = []

    def work():
        if torch.cuda.is_current_stream_capturing():
            held.clear()  # nothing reaches the earlier graph now but itself
        for _ in range(200):
            [[] for _ in range(20)]  # what the collector counts
            x.add_(1)
        return x

    earlier = torch.cuda.CUDAGraph()
    with torch.cuda.graph(earlier):
        x.add_(1)
    cycle: list[object] = [earlier]
    cycle.append(cycle)
    held.append(cycle)
    del earlier, cycle
    thresholds = gc.get_threshold()
    gc.set_threshold(10, 1, 1)
    try:
        if way == "train":
            replay = record(work, None)[0].replay
        else:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                replay = capture(work, stream)
    finally:
        gc.set_threshold(*thresholds)
    assert not held
    torch.cuda.synchronize()
    before = x.clone()
    replay()
    torch.cuda.synchronize()
    assert torch.equal(x, before + 200)
