"""Ways to run one call beside each other, timed: what the package chooses by.

    python -m h3lm.bench.ways --time --out docs/benchmarks

compares them with float64, times them and leaves reports in a folder, where runs on like machines
and commits add up: what no run has timed yet comes first;

    python -m h3lm.bench.ways --out docs/benchmarks

takes reports from there into the package's table, `flashconv/measured.json`.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from h3lm.bench import measure, report
from h3lm.bench.registry import CONV_ELEMENTS, CORE_CHANNELS
from h3lm.flashconv import fft_conv, fft_operators, measured, ssm_conv
from h3lm.flashconv.dispatch import MAX_FFT_LENGTH
from h3lm.flashconv.filters import Filter
from h3lm.flashconv.kernels.conv_plan import Plan, plan
from h3lm.ssm import DiagonalSSM, DiagonalSystem

METHODS, ALGORITHMS = "methods", "algorithms"
METHOD_NOTES = (
    "`ssm_conv` of diagonal systems (768 channels), operators made in each call: by the scan, by "
    "convolved chunks of up to 8,192 (`fft_chunks`, the paper's Algorithm 2), and by chunks as "
    "long as the row. Both: forward, and gradients of rows and system. States: one comes in, one "
    "goes out. Medians of CUDA events in ms, of calls replayed as CUDA graphs; those that were not "
    "captured are launched from Python. `method='auto'` takes the faster of the first two at the "
    "nearest shape."
)
ALGORITHM_NOTES = (
    "`fft_conv` of bfloat16 rows (768 channels) by its kernels: blocks of a Toeplitz matrix, and "
    "transforms. Each makes what it reads of the filter anew; backward makes all gradients but "
    "that of the second gate, which is a forward pass. Medians of CUDA events in ms, replayed as "
    "CUDA graphs. The faster one at the nearest shape is taken, forward and backward by itself."
)
SCAN, CHUNKS, WHOLE = "scan", "fft_chunks", "whole row"
LAUNCHED = "launched"
BLOCKS, TRANSFORMS = "blocks", "transforms"
# names of GPUs in reports, by generation: the first that was measured is chosen by
MEASURED = {9: ("nvidia_h200", "nvidia_h100_80gb_hbm3")}
METHOD_LENGTHS = (256, 512, 1024, 2048, 8192, 32768, 131072)
FLOAT32_LENGTHS = (256, 2048, 32768)
SHORT_LENGTHS = (128, 256, 384, 512, 768, 1024, 2048)
LONG_LENGTHS, FEW_LAGS = (4096, 65536), (64, 256, 1024)
FEW_ROWS = 8
REPEATS, WARM_UP = 7, 2
CHECKED_CHANNELS = 16
SAME = ("gpu", "driver", "torch", "triton", "commit")  # of runs that add up
ALLOWED = {torch.bfloat16: 1e-2, torch.float32: 3e-5}

Say = Callable[[str], None]


class MethodCase(NamedTuple):
    """A call of `ssm_conv`.

    Attributes:
        dtype: Of the rows.
        d_state: N.
        states: Whether a state comes in and goes out.
        rows, length: B and L.
    """

    dtype: torch.dtype
    d_state: int
    states: bool
    rows: int
    length: int

    def ways(self) -> list[str]:
        """What can run it, and differs."""
        longer = self.length > MAX_FFT_LENGTH and not self.states
        return [SCAN, CHUNKS, *([WHOLE] if longer else [])]

    def columns(self) -> report.Row:
        """What says so in a report."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."), "d_state": str(self.d_state),
            "states": _yes(self.states), "length": str(self.length), "rows": str(self.rows),
        }  # fmt: skip


class AlgorithmCase(NamedTuple):
    """A call of `fft_conv`.

    Attributes:
        gated: Whether it has both gates.
        lags: Taps of the filter.
        length, rows: L and B.
    """

    gated: bool
    lags: int
    length: int
    rows: int

    def columns(self) -> report.Row:
        """What says so in a report."""
        return {
            "gated": _yes(self.gated), "lags": str(self.lags), "length": str(self.length),
            "rows": str(self.rows),
        }  # fmt: skip


def method_cases() -> list[MethodCase]:
    """What is timed of `ssm_conv`: many rows, few, then with states, then float32."""
    half, single = torch.bfloat16, torch.float32
    many = {length: max(1, CONV_ELEMENTS // (CORE_CHANNELS * length)) for length in METHOD_LENGTHS}
    cases = []
    for states in (False, True):
        for d_state in (64, 128):
            every = [MethodCase(half, d_state, states, many[length], length) for length in many]
            few = [MethodCase(half, d_state, states, 1, length) for length in (256, 2048)]
            cases += every + few
    return cases + [
        MethodCase(single, d_state, states, max(1, many[length] // 4), length)
        for states in (False, True)
        for d_state in (64, 128)
        for length in FLOAT32_LENGTHS
    ]


def algorithm_cases() -> list[AlgorithmCase]:
    """What is timed of `fft_conv`: filters as long as the rows, then short ones of long rows."""
    pairs = [(length, length) for length in SHORT_LENGTHS]
    pairs += [(lags, length) for length in LONG_LENGTHS for lags in FEW_LAGS]
    cases = []
    for lags, length in pairs:
        many = CONV_ELEMENTS // (CORE_CHANNELS * length)
        for rows in sorted({many, min(FEW_ROWS, many), 64 if many > 64 else many}):
            cases += [AlgorithmCase(gated, lags, length, rows) for gated in (False, True)]
    return cases


def run(folder: Path, say: Say, minutes: float, only: str = "") -> None:
    """Check and time everything, and write both reports as it goes.

    Args:
        folder: Where they go; what they say of a like machine stays until it is timed again.
        say: Called with a line for each case.
        minutes: What is not timed by then is left out.
        only: One of `ALGORITHMS` and `METHODS`; both if empty.
    """
    end = time.monotonic() + 60 * minutes
    chosen = f" --only {only}" if only else ""
    command = f"python -m h3lm.bench.ways --time --minutes {minutes:g}{chosen}"
    environment = measure.environment(command)
    methods, algorithms = method_cases(), algorithm_cases()
    if only != ALGORITHMS:
        _add_up(folder, METHODS, METHOD_NOTES, environment, methods, method_rows, end, say)
    if only != METHODS:
        notes = ALGORITHM_NOTES
        _add_up(folder, ALGORITHMS, notes, environment, algorithms, algorithm_rows, end, say)


def _add_up(
    folder: Path,
    what: str,
    notes: str,
    environment: dict[str, str],
    cases: list[Any],
    rows: Callable[[Iterable[Any]], Iterator[report.Row]],
    end: float,
    say: Say,
) -> None:
    """Time cases until a time of `monotonic`, and write the report with each."""
    name = f"conv_{measure.gpu_name()}_{what}"
    done = known_rows(folder / f"{name}.json", environment)
    todo = sorted(cases, key=lambda case: place(case.columns()) in done)
    for row in rows(checked(todo)):
        done[place(row)] = row
        say("  ".join(f"{k} {v if isinstance(v, str) else f'{v:.3g}'}" for k, v in row.items()))
        found = [done[at] for at in map(place, (case.columns() for case in cases)) if at in done]
        left = f" {len(found)} of {len(cases)} cases: the clock left out the rest."
        report.write(name, folder, environment, notes + left * (len(found) < len(cases)), found)
        if time.monotonic() > end:
            say("out of time: the rest is left out")
            break


def place(row: report.Row) -> tuple[tuple[str, str], ...]:
    """What says which case a row is of."""
    return tuple((k, v) for k, v in row.items() if isinstance(v, str) and k != LAUNCHED)


def known_rows(
    path: Path, environment: dict[str, str]
) -> dict[tuple[tuple[str, str], ...], report.Row]:
    """Rows of an earlier report, if it is of a like machine, by their places."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    like = all(content["environment"].get(key) == environment.get(key) for key in SAME)
    like = like and environment["commit"] != "unknown"
    return {place(row): row for row in content["rows"]} if like else {}


def checked(cases: list[Any]) -> Iterator[Any]:
    """Cases, when every way of them was compared with float64, which fills Triton's cache.

    Many are compared side by side, and come while nothing runs beside them. As many rows as are
    timed, but of few channels: kernels are compiled anew where a number of rows is 1 or no longer
    a multiple of 16.

    Raises:
        RuntimeError: if one is off: a fast wrong one is not timed.
    """
    context = multiprocessing.get_context("spawn")
    workers = max(1, (os.cpu_count() or 2) - 2)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for start in range(0, len(cases), workers):
            batch = cases[start : start + workers]
            for case, errors in zip(batch, list(pool.map(_errors, batch)), strict=True):
                refuse_wrong(case, errors)
                yield case


def refuse_wrong(case: MethodCase | AlgorithmCase, errors: dict[str, float]) -> None:
    """Raise RuntimeError if one of the errors is larger than rounding, or no number."""
    allowed = ALLOWED[case.dtype if isinstance(case, MethodCase) else torch.bfloat16]
    for name, error in errors.items():
        if not error <= allowed:
            raise RuntimeError(f"{case}: {name} is off by {error:.1e}, allowed {allowed:.1e}")


def _errors(case: MethodCase | AlgorithmCase) -> dict[str, float]:
    return method_errors(case) if isinstance(case, MethodCase) else algorithm_errors(case)


def method_errors(case: MethodCase, device: str = "cuda") -> dict[str, float]:
    """Relative errors of each way, of output and gradient of the rows, on a few channels."""
    given = _Given.of(case, device, CHECKED_CHANNELS)
    exact = _run_once(case, SCAN, given, exact=True)
    return {
        f"{name}, {way}": float((found.double() - expected).norm() / expected.norm())
        for way in case.ways()
        for name, found, expected in zip(
            ("y", "du"), _run_once(case, way, given), exact, strict=True
        )
    }


def _run_once(case: MethodCase, way: str, given: "_Given", exact: bool = False) -> list[Tensor]:
    run, leaves = _call(case, way, given, exact)
    y = run()
    return [y.detach(), torch.autograd.grad(y, leaves, given.dy.to(y.dtype))[0]]


class _Given(NamedTuple):
    """A system, rows, a state that comes in, and a gradient of the output."""

    ssm: DiagonalSSM
    u: Tensor
    state: Tensor
    dy: Tensor

    @classmethod
    def of(cls, case: MethodCase, device: str, channels: int) -> "_Given":
        torch.manual_seed(0)
        ssm = DiagonalSSM(channels, case.d_state).to(device)
        size = (case.rows, channels, case.length)
        u, dy = (torch.randn(size, device=device, dtype=case.dtype) for _ in range(2))
        modes = (case.rows, channels, case.d_state // 2)
        return cls(ssm, u, torch.randn(modes, device=device, dtype=torch.complex64), dy)


def _call(
    case: MethodCase, way: str, given: _Given, exact: bool = False
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The call, and what it has gradients of."""
    u, state = given.u.detach(), given.state
    if exact:
        u, state = u.double(), state.to(torch.complex128)
    leaves = [u.requires_grad_(), *given.ssm.parameters()]

    def run() -> Tensor:
        system = given.ssm.system()
        if exact:  # of the system as it was rounded
            a, b, c = (x.to(torch.complex128) for x in (system.a, system.b, system.c))
            system = DiagonalSystem(a, b, c, system.skip.double())
        if way == WHOLE:
            return ssm_conv(u, fft_operators(system, case.length, case.length))[0]
        return ssm_conv(
            u, system, method=way, initial_state=state if case.states else None,
            return_final_state=case.states,
        )[0]  # fmt: skip

    return run, leaves


def method_rows(cases: Iterable[MethodCase], device: str = "cuda") -> Iterator[report.Row]:
    """Time every way of each case."""
    for case in cases:
        row = case.columns()
        notes = []
        given = _Given.of(case, device, CORE_CHANNELS)
        for way in case.ways():
            run, leaves = _call(case, way, given)
            for name, call in _both_ways(run, leaves, given.dy).items():
                row[f"{way} {name}"], launched = _graph_ms(call)
                notes += [f"{way} {name}"] * launched
            del run, leaves
            if device == "cuda":  # a graph has memory of its own
                torch.cuda.empty_cache()
        yield row | ({LAUNCHED: ", ".join(notes)} if notes else {})


def _both_ways(
    run: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor
) -> dict[str, Callable[[], object]]:
    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    return {"forward": forward, "both": lambda: torch.autograd.grad(run(), leaves, dy)}


def _graph_ms(call: Callable[[], object]) -> tuple[float, bool]:
    """Time of a call as a graph, else launched; and whether it was launched."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # where autograd warms up for a graph
        for _ in range(WARM_UP):
            call()
    torch.cuda.synchronize()
    replayed, note = measure.replayed_ms(call, REPEATS)
    return (measure.median_ms(call, REPEATS), True) if note else (replayed, False)


def algorithm_rows(cases: Iterable[AlgorithmCase]) -> Iterator[report.Row]:
    """Time blocks and transforms of each case."""
    for case in cases:
        row = case.columns()
        tensors = _tensors(case, "cuda", CORE_CHANNELS)
        for way in (BLOCKS, TRANSFORMS):
            run = _Algorithm.of(case, way, tensors)
            for name, call in (("forward", run.forward), ("backward", run.backward)):
                row[f"{way} {name}"] = _graph_ms(call)[0]
        yield row


def algorithm_errors(case: AlgorithmCase, device: str = "cuda") -> dict[str, float]:
    """Relative errors of each way, of output and gradients, on a few channels."""
    tensors = _tensors(case, device, CHECKED_CHANNELS)
    u, f, _, *gates = (x.double().requires_grad_() for x in tensors)
    pre, post = gates if case.gated else (None, None)
    y = fft_conv(u, f, pre_gate=pre, post_gate=post, backend="torch")
    leaves = [u, f, *gates[:1]] if case.gated else [u, f]
    exact = [y.detach(), *torch.autograd.grad(y, leaves, tensors[2].double())]
    return {
        f"{name}, {way}": float((found.double() - expected).norm() / expected.norm())
        for way in (BLOCKS, TRANSFORMS)
        for name, found, expected in zip(
            ("y", "du", "df", "dpre"), _Algorithm.of(case, way, tensors).everything(), exact,
            strict=False,
        )
    }  # fmt: skip


def _tensors(case: AlgorithmCase, device: str, channels: int) -> list[Tensor]:
    """Rows, a filter, a gradient, and both gates."""
    torch.manual_seed(0)
    size = (case.rows, channels, case.length)
    u, dy, *gates = (torch.randn(size, device=device).bfloat16() for _ in range(4))
    return [u, torch.randn(channels, case.lags, device=device), dy, *gates]


class _Algorithm(NamedTuple):
    """One way to run a case."""

    plan: Plan
    u: Tensor
    filter: Filter
    dy: Tensor
    pre: Tensor | None
    post: Tensor | None

    @classmethod
    def of(cls, case: AlgorithmCase, way: str, tensors: list[Tensor]) -> "_Algorithm":
        u, f, dy, *gates = tensors
        pre, post = gates if case.gated else (None, None)
        name = "Toeplitz blocks"
        if way == TRANSFORMS:
            name = "block FFT" if case.length <= MAX_FFT_LENGTH else "block FFT through memory"
        return cls(
            plan(name, u.device, u.dtype, case.length, case.lags, None), u, Filter(f), dy, pre, post
        )

    def forward(self) -> Tensor:
        kernels, size = self.plan
        prepared = kernels.prepare(self.u, self.filter, size)
        y: Tensor = kernels.forward(self.u, prepared, size, self.pre, self.post)
        return y

    def backward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        kernels, size = self.plan
        prepared = kernels.prepare(self.u, self.filter, size, True)
        du, dpre, sums = kernels.backward(
            self.dy, self.u, prepared, size, self.pre, self.post, data=True, filters=True
        )
        return du, kernels.filter_gradients(self.u, sums, self.filter, size).f, dpre

    def everything(self) -> list[Tensor]:
        return [x for x in (self.forward(), *self.backward()) if x is not None]


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def table(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What the package's table is, made of the reports in a folder."""
    made: dict[str, dict[str, dict[str, Any]]] = {}
    for generation, gpus in MEASURED.items():
        for name in (ALGORITHMS, METHODS):
            paths = [folder / f"conv_{gpu}_{name}.json" for gpu in gpus]
            for path in [path for path in paths if path.exists()][:1]:
                content = json.loads(path.read_text())
                rows = [_short(row) for row in content["rows"]]
                part = {"gpu": content["environment"]["gpu"], "rows": rows}
                made.setdefault(str(generation), {})[name] = part
    return made


def _short(row: report.Row) -> report.Row:
    """Three digits of each time, without notes."""
    return {
        key: value if isinstance(value, str) else float(f"{value:.3g}")
        for key, value in row.items()
        if key != LAUNCHED
    }


def write_table(folder: Path, path: Path = measured.FILE) -> None:
    """Write the package's table, a line for each row."""
    generations = []
    for generation, parts in table(folder).items():
        lines = []
        for name, part in parts.items():
            rows = ",\n".join(f"   {json.dumps(row)}" for row in part["rows"])
            lines.append(
                f'  "{name}": {{"gpu": {json.dumps(part["gpu"])}, "rows": [\n{rows}\n  ]}}'
            )
        generations.append(f' "{generation}": {{\n' + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(generations) + "\n}\n")


def main() -> None:
    """Time what is asked for, or take reports into the package's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--time", action="store_true", help="measure and report on this GPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop timing after so many")
    parser.add_argument("--only", choices=(METHODS, ALGORITHMS), default="", help="time one half")
    given = parser.parse_args()
    if not given.time:
        write_table(given.out)
    elif torch.cuda.is_available():
        run(given.out, _say, given.minutes, given.only)
    else:
        parser.error("--time needs a GPU, and there is no CUDA device here")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
