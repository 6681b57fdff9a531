"""CUDA graphs are captured while nothing lets go of another."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_captures = 0  # that are under way, in any thread
_was_enabled = False


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
    with _without_collection(), torch.cuda.graph(graph, **how):
        yield


@contextmanager
def _without_collection() -> Iterator[None]:
    global _captures, _was_enabled
    with _lock:
        if not _captures:
            _was_enabled = gc.isenabled()
            gc.disable()
        _captures += 1
    try:
        yield
    finally:
        with _lock:
            _captures -= 1
            if not _captures and _was_enabled:
                gc.enable()
