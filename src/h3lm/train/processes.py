"""Several processes of one run: how they agree, and how they end."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed


def world_size() -> int:
    """Number of processes of the run, as `torchrun` says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process writes and prints for all."""
    return rank() == 0


def on_one_host() -> bool:
    """Whether all processes share a machine, as `torchrun` says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) == world_size()


def wait_for_all() -> None:
    """Go on when every process has come here."""
    summed(0.0)


def first_says(number: float) -> float:
    """The number that the first process has."""
    return summed(number if is_first() else 0.0)[0]


def summed(*numbers: float) -> list[float]:
    """Each number summed over all processes, in float64."""
    return _agree(numbers, distributed.ReduceOp.SUM)


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    return int(_agree((number,), distributed.ReduceOp.MAX)[0])


def _agree(numbers: tuple[float, ...], how: "distributed.ReduceOp.RedOpType") -> list[float]:
    told = torch.tensor(numbers, dtype=torch.float64)
    if distributed.is_initialized():
        distributed.all_reduce(told, op=how, group=_cpu_group())
    return told.tolist()


@functools.cache
def _cpu_group() -> "distributed.ProcessGroup | None":
    """Where numbers on the CPU are exchanged, so that agreeing never makes a GPU wait."""
    return None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")


@contextmanager
def one_voice() -> Iterator[None]:
    """Let only one process say why a run of several ends: the first that failed.

    The others, which fail alike or because they have lost it, leave with status 1 and no word.
    """
    if world_size() == 1:
        yield
        return
    try:
        yield
    except BaseException:
        if not _is_first_to_fail():
            raise SystemExit(1) from None
        raise
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _is_first_to_fail() -> bool:
    # torchrun's own store, which outlives the processes and is there before they have met
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        return store.add(f"h3lm/failed/{start}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # not started by torchrun, or the store is gone
        return is_first()
