"""Time and memory of a call on a GPU, and what it ran on."""

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from h3lm.models.capture import capturing


def median_ms(
    call: Callable[[], object], repeats: int = 25, warm_up: int = 4, *, ahead: bool = False
) -> float:
    """Median time of a call by CUDA events, each call between two of them.

    Args:
        call: What is timed.
        repeats: How often.
        warm_up: Calls before that.
        ahead: The GPU waits until the host has queued what it can: the host's own time, which other
            processes on it may stretch, does not count.
    """
    began = time.perf_counter()
    for _ in range(warm_up):
        call()
    if ahead:
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / max(1, warm_up) * repeats
        torch.cuda._sleep(int(min(0.3, seconds) * 2e9))
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def replayed_ms(call: Callable[[], object], repeats: int = 25) -> tuple[float, str]:
    """Median time of a call replayed as a CUDA graph; NaN and why if it cannot be captured.

    It must have run before, on a stream of its own if it calls `backward`.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with capturing(graph):
            call()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return math.nan, f"launched, not captured: {str(error).splitlines()[0]}"
    return median_ms(graph.replay, repeats), ""


def extra_bytes(call: Callable[[], object]) -> int:
    """Peak memory that a call allocates on top of what is there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gpu_name() -> str:
    """The GPU's name as a part of a file name."""
    return torch.cuda.get_device_name().lower().replace(" ", "_")


def cpu_name() -> str:
    """The processor's model as Linux says it, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(command: str, *, cpu: bool = False) -> dict[str, str]:
    """GPU and driver (or processor and threads), versions, commit and the command."""
    if cpu:
        busy = f"{os.getloadavg()[0]:.1f} processes on {os.cpu_count()} cores, this one among them"
        where = {"cpu": cpu_name(), "threads": str(torch.get_num_threads()), "load": busy}
    else:
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        where = {"gpu": torch.cuda.get_device_name(), "driver": driver}
    return {
        **where,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": sys.version.split()[0],
        "commit": _output("git", "rev-parse", "HEAD"),
        "command": command,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    """The first line that a command prints: of several GPUs, the first one's."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return said.strip().partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
