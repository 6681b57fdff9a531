"""Which module convolves rows, with what size, and the check that stands before its first use.

`fft_launch`, `fft_long`, `toeplitz_triton` and `flashconv.fft` offer the same four functions:

    prepare(u, filter, size, backward) -> what of the filter is read
    forward(u, prepared, size, pre, post) -> y
    backward(dy, u, prepared, size, pre, post, data=, filters=) -> du, dpre, sums
    filter_gradients(u, sums, filter, size) -> gradients of the filter's parts

A Triton release may break a kernel, a GPU may be unlike those that we tested. So each size of an
algorithm runs once on a small problem beside torch.fft; where it fails, that takes over and says
so.
"""

import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from h3lm.flashconv import fft
from h3lm.flashconv.dispatch import (
    HOPPER_SHARED,
    ConvAlgorithm,
    Problem,
    capability,
    fft_lacks,
    longest_in_a_program,
)
from h3lm.flashconv.filters import Filter
from h3lm.flashconv.kernels.fft_size import SIZES, precision_of, size_for
from h3lm.ssm.first_use import first_use

logger = logging.getLogger("h3lm.flashconv")
# length of the rows that they are checked with, and of those of two chunks, of which 64 need others
TOEPLITZ_CHECK, TWO_CHUNKS = 304, 256
# bfloat16's operands and results are off by 2^-9 each, float16's results and the filter of its
# Toeplitz blocks by 2^-12: 3.6e-4 between both algorithms, where products not of pairs make 6e-4
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 4.5e-4, torch.float32: 1e-5}
FLOAT32 = ("df", "df_reverse", "dskip")  # sums of float32, in which only bfloat16 is seen
_found: dict[tuple[ConvAlgorithm, torch.device, torch.dtype, int], str] = {}  # by `fault`


class Plan(NamedTuple):
    """A module and the size that its functions are given."""

    kernels: ModuleType
    size: Any


def plan(
    algorithm: str,
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    taps: int,
    taps_reverse: int | None,
) -> Plan:
    """What runs for rows of a dtype and length and filters of so many taps.

    Raises:
        ValueError: if the algorithm is unknown, or does not take such rows.
    """
    large = capability(device) in HOPPER_SHARED
    if algorithm == "torch.fft":
        return Plan(fft, fft.transform_length(length, taps, taps_reverse))
    if algorithm == "Toeplitz blocks":
        from h3lm.flashconv.kernels import toeplitz_size, toeplitz_triton

        return Plan(toeplitz_triton, toeplitz_size.size_for(taps, taps_reverse, large))
    if algorithm == "block FFT":
        from h3lm.flashconv.kernels import fft_launch

        return Plan(fft_launch, size_for(length, precision_of(dtype)))
    if algorithm == "block FFT through memory":
        from h3lm.flashconv.kernels import fft_long

        return Plan(fft_long, fft_long.size_for(length, large, precision_of(dtype)))
    raise ValueError(f"no algorithm is called {algorithm!r}")


def works(algorithm: ConvAlgorithm, device: torch.device, dtype: torch.dtype, length: int) -> bool:
    """Whether an algorithm may be used; always in the interpreter and inside of a CUDA graph."""
    if device.type != "cuda":
        return True
    if algorithm == "Toeplitz blocks":
        length = TWO_CHUNKS if TWO_CHUNKS // 2 < length <= TWO_CHUNKS else TOEPLITZ_CHECK
    else:
        length = plan(algorithm, device, dtype, length, length, None).size.points
    if torch.cuda.is_current_stream_capturing():  # nothing can be tried there
        return not _found.get((algorithm, device, dtype, length))
    return not fault(algorithm, device, dtype, length)


def checks(device: torch.device) -> Iterator[tuple[ConvAlgorithm, torch.dtype, int]]:
    """What to call `fault` with: one for each size of the algorithms' kernels, or so."""
    found = capability(device)
    for dtype in TOLERANCE:
        if fft_lacks(dtype, Problem(length=1, capability=found)):
            continue
        most = longest_in_a_program(dtype, found)
        yield from (("block FFT", dtype, points) for points in SIZES if points <= most)
        if dtype != torch.float32:
            yield from (("Toeplitz blocks", dtype, n) for n in (TOEPLITZ_CHECK, TWO_CHUNKS))
            through_memory = [most << shift for shift in (1, 2, 3, 4, 7)]
            yield from (("block FFT through memory", dtype, n) for n in through_memory)


@first_use(logger, "{0} for rows of {3} of {2} is off, torch.fft takes over", _found)
def fault(algorithm: ConvAlgorithm, device: torch.device, dtype: torch.dtype, length: int) -> str:
    """What is wrong with an algorithm for rows of a length on this machine; empty if it works."""
    return _compare(algorithm, device, dtype, length)


def _compare(
    algorithm: ConvAlgorithm, device: torch.device, dtype: torch.dtype, length: int
) -> str:
    """What differs from torch.fft, of a plain filter and of one that reaches both ways."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    rows = 70 if length == TWO_CHUNKS else 3
    u, dy = (normal(rows, 2, length).to(dtype) for _ in range(2))
    f, back, skip = normal(2, 200), normal(2, 100), normal(2)
    for filter in (Filter(f), Filter(f, back, skip)):
        lags = filter.taps, filter.taps_reverse
        found, exact = (
            _everything(*plan(name, device, dtype, length, *lags), u, dy, filter)
            for name in (algorithm, "torch.fft")
        )
        for name, expected in exact.items():
            error = float((found[name] - expected).norm() / expected.norm())
            whole = name in FLOAT32 and dtype == torch.float16
            if not error < TOLERANCE[torch.float32 if whole else dtype]:
                return f"{name} differs by {error:.1e}"
    return ""


def _everything(
    kernels: ModuleType, size: Any, u: Tensor, dy: Tensor, filter: Filter
) -> dict[str, Tensor]:
    """Output and gradients, by their names."""
    prepared = kernels.prepare(u, filter, size, True)
    y = kernels.forward(u, prepared, size, None, None)
    du, _, sums = kernels.backward(dy, u, prepared, size, None, None, data=True, filters=True)
    grads = kernels.filter_gradients(u, sums, filter, size)._asdict()
    found = {"y": y, "du": du} | {f"d{name}": x for name, x in grads.items()}
    return {name: x.float() for name, x in found.items() if x is not None}
