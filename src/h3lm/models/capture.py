"""CUDA graphs are captured while nothing lets go of another."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **how: Any) -> Iterator[None]:
    """`torch.cuda.graph`, with Python's garbage collector at rest.

    Graphs are in cycles with what replays them, so the collector is what destroys them; in the
    middle of a capture CUDA does not permit that, and the capture is lost.

    Args:
        graph: Holds what is launched in the block.
        how: Arguments of `torch.cuda.graph`.

    Raises:
        RuntimeError: Something was called that cannot be captured.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **how):
            yield
    finally:
        if enabled:
            gc.enable()
