"""What captures of CUDA graphs share."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_was_on = False


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep Python's collector away while something is captured, in any thread.

    What it would find may be an earlier graph, and to destroy one ends the capture in its thread:
    "operation failed due to a previous error during capture".
    """
    global _inside, _was_on
    with _lock:
        if not _inside:
            _was_on = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _was_on:
                gc.enable()
