"""`h3lm bench conv`: long convolution at any length, beside torch.fft and FlashFFTConv."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from h3lm.bench import core, measure, report
from h3lm.bench.registry import CORE_CHANNELS, Shape, conv_shapes, figure_shapes
from h3lm.bench.roofline import Ceilings, Work, conv_work
from h3lm.bench.scaling import TIME
from h3lm.errors import UserError
from h3lm.flashconv import fft_conv
from h3lm.flashconv.dispatch import Problem, capability, conv_algorithm
from h3lm.flashconv.kernels.conv_plan import checks, fault, plan
from h3lm.layers.long_conv import LongConv
from h3lm.layers.s4 import S4

GRAPHS = (
    "Times are of calls launched from Python; for rows of up to 2,048, which a host may not keep "
    "up with, those of the same calls replayed as CUDA graphs stand beside them, for every path of "
    "a convolution alike. "
)
NOTES = (
    "Causal convolution of half rows with float32 filters as long as they are, random data, "
    "medians of CUDA events in ms; every call makes the filter's spectrum anew, backward makes all "
    "gradients. "
    + GRAPHS
    + "float16's products are of pairs, which are as right as float32; its ratios are over what "
    "torch.fft takes for bfloat16: it computes both in float32. Over 524,288 positions of float16 "
    "`backend='auto'` takes torch.fft, which is faster there. "
    "Floor: bytes of inputs and outputs at the rate of a copy, or the matrix operations "
    "of the chosen factors at the rate of a large product, both measured in this process, "
    "whichever takes longer. Ratio: forward, and forward + backward, over the fastest peer of this "
    "run. Memory: what forward and backward allocate, over that of torch.fft. Error: of the output "
    "against float64, relative."
)
FIGURE_NOTES = (
    "The paper's Figure 2: batch 8, width 1024. Convolution alone as in the other table. "
    + GRAPHS
    + "H3 core "
    "(64 taps, 32 modes, operators made beforehand) and causal SDPA (heads of 64) as in "
    "`h3lm bench core`."
)
LAYER_NOTES = (
    "One training step (forward, backward, fused AdamW) of a single layer of width 768 on 8 rows, "
    "bfloat16 autocast, filters made in each step, no state behind the rows; the convolution by "
    "torch.fft and by ours. A step is replayed as a CUDA graph, for both alike; `eager ms` is the "
    "same step launched call by call from Python. Speed-up: of the former."
)
ALLOWED = 4e-3  # relative error in bfloat16
TWICE, FLOAT32 = 2.0, 2.0**-22  # in float16: of plain PyTorch's, or of float32's rounding
LAYER_LENGTHS = (1024, 4096, 16384)
LAYER_ROWS = 8
MEMORY = "extra GiB"
LARGE = 2**28  # elements, of which a slow path takes half a second
GRAPH, GRAPH_BOTH = "forward, graph ms", "both, graph ms"
MAX_GRAPH_LENGTH = 2048  # of rows that are timed under a graph, too

Case = tuple[int, bool, torch.dtype]  # length, gated, dtype
Convolve = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
Say = Callable[[str], None]


def run(
    folder: Path, say: Say, *, minutes: float = 20.0, shapes: list[Shape] | None = None
) -> Path:
    """Check the kernels at every length, measure, and write reports into a folder.

    Args:
        folder: Where the reports and the picture go.
        say: Called with a line for each result.
        minutes: What is not measured by then is left out.
        shapes: What to measure; if None, one size in nine lengths, then layers that train and the
            paper's Figure 2.

    Returns:
        Path of the first report.

    Raises:
        UserError: without a CUDA device.
        RuntimeError: if a kernel is wrong: a fast wrong one is not timed.
    """
    if not torch.cuda.is_available():
        raise UserError("bench conv times a GPU, and there is no CUDA device here")
    clock = _Clock(minutes)
    wanted = shapes or conv_shapes()
    figure = [] if shapes else figure_shapes()
    lengths = sorted({shape.length for shape in wanted + figure})
    half = [(shape.length, gated, torch.float16) for gated in (False, True) for shape in wanted]
    errors = check(
        [(n, gated, torch.bfloat16) for n in lengths for gated in (False, True)] + half, say
    )
    ceilings = Ceilings.measured()
    say(str(ceilings))
    name = f"conv_{measure.gpu_name()}"
    environment = measure.environment(f"h3lm bench conv --minutes {minutes:g}")
    environment |= {"ceilings": str(ceilings), "FlashFFTConv": _is_flash_fft_conv_here()}

    def conv_rows(gated: bool) -> list[report.Row]:
        return _collect(_conv_rows(wanted, gated, errors, ceilings), clock, say)

    rows = conv_rows(False)
    path = report.write(name, folder, environment, NOTES, rows)
    for gated in (False, True):
        if gated:
            rows += conv_rows(True)
        peers = [row for row in rows if row["path"] == "torch.fft"]
        rows += _collect(_float16_rows(wanted, gated, peers, errors, ceilings), clock, say)
        report.write(name, folder, environment, NOTES, rows)
    plot(folder / f"{name}.png", wanted, rows)
    if shapes is None:
        layers = _collect(_layer_rows(), clock, say)
        report.write(f"{name}_layers", folder, environment, LAYER_NOTES, layers)
        more = _collect(_figure_rows(figure), clock, say)
        report.write(f"{name}_figure2", folder, environment, FIGURE_NOTES, more)
    return path


class _Clock:
    """Time that is left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def is_over(self) -> bool:
        """Whether none is."""
        return time.monotonic() > self.end


def _collect(rows: Iterator[report.Row], clock: _Clock, say: Say) -> list[report.Row]:
    """Rows until the time is over, each of them said."""
    done = []
    for row in rows:
        done.append(row)
        say("  ".join(f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in row.items()))
        if clock.is_over():
            say("out of time: the rest is left out")
            break
    return done


def check(cases: list[Case], say: Say) -> dict[Case, float]:
    """Errors of the output in each case; compiles the kernels on the way.

    Processes side by side fill Triton's cache, so that nothing is compiled while it is timed.

    Raises:
        RuntimeError: if an output or a gradient is off by more than it may.
    """
    context = multiprocessing.get_context("spawn")
    device = torch.device("cuda", torch.cuda.current_device())
    first_uses = [(name, device, dtype, length) for name, dtype, length in checks(device)]
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=context) as pool:
        everything, faults = (
            pool.map(_errors, cases),
            pool.map(fault, *zip(*first_uses, strict=True)),
        )
        found = dict(zip(cases, everything, strict=True))
        for (algorithm, _, dtype, length), wrong in zip(first_uses, faults, strict=True):
            if wrong:
                raise RuntimeError(
                    f"{algorithm}, rows of {length} of {dtype}: {wrong}: nothing is timed"
                )
    for (length, gated, dtype), errors in found.items():
        for name, (error, allowed) in errors.items():
            if not error <= allowed:
                raise RuntimeError(
                    f"rows of {length} of {dtype}{', gated' * gated}: {name} is off by "
                    f"{error:.1e}, allowed {allowed:.1e}: nothing is timed"
                )
    say(
        f"{len(cases)} cases compared with float64, gradients too: bfloat16 within {ALLOWED:.1e}, "
        f"float16 within {TWICE:g} times plain PyTorch"
    )
    return {case: errors["y"][0] for case, errors in found.items()}


def _errors(case: Case) -> dict[str, tuple[float, float]]:
    """Relative errors of output and gradients against float64, and what they may be."""
    length, gated, dtype = case
    u, f, pre, post, dy = _tensors(Shape(2, 16, length), gated, dtype)
    results = []
    for exact, backend in ((False, "triton"), (False, "torch"), (True, "torch")):
        given = {"u": u, "f": f, "pre": pre, "post": post}
        leaves = {
            name: (x.double() if exact else x).detach().requires_grad_()
            for name, x in given.items()
            if x is not None
        }
        y = fft_conv(
            leaves["u"], leaves["f"],
            pre_gate=leaves.get("pre"), post_gate=leaves.get("post"), backend=backend,
        )  # fmt: skip
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        results.append({"y": y.detach()} | dict(zip(leaves, grads, strict=True)))
    *approximate, expected = results
    errors = {}
    for name, x in expected.items():
        error, plain = (float((y[name].double() - x).norm() / x.norm()) for y in approximate)
        half = dtype == torch.float16
        errors[name] = error, TWICE * max(plain, FLOAT32) if half else ALLOWED
    return errors


def _tensors(
    shape: Shape, gated: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Rows, filter, both gates and a gradient."""
    torch.manual_seed(0)
    size = (shape.rows, shape.channels, shape.length)

    def rows() -> Tensor:
        return torch.randn(size, device="cuda", dtype=dtype)

    decay = torch.exp(-torch.arange(shape.length, device="cuda") * 4.0 / shape.length)
    f = torch.randn(shape.channels, shape.length, device="cuda") * decay
    pre, post = (rows() if gated else None for _ in range(2))
    return rows(), f, pre, post, rows()


def _conv_rows(
    shapes: list[Shape], gated: bool, errors: dict[Case, float], ceilings: Ceilings
) -> Iterator[report.Row]:
    for shape in shapes:
        timed = list(_paths(shape, gated))
        peers = [row for row in timed[1:] if TIME in row]
        for row in timed:
            if row is timed[0]:
                row |= _beside(row, peers, shape, gated, torch.bfloat16, errors, ceilings)
            yield row


def _float16_rows(
    shapes: list[Shape],
    gated: bool,
    peers: list[report.Row],
    errors: dict[Case, float],
    ceilings: Ceilings,
) -> Iterator[report.Row]:
    for shape in shapes:
        row = next(_paths(shape, gated, torch.float16))
        same = {"shape": str(shape), "gated": row["gated"]}
        found = [peer for peer in peers if peer.items() >= same.items() and TIME in peer]
        yield row | _beside(row, found, shape, gated, torch.float16, errors, ceilings)


def _beside(
    row: report.Row,
    peers: list[report.Row],
    shape: Shape,
    gated: bool,
    dtype: torch.dtype,
    errors: dict[Case, float],
    ceilings: Ceilings,
) -> report.Row:
    """What is said of our row beside times."""
    found: report.Row = {"error": errors[shape.length, gated, dtype]}
    return found | _floors(shape, gated, dtype, ceilings) | _ratios(row, peers)


def _paths(shape: Shape, gated: bool, dtype: torch.dtype = torch.bfloat16) -> Iterator[report.Row]:
    """Ours first, then its peers."""
    tensors = _tensors(shape, gated, dtype)
    paths: dict[str, Convolve] = {"h3lm": _by_backend("triton"), "torch.fft": _by_backend("torch")}
    if find_spec("flashfftconv") is not None:
        paths["FlashFFTConv"] = _flash_fft_conv(shape.length)
    for name, convolve in paths.items():
        row: report.Row = {
            "shape": str(shape), "gated": "yes" if gated else "no",
            "dtype": str(dtype).removeprefix("torch."), "path": name,
        }  # fmt: skip
        try:
            repeats = 25 if name == "h3lm" else 7 if shape.elements <= LARGE else 3
            yield row | _times(convolve, tensors, repeats)
        except torch.cuda.OutOfMemoryError:
            yield row | {"forward ms": "out of memory"}
        torch.cuda.empty_cache()


def _by_backend(backend: str) -> Convolve:
    return lambda u, f, pre, post: fft_conv(u, f, pre_gate=pre, post_gate=post, backend=backend)


def _flash_fft_conv(length: int) -> Convolve:
    """The peer for causal rows: transforms of twice their length."""
    from flashfftconv import FlashFFTConv

    made = FlashFFTConv(2 * length, dtype=torch.bfloat16).cuda()
    return lambda u, f, pre, post: made(u, f) if pre is None else made(u, f, pre, post)


def _is_flash_fft_conv_here() -> str:
    return "installed" if find_spec("flashfftconv") else "not installed"


def _times(
    convolve: Convolve, tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor],
    repeats: int,
) -> report.Row:  # fmt: skip
    *given, dy = tensors
    inputs = [None if x is None else x.detach().requires_grad_() for x in given]
    u, f, pre, post = inputs
    assert u is not None
    assert f is not None
    leaves = [x for x in inputs if x is not None]

    def forward() -> Tensor:
        with torch.no_grad():
            return convolve(u, f, pre, post)

    def both() -> None:
        torch.autograd.grad(convolve(u, f, pre, post), leaves, dy)

    found: report.Row = {
        "forward ms": measure.median_ms(forward, repeats, warm_up=2),
        TIME: measure.median_ms(both, repeats, warm_up=2),
        MEMORY: measure.extra_bytes(both) / 2**30,
    }
    if u.shape[-1] <= MAX_GRAPH_LENGTH:
        for name, call in ((GRAPH, forward), (GRAPH_BOTH, both)):
            ms, why = measure.replayed_ms(call, repeats)
            found[name] = why or ms
    return found


def _floors(shape: Shape, gated: bool, dtype: torch.dtype, ceilings: Ceilings) -> report.Row:
    device = torch.device("cuda")
    problem = Problem(
        length=shape.length, capability=capability(device), lags=shape.length, gated=gated,
        rows=shape.rows,
    )  # fmt: skip
    algorithms = [conv_algorithm(dtype, problem, backward) for backward in (False, True)]
    sizes = [
        plan(name, device, dtype, shape.length, shape.length, None).size for name in algorithms
    ]
    forward, backward = (conv_work(size, 2 * gated)[i] for i, size in enumerate(sizes))
    return {
        "algorithm": ", ".join(dict.fromkeys(algorithms)),
        "forward floor": ceilings.floor_ms(shape.elements, forward),
        "both floor": floor_of_both(ceilings, shape, forward, backward),
    }


def floor_of_both(ceilings: Ceilings, shape: Shape, forward: Work, backward: Work) -> float:
    """Floor of forward and backward: one after the other."""
    return sum(ceilings.floor_ms(shape.elements, work) for work in (forward, backward))


def _ratios(row: report.Row, peers: list[report.Row]) -> report.Row:
    """Times over the fastest peer's, memory over that of torch.fft."""
    found: report.Row = {}
    for what, name in (("forward ms", "forward ratio"), (TIME, "both ratio")):
        times = [float(peer[what]) for peer in peers]
        if times and what in row:
            found[name] = float(row[what]) / min(times)
    plain = [float(peer[MEMORY]) for peer in peers if peer["path"] == "torch.fft"]
    return found | ({"memory ratio": float(row[MEMORY]) / plain[0]} if plain else {})


def plot(path: Path, shapes: list[Shape], rows: list[report.Row]) -> None:
    """Time of forward and backward of an element against length, plain rows, as a PNG."""
    sizes = {str(shape): shape for shape in shapes}
    curves: dict[str, list[tuple[float, float]]] = {}

    def add(name: str, shape: Shape, ms: str | float | None) -> None:
        if isinstance(ms, float):
            curves.setdefault(name, []).append((shape.length, 1e9 * ms / shape.elements))

    for row in rows:
        if row["gated"] == "no":
            shape, half = sizes[str(row["shape"])], row["dtype"] == "float16"
            add(f"{row['path']}{', float16' * half}", shape, row.get(TIME))
            if not half:
                add("roof", shape, row.get("both floor"))
    report.plot_log_log(path, curves, "length", "forward + backward, ps for an element")


def _figure_rows(shapes: list[Shape]) -> Iterator[report.Row]:
    """Convolution alone, and the core of H3 beside attention."""
    kept = ("shape", "path", "forward ms", TIME, GRAPH, GRAPH_BOTH)
    backends = list(core.checked_backends(lambda line: None))[:1]
    for shape in shapes:
        for row in _paths(shape, False):
            yield {k: v for k, v in row.items() if k in kept} | {"path": f"conv, {row['path']}"}
        for row in core.measure_shape(shape, backends):
            path = str(row["path"])
            if path in backends or path.startswith("sdpa"):
                name = f"H3 core, {path}" if path in backends else path
                yield {k: v for k, v in row.items() if k in kept} | {"path": name}


def _layer_rows() -> Iterator[report.Row]:
    for length in LAYER_LENGTHS:
        makers: dict[str, Callable[[], S4 | LongConv]] = {
            "S4": partial(S4, CORE_CHANNELS),
            "learned filter": partial(LongConv, CORE_CHANNELS, length),
        }
        for name, make in makers.items():
            base = None
            for backend in ("torch", "triton"):
                times = time_layer(make().cuda(), length, backend)
                timed = times["step ms"]
                base = base or float(timed)
                path = {"torch": "torch.fft", "triton": "h3lm"}[backend]
                row: report.Row = {"layer": name, "length": str(length), "path": path}
                yield row | times | {"speed-up": base / float(timed)}


def time_layer(layer: S4 | LongConv, length: int, backend: str) -> report.Row:
    """Time and memory of a training step of one layer."""
    layer.backend = backend
    device = next(layer.parameters()).device
    optimizer = torch.optim.AdamW(
        layer.parameters(), lr=1e-4, fused=True, capturable=device.type == "cuda"
    )
    # as a projection leaves it under autocast
    u = torch.randn(LAYER_ROWS, length, layer.d_model, device=device).bfloat16()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            y = layer(u, with_state=False)[0]
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with torch.cuda.stream(torch.cuda.Stream()):  # where autograd warms up for a graph
        eager_ms = measure.median_ms(step, 9, warm_up=3)
        peak = measure.extra_bytes(step) / 2**30
    torch.cuda.empty_cache()  # a graph has memory of its own
    graph_ms, note = measure.replayed_ms(step, 9)
    found: report.Row = {
        "step ms": eager_ms if note else graph_ms, "eager ms": eager_ms, "peak GiB": peak,
    }  # fmt: skip
    return found | ({"note": note} if note else {})
