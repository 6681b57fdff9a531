"""Functions run in several processes that talk by gloo.

For scripts of their own, `python -m tests...`: a process that has run tests should not fork.
"""

import json
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, multiprocessing


def in_processes(count: int, function: Callable[[int], Any], backend: str = "gloo") -> list[Any]:
    """What each process's call with its rank returns, in order; the first failure is raised.

    With the backend "nccl" each has a GPU.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    queue = multiprocessing.get_context("fork").SimpleQueue()
    # Forked: torch is loaded once, not by each of them
    multiprocessing.start_processes(
        _run, (count, port, function, queue, backend), nprocs=count, start_method="fork"
    )
    return json.loads(queue.get())


def _run(
    rank: int,
    count: int,
    port: int,
    function: Callable[[int], Any],
    queue: Any,
    backend: str,
) -> None:
    torch.set_num_threads(1)
    # as torchrun tells it
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ["MASTER_ADDR"] = "localhost"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend, init_method=f"tcp://localhost:{port}", rank=rank, world_size=count
    )
    results = [None] * count
    distributed.all_gather_object(results, function(rank))
    if rank == 0:
        queue.put(json.dumps(results))
    distributed.barrier()
    distributed.destroy_process_group()
