"""Steps of many jobs compiled at once, by processes of their own.

To compile a step takes most of a minute, of which Python has the larger part: jobs that train as
threads of one process would compile one after the other. What a process has compiled, others find
in the compiler's cache in seconds.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from typing import TypeVar

import torch._inductor.config

from h3lm.synthetics.ensemble import Ensemble, sizes_on_a_gpu

logger = logging.getLogger("h3lm.synthetics")
_CORES_EACH = 2  # of a process, besides those that it starts for its kernels
_OVER: list[Event] = []  # kept, since a process that still starts opens its own by name
J = TypeVar("J")


@contextmanager
def prepared(
    jobs: Sequence[J], size: Callable[[J], int], assemble: Callable[[J, int], Ensemble]
) -> Iterator[Callable[[J, float], bool]]:
    """Compile the steps of jobs, those of the sizes that they may shrink to last.

    Args:
        jobs: What will be compiled; each is handed to other processes.
        size: Models of a job.
        assemble: Makes so many of a job's models: a function of a module.

    Yields:
        Waits for a job so many seconds at most, and says whether it may begin: its step is
        compiled, or the process has failed, which is logged, and the job compiles for itself.
        Other jobs may begin at once.
    """
    cores = os.cpu_count() or 1
    workers = max(1, min(len(jobs), cores // _CORES_EACH))
    processes = get_context("spawn")
    over = processes.Event()
    _OVER.append(over)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=processes,
        initializer=_begin,
        initargs=(cores // workers, over),
    )
    first = {id(job): pool.submit(_prepare, assemble, job, size(job)) for job in jobs}
    for job in jobs:
        for places in sizes_on_a_gpu(size(job))[1:]:
            pool.submit(_prepare, assemble, job, places)

    def ready(job: J, seconds: float) -> bool:
        if id(job) not in first:
            return True
        try:
            first[id(job)].result(seconds)
        except TimeoutError:
            return False
        except (Exception, CancelledError) as error:  # whatever befell the process
            reason = str(error).strip().partition("\n")[0]
            logger.warning("not compiled ahead: %s: %s", type(error).__name__, reason)
        return True

    try:
        yield ready
    finally:
        over.set()  # first: a process that the pool ends waits for what the compiler has started
        pool.shutdown(wait=False, cancel_futures=True)


def _begin(threads: int, over: Event) -> None:
    torch._inductor.config.compile_threads = threads

    def end() -> None:
        over.wait()
        os._exit(0)  # what is still compiled is of no use to anyone

    threading.Thread(target=end, daemon=True).start()


def _prepare(assemble: Callable[[J, int], Ensemble], job: J, places: int) -> None:
    assemble(job, places).prepare()
