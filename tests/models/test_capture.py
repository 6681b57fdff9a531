import gc
from contextlib import nullcontext

import pytest
import torch

from h3lm.models.capture import capturing


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_rests_while_a_graph_is_captured(enabled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: nullcontext())
    before, seen = gc.isenabled(), []

    def lost():
        with capturing(None, stream=None):
            seen.append(gc.isenabled())
            raise RuntimeError("lost")

    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(RuntimeError, match="lost"):
            lost()
        assert (seen, gc.isenabled()) == ([False], enabled)
    finally:
        (gc.enable if before else gc.disable)()


def test_the_collector_is_back_when_the_last_of_two_captures_is_done(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: nullcontext())
    one, other = capturing(None), capturing(None)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not gc.isenabled()
    other.__exit__(None, None, None)
    assert gc.isenabled()


@pytest.mark.gpu
def test_a_graph_in_a_cycle_does_not_spoil_the_next():
    x = torch.zeros(8, device="cuda")

    def captured():
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, capture_error_mode="thread_local"):
            for _ in range(50):
                held = [x.add_(1)]
                held.append(held)  # garbage for the collector, as it may be made anywhere
        return graph

    old = gc.get_threshold()
    gc.set_threshold(10, 2, 2)
    try:
        cycle = [captured()]
        cycle.append(cycle)
        del cycle
        captured().replay()
    finally:
        gc.set_threshold(*old)
    assert x.eq(50).all()
