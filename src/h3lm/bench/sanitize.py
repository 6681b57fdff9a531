"""Run the kernels of long convolution under NVIDIA's compute-sanitizer.

    python -m h3lm.bench.sanitize [--tools memcheck,racecheck]

One process runs small problems of every algorithm and size, forward and backward, with odd lengths,
gates and reverse filters; without PyTorch's cache of memory, so that an access behind a tensor is
one behind an allocation. A first pass without the tool fills Triton's cache.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from h3lm.flashconv import fft_conv, fft_library
from h3lm.flashconv.kernels.fft_size import SIZES

TOOLS = ("memcheck", "racecheck", "synccheck")
# B, D, L, taps, reverse taps, gated
Problem = tuple[int, int, int, int, int, bool]


def problems() -> Iterator[tuple[str, Problem]]:
    """An algorithm and a problem for it."""
    yield "Toeplitz blocks", (3, 2, 301, 301, 0, True)
    yield "Toeplitz blocks", (5, 2, 1000, 200, 30, False)
    for points in SIZES:
        yield "block FFT", (3, 2, points, points, 0, False)
        yield "block FFT", (3, 2, points - 3, points - 7, 5, True)
    for length in (9000, 40000, 131072):
        yield "block FFT through memory", (3, 2, length, length, 0, length == 9000)
    yield "block FFT through memory", (1, 2, 20011, 20011, 77, True)


def run_problems() -> None:
    """Run all problems, forward and backward, on the GPU."""
    for algorithm, problem in problems():
        with patch.object(fft_library, "conv_algorithm", return_value=algorithm):
            _run(*problem)
        sys.stdout.write(f"  ran {algorithm}, {problem}\n")
        sys.stdout.flush()


def _run(B: int, D: int, L: int, taps: int, taps_reverse: int, gated: bool) -> None:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=random).to("cuda", dtype).requires_grad_()

    f = normal(D, taps)
    back = normal(D, taps_reverse) if taps_reverse else None
    u, *gates = (normal(B, D, L, dtype=torch.bfloat16) for _ in range(3 if gated else 1))
    pre, post = gates or (None, None)
    y = fft_conv(u, f, pre_gate=pre, post_gate=post, f_reverse=back, backend="triton")
    leaves = [x for x in (u, f, pre, post, back) if x is not None]
    torch.autograd.grad(y, leaves, torch.ones_like(y))
    torch.cuda.synchronize()


def verdict(output: str) -> str:
    """The tool's own summary; what is said where it gave none."""
    found = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY.*)", output)
    return (
        found[-1] if found else "no summary: " + (output.strip().splitlines() or ["no output"])[-1]
    )


def main() -> int:
    """Run every tool; 1 if one of them found something or did not run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--problems", action="store_true", help="only run the problems, here")
    arguments = parser.parse_args()
    if arguments.problems:
        run_problems()
        return 0
    program = shutil.which("compute-sanitizer")
    if program is None or not torch.cuda.is_available():
        sys.stderr.write("sanitize needs a CUDA device and compute-sanitizer (CUDA toolkit)\n")
        return 1
    command = [sys.executable, "-m", "h3lm.bench.sanitize", "--problems"]
    subprocess.run(command, check=True)
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = 0
    for tool in arguments.tools.split(","):
        done = subprocess.run(
            [program, "--tool", tool, "--error-exitcode", "1", *command],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        failed |= done.returncode
        sys.stdout.write(f"{tool}: {verdict(done.stdout + done.stderr)}\n")
        sys.stdout.flush()
        if done.returncode:
            sys.stdout.write("\n".join((done.stdout + done.stderr).splitlines()[-60:]) + "\n")
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
