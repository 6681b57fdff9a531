"""Time every size of the kernels of a decoding step: what their tables of sizes were chosen by.

    python -m h3lm.bench.generate_tune [--minutes 3] [--only core,attend,product] [--steps]

Sizes are compiled into Triton's cache and compared with plain PyTorch by many processes at once.
Without `--steps` each is then timed by itself in this one, under a CUDA graph over as many layers
as exceed the L2 cache, beside the libraries'; products in parts without the last sum, which the
norm behind them makes. With `--steps` sizes that are right are chosen one kernel after the other by
the time of whole steps, where kernels overlap one another, and printed as the tables have them:
that is what the tables hold.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from h3lm.bench.generate import filled_decoder, graph_ms, make_model
from h3lm.bench.measure import median_ms
from h3lm.bench.roofline import Ceilings
from h3lm.flashconv import RingState, StepOperators, h3_step_in_place, lagging
from h3lm.flashconv.kernels import step_lagging
from h3lm.flashconv.kernels import step_triton as core
from h3lm.flashconv.kernels.launch import multiprocessors
from h3lm.flashconv.kernels.overlap import can_overlap
from h3lm.flashconv.kernels.step_lagging import LaggingSize
from h3lm.flashconv.kernels.step_triton import StepSize
from h3lm.flashconv.lagging import BLOCK
from h3lm.layers import step_triton as step
from h3lm.layers.step_triton import AttendSize, ProductSize, attend_step, product
from h3lm.ssm.operators import DiagonalSystem

D, HEADS, HEAD_DIM, MODES, TAPS = 2048, 16, 128, 32, 64  # of the 1.3B preset
TOLERANCE = 1e-2
WORKERS = 16  # each takes up to 7 GB of the GPU while it compiles
PRODUCTS = {
    "up": (4 * D, D), "down": (D, 4 * D), "qkv": (3 * D, D), "out": (D, D), "head": (50304, D),
}  # fmt: skip
LAYERS = {"out": 24, "head": 2}  # that exceed the L2 cache; 8 of the others
AHEAD = (0, 256, 512, 1024, 8192)
# Products of which two programs fit into a multiprocessor
ROOMY = {
    "up": ProductSize(64, 64, stages=7, tma=True, x_stages=7),
    "down": ProductSize(64, 64, parts=4, stages=7, tma=True, x_stages=7),
    "qkv": ProductSize(64, 64, stages=7, tma=True, x_stages=7),
    "out": ProductSize(64, 64, parts=4, stages=6, tma=True, x_stages=6),
}
# Whether products are those, and whether norms and all others let the next kernel start first
STARTS = (
    (False, False, False), (True, True, False), (True, True, True), (False, True, False),
    (False, True, True),
)  # fmt: skip
CONTEXTS = ((64, 576), (64, 1600), (16, 8256), (4, 65600))  # rows and keys
POSITIONS = 512  # of steps by which other sizes are chosen


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


def cases(only: frozenset[str] | set[str]) -> Iterator[Case]:
    """Everything that is tried, the most telling first."""
    if "core" in only:
        for rows in (64, 16, 1):
            moved = rows * D * (2 * MODES * 8 + TAPS * 2 + 8) + D * (3 * MODES * 8 + TAPS * 4)
            if rows >= lagging.FROM_ROWS:
                # of a channel: what a block costs, and what each step does
                block = 2 * MODES * 8 + TAPS * 2 + 3 * BLOCK * 4
                moved = rows * D * (block // BLOCK + 3 * BLOCK + 20)
            yield Case(f"core {rows}", partial(_core, rows), 8, moved, list(core_sizes(rows)))
    if "product" in only:
        for rows in (64, 16, 1):
            for name, shape in PRODUCTS.items():
                yield Case(
                    f"{name} {rows}", partial(_product, rows, name), LAYERS.get(name, 8),
                    2 * shape[0] * shape[1], list(product_sizes(rows, name)),
                )  # fmt: skip
    if "attend" in only:
        for rows, keys in CONTEXTS:
            moved = rows * keys * 4 * D
            yield Case(
                f"attend {rows}x{keys}", partial(_attend, rows, keys), 2, moved,
                list(attend_sizes()),
            )  # fmt: skip


def core_sizes(rows: int) -> Iterator[StepSize | LaggingSize]:
    """Sizes of the H3 core: of the kernels that steps of so many rows take."""
    if rows >= lagging.FROM_ROWS:
        for split, modes in ((2, 4), (4, 2), (4, 4), (4, 8), (8, 2), (8, 4), (16, 2)):
            yield LaggingSize(split, modes)
        for at_once, wide, warps in (
            (1, 128, 4), (1, 256, 4), (1, 128, 2), (4, 64, 4), (2, 64, 4), (8, 32, 8), (2, 256, 8),
        ):  # fmt: skip
            for split, modes in ((4, 2), (4, 4), (8, 2)):
                yield LaggingSize(split, modes, at_once, wide, warps)
        return
    yield StepSize(columns=4, rows=1, warps=1)
    yield StepSize(columns=8, rows=1, warps=2)
    yield StepSize(columns=4, rows=1, warps=1, lean=True)


ONE_ROW = {  # parts, columns, depth, warps
    "whole": ((1, 4, 2048, 4), (1, 2, 2048, 2), (1, 8, 2048, 8), (1, 4, 1024, 2), (1, 8, 1024, 4)),
    "out": ((1, 4, 2048, 4), (2, 8, 1024, 4), (2, 4, 1024, 2), (1, 8, 2048, 8)),
    "down": ((4, 4, 2048, 4), (4, 8, 1024, 4), (2, 4, 2048, 4), (4, 4, 1024, 2), (2, 8, 2048, 8)),
}
PLAIN = {  # parts, columns, depth, stages: by the compiler's copies
    "whole": (
        (1, 64, 128, 4), (1, 64, 128, 6), (1, 64, 128, 3), (1, 64, 64, 7), (1, 32, 128, 4),
        (1, 64, 256, 3),
    ),
    "out": ((4, 64, 128, 4), (4, 64, 128, 3), (2, 64, 128, 4)),
    "down": ((4, 64, 128, 4), (8, 64, 128, 3), (4, 64, 128, 3), (4, 64, 64, 7)),
}  # fmt: skip
BY_TMA = {  # parts, columns, depth, stages, stages of x: one program in a multiprocessor, or two
    "whole": (
        (1, 64, 64, 12, 12), (1, 64, 128, 6, 6), (1, 128, 64, 8, 8), (1, 64, 64, 7, 7),
        (1, 64, 64, 9, 5), (1, 64, 128, 3, 4), (1, 128, 64, 5, 4), (1, 64, 64, 6, 6),
    ),
    "out": (
        (2, 64, 128, 6, 6), (4, 64, 64, 8, 6), (4, 64, 64, 6, 6), (2, 32, 64, 16, 6),
        (2, 64, 64, 9, 5), (8, 128, 64, 4, 4),
    ),
    "down": (
        (4, 64, 64, 12, 12), (8, 128, 64, 8, 8), (4, 64, 64, 7, 7), (4, 64, 64, 9, 5),
        (4, 64, 128, 3, 4), (8, 128, 64, 5, 4), (8, 64, 64, 7, 7), (4, 64, 64, 6, 6),
    ),
}  # fmt: skip


def product_sizes(rows: int, name: str) -> Iterator[ProductSize]:
    """Sizes of products of few rows; parts only where a norm follows."""
    kind = name if name in ONE_ROW else "whole"
    if rows == 1:
        for parts, columns, depth, warps in ONE_ROW[kind]:
            yield ProductSize(columns, depth, parts, warps=warps)
        return
    for parts, columns, depth, stages in PLAIN[kind]:
        yield ProductSize(columns, depth, parts, stages)
    for parts, columns, depth, stages, x_stages in BY_TMA[kind]:
        yield ProductSize(columns, depth, parts, stages, tma=True, x_stages=x_stages)


def attend_sizes() -> Iterator[AttendSize]:
    """Sizes of attention."""
    for keys, stages, warps, programs in (
        (32, 4, 4, 4), (32, 4, 4, 8), (32, 4, 4, 16), (64, 3, 4, 4), (64, 3, 4, 8), (32, 1, 4, 16),
    ):  # fmt: skip
        yield AttendSize(keys, stages, warps, programs)


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def _core(
    rows: int, layers: int, size: object, position: Tensor | None = None
) -> Callable[[int], Any]:
    """With positions of the rings: everything that a call changes, not its output alone."""
    q, k, v = _draw(rows, 3 * D).chunk(3, -1)
    angle = torch.rand(D, MODES, device="cuda")
    a, b, c = (torch.polar(torch.full_like(x, 0.9), x) for x in (angle, angle, 2 * angle))
    system = DiagonalSystem(a, b, c, _draw(D).float())
    lags = rows >= lagging.FROM_ROWS
    operators = StepOperators.of(_draw(D, TAPS).float() / 8, system, lags=lags)

    def lay_out(x: Tensor) -> Tensor:
        return lagging.innermost(x, 1) if lags else x

    states = [
        RingState(
            lay_out(_draw(rows, D, TAPS)),
            torch.full((rows,), 200, device="cuda") if position is None else position,
            lay_out(_draw(rows, D, MODES, 2, dtype=torch.float32)),
            _draw(rows, 2, BLOCK, D, dtype=torch.float32) if lags else None,
        )
        for _ in range(layers)
    ]
    early = can_overlap(q.device)

    def call(i: int) -> Tensor:
        of, state = operators, states[i]
        if isinstance(size, LaggingSize):
            assert of.response is not None
            assert state.recent is not None
            return step_lagging.step(
                q, k, v, of.taps, of.a, of.b, of.c, of.response, state.ring, state.position,
                state.diagonal, state.recent, early=early, size=size,
            )  # fmt: skip
        if isinstance(size, StepSize):
            return core.step(
                q, k, v, of.taps, of.a, of.b, of.c, of.skip, state.ring, state.position,
                state.diagonal, head_dim=1, early=early, size=size,
            )  # fmt: skip
        return h3_step_in_place(q, k, v, operators, state, backend="torch")

    if position is None:
        return call
    return lambda i: (call(i), *(x for x in states[i] if x is not None and x is not position))


def _core_results(rows: int, size: object) -> list[Tensor]:
    """What a step leaves behind, rings at one position and at many."""
    results: list[Tensor] = []
    for position in (torch.full((rows,), 200, device="cuda"), torch.arange(rows, device="cuda")):
        torch.manual_seed(0)
        results += _core(rows, 1, size, position)(0)
    return results


def _product(rows: int, name: str, layers: int, size: object) -> Callable[[int], Tensor]:
    N, K = PRODUCTS[name]
    x, weights = _draw(rows, K), _draw(layers, N, K) / K**0.5
    bias = None if name == "head" else _draw(N)
    gelu, in_parts = name == "up", name in ("out", "down")
    early = can_overlap(x.device)
    if isinstance(size, ProductSize):
        if in_parts:
            return lambda i: product(x, weights[i], None, False, True, early, size)
        return lambda i: product(x, weights[i], bias, gelu, False, early, size)
    if bias is not None and gelu:
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
    """Compile and check all sizes, and time them; a line for each kernel's best."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="stop after this long")
    parser.add_argument("--only", default="core,product,attend", help="some of the kernels")
    parser.add_argument("--steps", action="store_true", help="choose by whole steps")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    only = frozenset(arguments.only.split(","))
    faults = check_sizes(only)
    if arguments.steps:
        search({key for key, fault in faults.items() if fault}, deadline, only=only)
        for line in table_lines():
            _say(line)
        return
    ceilings = Ceilings.measured()
    _say(f"{torch.cuda.get_device_name()}: {ceilings}")
    for case in cases(only):
        if time.monotonic() > deadline:
            _say("out of time")
            break
        floor = 1e3 * case.bytes / ceilings.bytes_per_ms
        _say(f"{case.name}: floor {floor:.2f} us")
        times: dict[object, float] = {None: _us(case, None)}
        _say(f"  {times[None]:8.2f} us {100 * floor / times[None]:5.1f} %  plain PyTorch")
        for size in case.sizes:
            if not faults[case.name, size]:
                times[size] = _us(case, size)
                _say(f"  {times[size]:8.2f} us {100 * floor / times[size]:5.1f} %  {size}")
        best = min(times, key=lambda size: times[size])
        _say(f"  best: {best or 'plain PyTorch'}")
        torch.cuda.empty_cache()


def check_sizes(
    only: frozenset[str] | set[str], names: set[str] | None = None, seconds: float = 90
) -> dict[tuple[str, object], str]:
    """Compile all sizes and compare them with plain PyTorch, by many processes.

    Args:
        only: Which kernels.
        names: Which cases of these; all if None.
        seconds: What has no answer by then, a kernel that hangs perhaps, is not to be used.

    Returns:
        What is wrong with a size, or nothing, by name of the case and size.
    """
    start = time.monotonic()
    todo = [case for case in cases(only) if names is None or case.name in names]
    jobs = [(case.name, size) for case in todo for size in case.sizes]
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(WORKERS, len(jobs), (os.cpu_count() or 2) - 1))
    faults = {}
    with context.Pool(workers) as pool:
        answers = [pool.apply_async(_fault, (job,)) for job in jobs]
        for job, answer in zip(jobs, answers, strict=True):
            try:
                faults[job] = answer.get(max(0.0, start + seconds - time.monotonic()))
            except multiprocessing.TimeoutError:
                faults[job] = "no answer"
    for (name, size), fault in faults.items():
        if fault:
            _say(f"{name} {size}: {fault}")
    _say(f"{len(jobs)} sizes compiled and checked in {time.monotonic() - start:.0f} s")
    return faults


@torch.no_grad()
def search(
    bad: set[tuple[str, object]],
    deadline: float = float("inf"),
    *,
    only: frozenset[str] = frozenset(("core", "product", "attend")),
    batches: tuple[int, ...] = (64, 1, 16),
) -> None:
    """Choose sizes by whole steps of pure H3 and a Transformer and leave them in the tables.

    One after the other, twice, and that from each of `STARTS`: programs that leave room for the
    next kernel's are of use only if all of them do, and if the next one starts early. Then each
    kernel may change its order of start and wait, and what it fetches ahead. Attention is chosen
    by itself, over all contexts alike, and its order by steps of Transformers.

    Args:
        bad: Names of cases and sizes that are not to be tried.
        deadline: By `time.monotonic`; nothing more is tried after it.
        only: Which kernels.
        batches: Rows of the steps.
    """
    models = [
        make_model("1.3b", num_hidden_layers=6, **fields)
        for fields in ({"mixers": "h3", "h3_head_dim": 1}, {"mixers": "attention"})
    ]
    names = [name for name in ("core", *PRODUCTS) if {"core": "core"}.get(name, "product") in only]
    for rows in batches:
        tables = _Tables(rows, [filled_decoder(m, rows, POSITIONS) for m in models], deadline)
        given, found = tables.sizes(), []
        for roomy, norm_first, first in STARTS:
            if time.monotonic() > deadline or (roomy and rows == 1):
                continue
            tables.put({"norm": norm_first})
            start = given | ROOMY if roomy else given
            tables.put({name: size and replace(size, first=first) for name, size in start.items()
                        if name in names})  # fmt: skip
            tried: dict[str, list[Any]] = {}
            for name in [name for name in names if name != "head"] * 2:
                if name not in tried:
                    sizes = _sizes(rows, name, bad)
                    tried[name] = [size and replace(size, first=first) for size in sizes]
                tried[name] = tables.choose(name, tried[name])[:4]
            found.append((tables.step_us(), tables.sizes()))
            _say(f"{rows} rows, {roomy, norm_first, first}: {found[-1][0]:.1f} us")
        if not found:
            break
        tables.put(min(found, key=lambda item: item[0])[1])
        if "head" in names:
            tables.choose("head", _sizes(rows, "head", bad))
        for name in names:
            now = tables.sizes()[name]
            if now is not None:
                sizes = [replace(now, first=first) for first in (False, True)]
                if isinstance(now, ProductSize) and rows > 1:
                    sizes = [replace(size, ahead=n) for size in sizes for n in AHEAD]
                tables.choose(name, sizes)
        tables.choose("norm", [False, True])
        _say(f"{rows} rows: {tables.step_us():.1f} us")
    if "attend" in only and time.monotonic() < deadline:
        attend = list(cases({"attend"}))
        over_floor = {
            size: sum(_us(case, size) / case.bytes for case in attend)
            for size in attend_sizes()
            if not any((case.name, size) in bad for case in attend)
        }
        step.ATTEND = min(over_floor, key=lambda size: over_floor[size])
        choose_order_of_attention()


@torch.no_grad()
def choose_order_of_attention() -> None:
    """Let the kernel behind attention start first if that makes steps of Transformers faster."""
    model = make_model("1.3b", mixers="attention", num_hidden_layers=6)
    sizes = [replace(step.ATTEND, first=first) for first in (False, True)]
    times = dict.fromkeys(sizes, 0.0)
    for rows, positions in ((64, 576), (64, 1600)):
        decoder = filled_decoder(model, rows, positions)
        for size in sizes:
            step.ATTEND = size
            decoder.cache.start_steps(positions - 64)
            graph = decoder.record()
            us = 1e3 * median_ms(graph.replay, 25)
            times[size] += us
            _say(f"Transformer {rows}x{positions}, first={size.first}: {us:.1f} us")
    step.ATTEND = min(times, key=lambda size: times[size])


class _Tables:
    """The sizes for one batch, and the step that they make.

    Args:
        rows: Rows of the batch.
        decoders: Take steps.
        deadline: By `time.monotonic`; nothing more is tried after it.
    """

    def __init__(self, rows: int, decoders: list[Any], deadline: float) -> None:
        self.decoders, self.deadline = decoders, deadline
        self.places: dict[str, tuple[Any, Any]] = {
            "core": (_core_table(rows), rows), "norm": (step.NORM_FIRST, rows),
            **{name: (step.SIZES, (rows, name)) for name in PRODUCTS},
        }  # fmt: skip

    def sizes(self) -> dict[str, Any]:
        """What stands in the tables."""
        return {name: table[key] for name, (table, key) in self.places.items()}

    def put(self, sizes: dict[str, Any]) -> None:
        """Write sizes into the tables."""
        for name, size in sizes.items():
            table, key = self.places[name]
            table[key] = size

    def step_us(self) -> float:
        """Time of a step of each with these sizes, one behind the other, at one length."""
        total = 0.0
        for decoder in self.decoders:
            graph = decoder.record()
            decoder.cache.start_steps(POSITIONS - 64)
            total += 1e3 * median_ms(graph.replay, 25)
        return total

    def choose(self, name: str, sizes: list[Any]) -> list[Any]:
        """Put the fastest of some sizes and that in the table there; returns all, fastest first."""
        times = {self.sizes()[name]: self.step_us()}
        for size in sizes:
            if size not in times and time.monotonic() < self.deadline:
                self.put({name: size})
                times[size] = self.step_us()
        order = sorted(times, key=lambda size: times[size])
        self.put({name: order[0]})
        return order


def _core_table(rows: int) -> dict[int, Any]:
    return step_lagging.SIZES if rows >= lagging.FROM_ROWS else core.SIZES


def _sizes(rows: int, name: str, bad: set[tuple[str, object]]) -> list[Any]:
    """What is tried in turn; None for the library's product."""
    sizes: list[Any] = list(core_sizes(rows) if name == "core" else product_sizes(rows, name))
    sizes = [size for size in sizes if (f"{name} {rows}", size) not in bad]
    return sizes if name == "core" else [*sizes, None]


def table_lines() -> Iterator[str]:
    """The tables of sizes as they stand, in Python."""
    for name, sizes in (("step_triton", core.SIZES), ("step_lagging", step_lagging.SIZES)):
        yield f"flashconv/kernels/{name}.py: SIZES = {{"
        yield from (f"    {key}: {_short(size)}," for key, size in sizes.items())
        yield "}"
    yield f"layers/step_triton.py: NORM_FIRST = {step.NORM_FIRST}"
    yield f"layers/step_triton.py: ATTEND = {_short(step.ATTEND)}"
    yield "layers/step_triton.py: SIZES = {"
    yield from (f"    {key}: {_short(size)}," for key, size in step.SIZES.items())
    yield "}"


def _short(size: Any) -> str:
    """A size without what it has by default."""
    if size is None:
        return "None"
    given = {f.name: (getattr(size, f.name), f.default) for f in fields(size)}
    said = ", ".join(f"{name}={value}" for name, (value, usual) in given.items() if value != usual)
    return f"{type(size).__name__}({said})"


@torch.no_grad()
def _fault(job: tuple[str, object]) -> str:
    """What is wrong with a size, or nothing."""
    name, size = job
    try:
        case = next(case for case in cases({"core", "product", "attend"}) if case.name == name)
        return _wrong(case, size)
    except Exception as error:  # a size that cannot run is a row of the table
        return f"{type(error).__name__}: {str(error)[:80]}"


@torch.no_grad()
def _wrong(case: Case, size: object) -> str:
    """What is wrong with the result beside plain PyTorch's, or nothing."""
    if case.name.startswith("core"):
        rows = int(case.name.split()[1])
        pairs = zip(_core_results(rows, size), _core_results(rows, None), strict=True)
        error = max(_difference(*pair) for pair in pairs)
    else:
        results = []
        for which in (size, None):
            torch.manual_seed(0)
            y = case.make(1, which)(0).float()
            results.append(y.sum(0) if y.dim() == 3 else y)
        error = _difference(*results)
    return "" if error < TOLERANCE else f"off by {error:.1e}"


def _difference(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


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
