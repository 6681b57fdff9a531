"""Run kernels under NVIDIA's compute-sanitizer, and write down what it found.

    python -m h3lm.bench.sanitize [--out FOLDER] [--program FILE] [--kernels PATTERN] [--tools LIST]

A name stands for small problems of some kernels, forward and backward, whose results are compared
with plain PyTorch, so that an empty run cannot pass. `NAMES` holds those of long convolution; a
program is a Python file with a dictionary `NAMES` of its own. Every name runs in a process of its
own: once without the tool, which fills Triton's cache, then under each tool, without PyTorch's
cache of memory, so that an access behind a tensor is one behind an allocation.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from h3lm.bench import measure, report
from h3lm.flashconv import fft_conv, fft_library
from h3lm.flashconv.kernels.fft_size import SIZES

NOTES = (
    "compute-sanitizer on small problems of each family of kernels, forward and backward with "
    "their optional inputs, results compared with plain PyTorch in the same processes; without "
    "PyTorch's cache of memory. Errors that PyTorch meets when it asks the driver for what it may "
    "not have are not counted (--report-api-errors no): they are none of a kernel's. Seconds are "
    "those of a process, many of them side by side."
)
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": (), "synccheck": ()}
# Triton starts programs of its own: the tool has to find the one that uses the GPU, and to wait
FOLLOW = ("--target-processes", "all", "--launch-timeout", "100", "--error-exitcode", "1")
ALLOWED = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}
RIGHT = "right, "  # and what was run
NONE = "none"  # in the place of a tool
SAME = ("gpu", "driver", "torch", "triton", "compute-sanitizer")  # of runs that share a report


class Problem(NamedTuple):
    """One convolution.

    Attributes:
        algorithm: Of `dispatch.ConvAlgorithm`.
        B, D, L: Of the rows.
        taps, taps_reverse: Of the filters; 0 for no reverse one.
        options: Of "g" gates, "s" skip, "c" circular.
        dtype: Of the rows.
    """

    algorithm: str
    B: int
    D: int
    L: int
    taps: int
    taps_reverse: int = 0
    options: str = ""
    dtype: torch.dtype = torch.bfloat16


def problems() -> Iterator[tuple[str, Problem]]:
    """Names and their problems: each algorithm and size, full and ragged."""
    blocks, fft = "Toeplitz blocks", "block FFT"
    yield f"conv: {blocks}", Problem(blocks, 3, 2, 301, 301, options="gs")
    yield f"conv: {blocks}", Problem(blocks, 5, 2, 1000, 200, 30, "s")
    yield f"conv: {blocks}", Problem(blocks, 70, 2, 250, 250, options="s")
    yield f"conv: {blocks}", Problem(blocks, 2, 2, 130, 70, 20, "c")
    yield f"conv: {blocks}, float16", Problem(blocks, 3, 2, 301, 301, 30, "s", torch.float16)
    for points in SIZES:
        name = f"conv: {fft}, {points}"
        yield name, Problem(fft, 3, 2, points, points)
        yield name, Problem(fft, 3, 2, points - 3, points - 7, 5, "gs")
    yield f"conv: {fft}, 512", Problem(fft, 2, 2, 300, 300, 7, "c")
    yield f"conv: {fft}, float32", Problem(fft, 3, 2, 700, 600, 5, "gs", torch.float32)
    for length in (1500, 4096, 8192):
        yield f"conv: {fft}, float16", Problem(fft, 3, 2, length, length, 5, "gs", torch.float16)
    memory = f"{fft} through memory"
    for length, options in ((9000, "gs"), (300_000, "")):  # inner transforms of their own
        long = Problem(memory, 2, 2, length, min(length, 20_000), 77, options, torch.float16)
        yield f"conv: {memory}, float16", long
    for length in (9000, 40000, 131072):
        yield f"conv: {memory}", Problem(memory, 3, 2, length, length, 0, "g" * (length == 9000))
    yield f"conv: {memory}", Problem(memory, 1, 2, 20011, 20011, 77, "gs")


def run_problem(problem: Problem) -> None:
    """Run one, forward and backward, and compare everything with torch.fft in float64.

    Raises:
        AssertionError: if a result is wrong.
    """
    with patch.object(fft_library, "conv_algorithm", return_value=problem.algorithm):
        found = _results(problem, exact=False)
    for name, expected in _results(problem, exact=True).items():
        error = float((found[name].cpu().double() - expected).norm() / expected.norm())
        assert error < ALLOWED[problem.dtype], f"{problem}: {name} is off by {error:.1e}"


def _results(problem: Problem, exact: bool) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(shape, generator=random).to(dtype)
        return (x.double() if exact else x.cuda()).requires_grad_()

    B, D, L, dtype = problem.B, problem.D, problem.L, problem.dtype
    leaves = {"u": normal(B, D, L, dtype=dtype), "f": normal(D, problem.taps)}
    if problem.taps_reverse:
        leaves["f_reverse"] = normal(D, problem.taps_reverse)
    if "g" in problem.options:
        leaves |= {name: normal(B, D, L, dtype=dtype) for name in ("pre_gate", "post_gate")}
    if "s" in problem.options:
        leaves["skip"] = normal(D)
    dy = normal(B, D, L, dtype=dtype).detach()
    mode = "circular" if "c" in problem.options else "causal"
    y = fft_conv(**leaves, mode=mode, backend="torch" if exact else "triton")
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def _run_all(of_a_name: list[Problem]) -> None:
    for problem in of_a_name:
        run_problem(problem)


def _names() -> dict[str, Callable[[], None]]:
    grouped: dict[str, list[Problem]] = {}
    for name, problem in problems():
        grouped.setdefault(name, []).append(problem)
    return {name: partial(_run_all, group) for name, group in grouped.items()}


NAMES = _names()


class Kernels(NamedTuple):
    """A name and the program that knows it.

    Attributes:
        name: Of some kernels' problems.
        program: A Python file with `NAMES`; None for this module.
    """

    name: str
    program: str | None = None

    def command(self) -> list[str]:
        """What runs it."""
        program = [] if self.program is None else ["--program", self.program]
        return [sys.executable, "-m", "h3lm.bench.sanitize", "--run", self.name, *program]


def every_name(programs: list[str], pattern: str) -> list[Kernels]:
    """The names of this module and of programs that match a pattern."""
    every = [Kernels(name) for name in NAMES]
    for program in programs:
        every += [Kernels(name, program) for name in _names_of(program)]
    return [kernels for kernels in every if fnmatch(kernels.name, pattern)]


def _names_of(program: str | None) -> dict[str, Callable[[], None]]:
    return NAMES if program is None else runpy.run_path(program)["NAMES"]


class Ran(NamedTuple):
    """What became of a process.

    Attributes:
        verdict: The tool's summary, or why there is none.
        clean: Whether nothing was found.
        output: All that was said.
        seconds: It took.
    """

    verdict: str
    clean: bool
    output: str
    seconds: float

    def row(self, kernels: Kernels, tool: str) -> report.Row:
        """A line of the report."""
        return {
            "kernels": kernels.name, "tool": tool, "verdict": self.verdict,
            "clean": "yes" if self.clean else "NO", "seconds": round(self.seconds, 1),
        }  # fmt: skip


def run_under(prefix: list[str], kernels: Kernels, end: float) -> Ran:
    """Run kernels behind a tool, or alone if there is none; not beyond a time of `monotonic`."""
    start = time.monotonic()
    if start >= end:
        return Ran("not run: out of time", False, "", 0.0)
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if prefix else {})
    # a session of its own: the tool's child would outlive the tool
    process = subprocess.Popen(
        [*prefix, *kernels.command()], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=end - start)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Ran("not done: out of time", False, "", time.monotonic() - start)
    said, clean = verdict(output, RIGHT + kernels.name, tool=bool(prefix))
    clean = clean and process.returncode == 0
    return Ran(said, clean, output, time.monotonic() - start)


def verdict(output: str, right: str, tool: bool = True) -> tuple[str, bool]:
    """The tool's summaries, and whether they are clean and the program came to its last line."""
    last = (output.strip().splitlines() or ["no output"])[-1]
    if right not in output.splitlines():
        return f"the program did not end: {last}", False
    if not tool:
        return "right", True
    found = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY.*)", output)
    if not found:
        return f"no summary: {last}", False
    clean = all(re.search(r"SUMMARY: 0 (errors|hazards)", summary) for summary in found)
    return "; ".join(dict.fromkeys(summary.strip() for summary in found)), clean


def sanitize(
    program: str, every: list[Kernels], tools: list[str], end: float, processes: int
) -> Iterator[tuple[Kernels, str, Ran]]:
    """Run each name without a tool, and if that is right under each tool, side by side."""
    with ThreadPoolExecutor(processes) as pool:
        running = {pool.submit(run_under, [], kernels, end): (kernels, NONE) for kernels in every}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                (kernels, tool), ran = running.pop(future), future.result()
                if tool != NONE or not ran.clean:
                    yield kernels, tool, ran
                    continue
                for tool in tools:
                    prefix = [program, "--tool", tool, *TOOLS[tool], *FOLLOW]
                    running[pool.submit(run_under, prefix, kernels, end)] = (kernels, tool)


def main() -> int:
    """Run every tool; 1 if one of them found something or did not run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the report; none is written without")
    parser.add_argument("--program", action="append", default=[], help="file with more NAMES")
    parser.add_argument("--kernels", default="*", help="only names like this")
    parser.add_argument("--tools", default=",".join(TOOLS), help="some of the three")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after so many")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--run", help="only run this name, here")
    given = parser.parse_args()
    if given.run:
        _names_of(given.program[0] if given.program else None)[given.run]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        sys.stdout.write(f"{RIGHT}{given.run}\n")
        return 0
    tools = given.tools.split(",")
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        parser.error(f"no tool is called {unknown[0]}: take some of {', '.join(TOOLS)}")
    program = shutil.which("compute-sanitizer")
    if program is None or not torch.cuda.is_available():
        sys.stderr.write("sanitize needs a CUDA device and compute-sanitizer (CUDA toolkit)\n")
        return 1
    every = every_name(given.program, given.kernels)
    if not every:
        parser.error(f"no kernels are called like {given.kernels}")
    end = time.monotonic() + 60 * given.minutes
    rows, failed = [], 0
    for kernels, tool, ran in sanitize(program, every, tools, end, given.processes):
        rows.append(ran.row(kernels, tool))
        sys.stdout.write(f"{kernels.name}, {tool}: {ran.verdict} ({ran.seconds:.0f} s)\n")
        if not ran.clean:
            failed += 1
            sys.stdout.write("\n".join(ran.output.splitlines()[-60:]) + "\n")
        sys.stdout.flush()
        if given.out is not None:  # each time: what was found stays, whatever ends the run
            more = "".join(f" --program {program}" for program in given.program)
            environment = measure.environment(f"python -m h3lm.bench.sanitize{more}")
            write(given.out, environment | {"compute-sanitizer": _version(program)}, rows)
    sys.stdout.write(f"{len(rows) - failed} of {len(rows)} clean\n")
    return int(failed > 0)


def write(folder: Path, environment: dict[str, str], rows: list[report.Row]) -> Path:
    """Write the report; what earlier runs in a like environment said of other kernels stays."""
    name = f"sanitizer_{measure.gpu_name()}"
    said = {(row["kernels"], row["tool"]): row for row in rows}
    path = folder / f"{name}.json"
    if path.exists():
        before = json.loads(path.read_text())
        if all(before["environment"].get(key) == environment[key] for key in SAME):
            said = {(row["kernels"], row["tool"]): row for row in before["rows"]} | said
    return report.write(name, folder, environment, NOTES, [said[key] for key in sorted(said)])


@cache
def _version(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"Version (\S+)", said.stdout)
    return found[1] if found else "unknown"


if __name__ == "__main__":
    sys.exit(main())
