"""Time every size of the kernels of a decoding step: what their tables of sizes were chosen by.

    python -m h3lm.bench.generate_tune [--minutes 3] [--only core,attend,product] [--steps]

Kernels are compiled by many processes at once into Triton's cache; then each is checked and timed
in this one, under a CUDA graph over as many layers as exceed the L2 cache, beside the libraries'.
Products in parts are timed without the last sum, which the norm behind them makes. `--steps` then
takes the sizes that are right and chooses among them by the time of whole steps, where kernels
overlap one another: that is what the tables hold.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from h3lm.bench.generate import filled_decoder, graph_ms, make_model
from h3lm.bench.measure import median_ms
from h3lm.bench.roofline import Ceilings
from h3lm.flashconv import RingState, StepOperators, h3_step_in_place
from h3lm.flashconv.kernels import step_triton as core
from h3lm.flashconv.kernels.launch import multiprocessors
from h3lm.flashconv.kernels.overlap import can_overlap
from h3lm.flashconv.kernels.step_triton import StepSize
from h3lm.layers import step_triton as step
from h3lm.layers.step_triton import AttendSize, ProductSize, attend_step, product

D, HEADS, HEAD_DIM, MODES, TAPS = 2048, 16, 128, 32, 64  # of the 1.3B preset
TOLERANCE = 1e-2
WORKERS = 8  # each takes up to 7 GB of the GPU while it compiles
PRODUCTS = {"qkv": (3 * D, D), "out": (D, D), "up": (4 * D, D), "down": (D, 4 * D)}
KINDS = {"qkv": "whole", "out": "square", "up": "whole", "down": "deep"}
CONTEXTS = ((64, 576), (64, 1600), (16, 8256), (4, 65600))  # rows and keys


@dataclass(frozen=True)
class Case:
    """One kernel on one problem.

    Attributes:
        name: Of the problem.
        make: Returns what runs it, given a number of layers and a size (None: the library's).
        layers: Layers that exceed the L2 cache together.
        bytes: What one layer has to move.
        sizes: What is tried.
    """

    name: str
    make: Callable[[int, object], Callable[[int], Tensor]]
    layers: int
    bytes: int
    sizes: list[object]


def cases(only: set[str]) -> Iterator[Case]:
    """Everything that is tried, the most telling first."""
    if "core" in only:
        for rows in (64, 16, 1):
            moved = rows * D * (2 * MODES * 8 + TAPS * 2 + 8) + D * (3 * MODES * 8 + TAPS * 4)
            yield Case(f"core {rows}", partial(_core, rows), 8, moved, list(core_sizes(rows)))
    if "product" in only:
        for rows in (64, 16, 1):
            for name, shape in PRODUCTS.items():
                yield Case(
                    f"{name} {rows}", partial(_product, rows, name), 24 if name == "out" else 8,
                    2 * shape[0] * shape[1], list(product_sizes(rows, KINDS[name])),
                )  # fmt: skip
    if "attend" in only:
        for rows, keys in CONTEXTS:
            moved = rows * keys * 4 * D
            yield Case(
                f"attend {rows}x{keys}", partial(_attend, rows, keys), 2, moved,
                list(attend_sizes()),
            )  # fmt: skip


def core_sizes(rows: int) -> Iterator[StepSize]:
    """Sizes of the H3 core."""
    for columns, at_once, warps in (
        (4, 2, 1), (8, 4, 4), (4, 1, 1), (2, 2, 1), (8, 1, 1), (2, 4, 1), (4, 4, 1), (8, 2, 2),
        (4, 2, 2),
    ):  # fmt: skip
        if at_once <= rows:
            yield StepSize(columns, at_once, warps)


def product_sizes(rows: int, kind: str) -> Iterator[ProductSize]:
    """Sizes of products of few rows; parts only where a norm follows."""
    if rows == 1:
        for parts, columns, depth, warps in {
            "whole": (
                (1, 8, 1024, 4), (1, 4, 2048, 4), (1, 4, 1024, 2), (1, 8, 512, 2), (1, 16, 512, 4),
            ),
            "square": ((2, 8, 1024, 4), (1, 4, 2048, 4), (4, 4, 512, 1), (4, 8, 512, 2)),
            "deep": (
                (4, 8, 1024, 4), (8, 8, 1024, 4), (2, 4, 2048, 4), (4, 4, 2048, 4), (4, 4, 1024, 2),
            ),
        }[kind]:  # fmt: skip
            yield ProductSize(columns, depth, parts, warps=warps)
        return
    for parts, columns, depth, stages, warps in {
        "whole": (
            (1, 64, 128, 4, 4), (1, 64, 128, 5, 4), (1, 64, 128, 4, 8), (1, 32, 128, 5, 4),
            (1, 64, 256, 3, 4),
        ),
        "square": ((4, 64, 128, 4, 4), (2, 64, 128, 4, 4), (8, 128, 64, 4, 4), (4, 32, 128, 4, 4)),
        "deep": (
            (4, 64, 128, 4, 4), (8, 64, 128, 3, 4), (8, 128, 128, 3, 4), (4, 64, 128, 5, 4),
            (4, 64, 256, 3, 4),
        ),
    }[kind]:  # fmt: skip
        yield ProductSize(columns, depth, parts, stages, warps)


def attend_sizes() -> Iterator[AttendSize]:
    """Sizes of attention."""
    for keys, stages, warps, programs in (
        (32, 4, 4, 4), (32, 4, 4, 8), (32, 4, 4, 16), (64, 3, 4, 4), (64, 3, 4, 8), (32, 1, 4, 16),
    ):  # fmt: skip
        yield AttendSize(keys, stages, warps, programs)


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def _core(rows: int, layers: int, size: object) -> Callable[[int], Tensor]:
    q, k, v = _draw(rows, 3 * D).chunk(3, -1)
    angle = torch.rand(D, MODES, device="cuda")
    a, b, c = (0.9 * torch.stack([x.cos(), x.sin()], -1) for x in (angle, angle, 2 * angle))
    operators = StepOperators(_draw(D, TAPS).float() / 8, a, b, c, _draw(D).float())
    states = [
        RingState(
            _draw(rows, D, TAPS), torch.arange(rows, device="cuda"),
            _draw(rows, D, MODES, 2, dtype=torch.float32),
        )
        for _ in range(layers)
    ]  # fmt: skip
    if size is None:
        return lambda i: h3_step_in_place(q, k, v, operators, states[i], backend="torch")
    assert isinstance(size, StepSize)
    early = can_overlap(q.device)
    return lambda i: core.step(q, k, v, *operators, *states[i], head_dim=1, early=early, size=size)


def _product(rows: int, name: str, layers: int, size: object) -> Callable[[int], Tensor]:
    N, K = PRODUCTS[name]
    x, weights, bias = _draw(rows, K), _draw(layers, N, K) / K**0.5, _draw(N)
    gelu, in_parts = name == "up", name in ("out", "down")
    early = can_overlap(x.device)
    if isinstance(size, ProductSize):
        if in_parts:
            return lambda i: product(x, weights[i], None, False, True, early, size)
        return lambda i: product(x, weights[i], bias, gelu, False, early, size)
    if gelu:
        return lambda i: torch._addmm_activation(bias, x, weights[i].T, use_gelu=True)
    return lambda i: F.linear(x, weights[i], None if in_parts else bias)


def _attend(rows: int, keys: int, layers: int, size: object) -> Callable[[int], Tensor]:
    qkv = _draw(rows, 3 * D)
    known, values = _draw(2, layers, rows, HEADS, keys, HEAD_DIM).unbind()
    lengths = torch.full((rows,), keys - 1, device="cuda")
    if isinstance(size, AttendSize):
        device, early = qkv.device, can_overlap(qkv.device)
        sms = multiprocessors(device)
        return lambda i: attend_step(qkv, known[i], values[i], lengths, None, sms, early, size)
    q, k, v = qkv.view(rows, 3, HEADS, 1, HEAD_DIM).unbind(1)

    def library(i: int) -> Tensor:
        known[i][:, :, -1:], values[i][:, :, -1:] = k, v
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, known[i], values[i]).reshape(rows, D)

    return library


def main() -> None:
    """Compile, check and time all sizes; print one line for each, the best of a problem last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="stop after this long")
    parser.add_argument("--only", default="core,product,attend", help="some of the kernels")
    parser.add_argument("--steps", action="store_true", help="choose by whole steps as well")
    arguments = parser.parse_args()
    start = time.monotonic()
    bad = set()
    todo = list(cases(set(arguments.only.split(","))))
    jobs = [(case.name, arguments.only, size) for case in todo for size in case.sizes]
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(WORKERS, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        faults = dict(zip([job[::2] for job in jobs], pool.map(_compile, jobs), strict=True))
    _say(f"{len(jobs)} sizes compiled in {time.monotonic() - start:.0f} s")
    ceilings = Ceilings.measured()
    _say(f"{torch.cuda.get_device_name()}: {ceilings}")
    for case in todo:
        if time.monotonic() - start > 60 * arguments.minutes:
            _say("out of time")
            break
        floor = 1e3 * case.bytes / ceilings.bytes_per_ms
        _say(f"{case.name}: floor {floor:.2f} us")
        times: dict[object, float] = {None: _us(case, None)}
        _say(f"  {times[None]:8.2f} us {100 * floor / times[None]:5.1f} %  plain PyTorch")
        for size in case.sizes:
            fault = faults[case.name, size] or _wrong(case, size)
            if fault:
                _say(f"  {size}: {fault}")
                bad.add((case.name, size))
                continue
            times[size] = _us(case, size)
            _say(f"  {times[size]:8.2f} us {100 * floor / times[size]:5.1f} %  {size}")
        best = min(times, key=lambda size: times[size])
        _say(f"  best: {best or 'plain PyTorch'}")
        torch.cuda.empty_cache()
    if arguments.steps:
        search(bad)
    _say(f"all in {time.monotonic() - start:.0f} s")


@torch.no_grad()
def search(bad: set[tuple[str, object]]) -> dict[str, object]:
    """Choose sizes one after the other by whole steps of pure H3, and leave them in the tables.

    That of attention is chosen by itself, over all contexts alike.

    Args:
        bad: Names of cases and sizes that are not to be tried.

    Returns:
        What was chosen.
    """
    model = make_model("1.3b", mixers="h3", h3_head_dim=1, num_hidden_layers=6)

    def step_us(rows: int) -> float:
        decoder = filled_decoder(model, rows, 512)
        graph = decoder.record()
        return 1e3 * median_ms(graph.replay, 15)

    chosen: dict[str, object] = {}

    def choose(name: str, rows: int, sizes: list[Any], put: Callable[[Any], None]) -> None:
        times = {}
        for size in sizes:
            put(size)
            times[size] = step_us(rows)
        best = min(times, key=lambda size: times[size])
        put(best)
        chosen[name] = best
        _say(f"{name}: {best}; " + ", ".join(f"{us:.1f}" for us in times.values()) + " us")

    def put_core(size: StepSize) -> None:
        core.SIZE = size

    for rows in (64, 1, 16):
        for kind in ("whole", "deep", "square"):
            names = [f"{name} {rows}" for name, of in KINDS.items() if of == kind]
            sizes = [
                size for size in product_sizes(rows, kind)
                if not any((name, size) in bad for name in names)
            ]  # fmt: skip
            choose(
                f"{rows} {kind}", rows, [*sizes, None],
                partial(step.SIZES.__setitem__, (rows, kind)),
            )  # fmt: skip
        if rows == 64:
            good = [size for size in core_sizes(rows) if ("core 64", size) not in bad]
            choose("core", rows, good, put_core)
    attend = list(cases({"attend"}))
    over_floor = {
        size: sum(_us(case, size) / case.bytes for case in attend)
        for size in attend_sizes()
        if not any((case.name, size) in bad for case in attend)
    }
    step.ATTEND = min(over_floor, key=lambda size: over_floor[size])
    chosen["attend"] = step.ATTEND
    _say(f"attend: {step.ATTEND}")
    return chosen


@torch.no_grad()
def _compile(job: tuple[str, str, object]) -> str:
    """Compile a size by running it once; what went wrong, or nothing."""
    name, only, size = job
    try:
        case = next(case for case in cases(set(only.split(","))) if case.name == name)
        case.make(1, size)(0)
        torch.cuda.synchronize()
    except Exception as error:  # a size that cannot run is a row of the table
        return f"{type(error).__name__}: {str(error)[:80]}"
    return ""


@torch.no_grad()
def _wrong(case: Case, size: object) -> str:
    """What is wrong with the result beside plain PyTorch's, or nothing."""
    results = []
    for which in (size, None):
        torch.manual_seed(0)
        y = case.make(1, which)(0).float()
        results.append(y.sum(0) if y.dim() == 3 else y)
    error = float((results[0] - results[1]).norm() / results[1].norm())
    return "" if error < TOLERANCE else f"off by {error:.1e}"


@torch.no_grad()
def _us(case: Case, size: object) -> float:
    """Microseconds of one layer."""
    torch.manual_seed(0)
    call = case.make(case.layers, size)

    def everywhere() -> None:
        for i in range(case.layers):
            call(i)

    return 1e3 * graph_ms(everywhere, case.layers)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
