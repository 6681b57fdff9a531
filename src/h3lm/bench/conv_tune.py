"""Time every size of the long convolution's kernels: what their tables of sizes were chosen by.

    python -m h3lm.bench.conv_tune [--minutes 3] [--lengths 2048,8192] [--dtype float16]

Kernels are compiled by many processes at once into Triton's cache, and then timed in this one.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from h3lm.bench.measure import median_ms
from h3lm.bench.registry import CONV_ELEMENTS, CORE_CHANNELS
from h3lm.bench.roofline import Ceilings
from h3lm.flashconv import fft
from h3lm.flashconv.filters import Filter
from h3lm.flashconv.kernels import fft_launch, fft_long, toeplitz_triton
from h3lm.flashconv.kernels.fft_long import LongRun, LongSize
from h3lm.flashconv.kernels.fft_size import SIZES, Size, precision_of, sizes
from h3lm.flashconv.kernels.toeplitz_size import Tile, ToeplitzSize

AnySize = Size | LongSize | ToeplitzSize
Variant = tuple[int, AnySize]


def variants(dtype: torch.dtype) -> Iterator[Variant]:
    """Row length and size of everything that is tried, the likeliest first."""
    precision = precision_of(dtype)
    if precision == "pairs":
        yield from _of_pairs()
        return
    yield from ((length, ToeplitzSize(length - 1)) for length in (256, 512, 1024))
    yield from SIZES.items()
    yield from ((length, fft_long.size_for(length, True, precision)) for length in _LONG)
    for points, size in SIZES.items():
        for change in _CHANGES:
            yield points, replace(size, **change)
    for length in _LONG:
        for inner in (Size(64, 32, 4), Size(64, 64, 4)):
            for cut in _CUTS:
                yield length, LongSize(length // inner.points, inner, **cut)
    for tile in _TILES:
        yield from ((length, ToeplitzSize(length - 1, tile=tile)) for length in (256, 512, 1024))


def _of_pairs() -> Iterator[Variant]:
    """What is tried for float16."""
    one = sizes("pairs")
    yield from one.items()
    long = [*_LONG, 524288]
    yield from ((length, fft_long.size_for(length, True, "pairs")) for length in long)
    yield from ((n, replace(size, apart=not size.apart)) for n, size in one.items() if n <= 4096)
    yield from ((n, replace(one[n], together=not one[n].together)) for n in (512, 4096, 8192))
    yield from ((n, replace(one[n], ahead=True)) for n in (4096, 8192))
    for length in long:
        for inner in (one[4096], one[8192]):
            outer = length // inner.points
            yield length, LongSize(outer, inner, 128 if outer <= 16 else 64, stages=2)


_LONG = [131072, 16384, 32768, 1048576]
_CUTS: list[dict[str, int]] = [
    {"columns": 64},
    {"columns": 128},
    {"columns": 128, "warps": 8},
    {"columns": 256, "warps": 8},
    {"columns": 128, "rows_out": 128, "rows_in": 128, "warps": 8},
    {"columns": 64, "rows_out": 128, "rows_in": 128, "warps": 8},
]
_CHANGES: list[dict[str, Any]] = [
    {"together": False},
    {"keep": True},
    {"programs": 8},
    {"programs": 16},
    {"ahead": True},
    {"registers": 168},
]
_TILES = [
    Tile(resident=False),
    Tile(filter_pieces=16),
    Tile(filter_pieces=64),
    Tile(stages=2),
    Tile(warps=4),
    Tile(T=64, warps=4),
]


def main() -> None:
    """Compile, check and time all variants; print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="stop after this long")
    parser.add_argument("--lengths", default="", help="only rows of these lengths")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    arguments = parser.parse_args()
    start = time.monotonic()
    lengths = [int(length) for length in arguments.lengths.split(",") if length]
    tried = dict.fromkeys(variants(getattr(torch, arguments.dtype)))
    todo = [variant for variant in tried if not lengths or variant[0] in lengths]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=context) as pool:
        compiled = list(pool.map(_compile, todo))
    _say(f"{len(todo)} variants compiled in {time.monotonic() - start:.0f} s")
    _say(f"{torch.cuda.get_device_name()}: {Ceilings.measured()}")
    _say("ms: filter, forward, backward, filter gradient, (steps of long rows) | errors y du df")
    for (length, size), fault in zip(todo, compiled, strict=True):
        if time.monotonic() - start > 60 * arguments.minutes:
            _say("out of time")
            break
        _say(f"{length:7d} {_name(size):32s} {fault or _timed(length, size)}")
    _say(f"all in {time.monotonic() - start:.0f} s")


def _name(size: AnySize) -> str:
    if isinstance(size, ToeplitzSize):
        t = size.tile
        stay = " resident" * t.resident
        return f"{t.T}x{t.K} p{t.pieces} w{t.warps} s{t.stages} f{t.filter_pieces} Toeplitz{stay}"
    if isinstance(size, LongSize):
        cut = f"c{size.columns} w{size.warps} o{size.rows_out} i{size.rows_in}"
        return f"{size.outer} {cut} * {_name(size.inner)}"
    kernels = "one" if size.together else "two"
    launch = f"w{size.warps} r{size.registers or '-'} p{size.programs}"
    more = " kept" * size.keep + " ahead" * size.ahead + " apart" * size.apart
    return f"{size.N1}x{size.N2} {launch} {kernels}{more}"


def _kernels(size: AnySize) -> ModuleType:
    if isinstance(size, ToeplitzSize):
        return toeplitz_triton
    return fft_long if isinstance(size, LongSize) else fft_launch


def _compile(variant: Variant) -> str:
    """Compile a variant by running it; what went wrong, or nothing."""
    length, size = variant
    try:
        _results(size, *_tensors(2, 16, length, size))
        torch.cuda.synchronize()
    except Exception as error:  # a variant that cannot run is a row of the table
        return f"{type(error).__name__}: {str(error)[:80]}"
    return ""


def _tensors(rows: int, channels: int, length: int, size: AnySize) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    inner = size.inner if isinstance(size, LongSize) else size
    pairs = isinstance(inner, Size) and inner.precision == "pairs"
    dtype = torch.float16 if pairs else torch.bfloat16
    u, dy = torch.randn(2, rows, channels, length, device="cuda").to(dtype).unbind()
    decay = torch.exp(-torch.arange(length, device="cuda") * 4.0 / length)
    return u, dy, torch.randn(channels, length, device="cuda") * decay


def _results(size: AnySize, u: Tensor, dy: Tensor, f: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient of the rows and of the filter."""
    kernels = _kernels(size)
    spectrum = kernels.prepare(u, Filter(f), size, True)
    y = kernels.forward(u, spectrum, size, None, None)
    du, _, sums = kernels.backward(dy, u, spectrum, size, None, None, data=True, filters=True)
    return y, du, kernels.filter_gradients(u, sums, Filter(f), size).f


def _errors(length: int, size: AnySize) -> list[float]:
    """Relative errors of the results against float64."""
    u, dy, f = _tensors(2, 16, length, size)
    found = _results(size, u, dy, f)
    leaves = [x.double().requires_grad_() for x in (u, f)]
    exact = fft.fft_conv(*leaves)
    grads = torch.autograd.grad(exact, leaves, dy.double())
    return [
        float((a.double() - b).norm() / b.norm())
        for a, b in zip(found, (exact.detach(), *grads), strict=True)
    ]


def _timed(length: int, size: AnySize) -> str:
    try:
        errors = _errors(length, size)
    except Exception as error:  # as in `_compile`
        return f"{type(error).__name__}: {str(error)[:80]}"
    rows = max(1, CONV_ELEMENTS // (CORE_CHANNELS * length))
    u, dy, f = _tensors(rows, CORE_CHANNELS, length, size)
    kernels = _kernels(size)
    spectrum = kernels.prepare(u, Filter(f), size, True)

    def back() -> Tensor:
        return kernels.backward(dy, u, spectrum, size, None, None, data=True, filters=True)[2]

    sums = back()
    calls: list[Callable[[], object]] = [
        lambda: kernels.prepare(u, Filter(f), size, True),
        lambda: kernels.forward(u, spectrum, size, None, None),
        back,
        lambda: kernels.filter_gradients(u, sums, Filter(f), size),
    ]
    if isinstance(size, LongSize):
        run = LongRun(u, size)
        exponents = run.exponents(u, None)
        planes, y = run.outward(u, None, exponents), torch.empty_like(u)
        more = planes.clone()
        calls += [
            lambda: run.exponents(u, None),
            lambda: run.outward(u, None, exponents),
            lambda: run.convolve(planes, spectrum),
            lambda: run.inward(planes, y, spectrum.unscale, exponents=exponents),
            lambda: run.convolve(planes, spectrum, conjugate=True),
            lambda: run.filter_planes(planes, more, exponents, exponents, spectrum),
        ]
    repeats = 3 if length > 1 << 19 else 9
    times = " ".join(f"{median_ms(call, repeats=repeats, warm_up=1):7.3f}" for call in calls)
    return f"{times} | {' '.join(f'{error:.1e}' for error in errors)}"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
