"""How wrong a path of the H3 core is, beside plain PyTorch in the same dtype.

Every result and every gradient of a random problem is compared with float64. Two yardsticks:
`by_steps`, plain PyTorch as one writes it, whose steps round, is what kernels may be twice as wrong
as in half precision; `as_a_whole`, the plain path, rounds the result alone, and is the yardstick of
float32 and, in reports, the stricter one.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from h3lm.bench import measure, report
from h3lm.flashconv import chunked, library, stepwise
from h3lm.flashconv.dispatch import HOPPER_HEAD_DIMS
from h3lm.flashconv.state import H3State, diagonal_shape
from h3lm.ssm.operators import ChunkOperators, DiagonalSystem

Run = Callable[
    [Tensor, Tensor, Tensor, ChunkOperators, H3State | None], tuple[Tensor, H3State | None]
]
Problem = dict[str, Tensor]  # q, k, v, taps, a, b, c, skip, and shift and x of an initial state

HARDLY = 0.9999  # |a| of systems that hardly decay
SHAPES = (
    # rows, heads, length, decay
    (2, 16, 2048, None),
    (1, 16, 8192, None),
    (2, 16, 1024, HARDLY),
    (2, 16, 8192, HARDLY),
)
DRAWS = 3
NOTES = (
    "Errors against float64, relative Frobenius norms of three draws, each as a multiple of what "
    "plain PyTorch in the same dtype has whose steps round (flashconv/stepwise.py; at most 2 is "
    "allowed); in brackets as a multiple of the plain path's, which computes in float32 and rounds "
    "once, or of one rounding to the dtype where that is more, as with states and gradients of "
    "parameters, which it leaves in float32. In float32 as a multiple of the plain path's alone. "
    "64 taps, 32 modes, an initial state, gradients of output and final state. A gradient of a "
    "skip is one number for each head and draw: 6 for two heads."
)
# of random numbers, once; float32 has one yardstick, whose rounding is that of sums
ROUNDING = {torch.bfloat16: 1.66e-3, torch.float16: 2.07e-4, torch.float32: 0.0}


def random_system(H: int, modes: int, device: torch.device, decay: float | None) -> DiagonalSystem:
    """Systems with steps of 1e-3 to 0.1; or, with a decay, all with |a| of it and b = 1."""
    dt = torch.exp(torch.rand(H, 1, dtype=torch.float64) * 4.6 - 6.9)
    poles = torch.complex(torch.tensor(-0.5).double(), math.pi * torch.arange(modes).double())
    a = torch.exp(poles * dt)
    b = (a - 1) / poles
    if decay is not None:
        phase = 2 * math.pi * torch.rand(a.shape, dtype=torch.float64)
        a, b = torch.polar(torch.full_like(phase, decay), phase), torch.ones_like(a)
    c = torch.complex(torch.randn(H, modes), torch.randn(H, modes)) / 2
    return DiagonalSystem(
        a.to(device, torch.complex64), b.to(device, torch.complex64),
        c.to(device), torch.randn(H).to(device),
    )  # fmt: skip


def random_problem(
    B: int, D: int, L: int, modes: int, n_taps: int, dtype: torch.dtype, state: bool,
    head_dim: int = 1, *, device: torch.device, sequences: int | None = None,
    decay: float | None = None,
) -> Problem:  # fmt: skip
    """Numbers for (B, D, L), the same on every device.

    Args:
        B, D, L: Rows, channels, length.
        modes: N/2.
        n_taps: Taps of the shift filter.
        dtype: Of q, k, v and the shift state.
        state: Whether there is an initial state.
        head_dim: Channels of a head.
        device: Where the tensors go.
        sequences: States, where rows are packed.
        decay: See `random_system`.
    """
    system = random_system(D // head_dim, modes, device, decay)
    problem = {name: torch.randn(B, D, L).to(device, dtype) for name in "qkv"}
    problem |= {"taps": (torch.randn(D, n_taps) / n_taps**0.5).to(device)}
    problem |= {"a": system.a, "b": system.b, "c": system.c, "skip": system.skip}
    if state:
        rows = sequences or B
        problem["shift"] = torch.randn(rows, D, n_taps - 1).to(device, dtype)
        shape = diagonal_shape(rows, D // head_dim, head_dim, modes)
        problem["x"] = torch.randn(shape, dtype=torch.complex64).to(device)
    return problem


def widened(problem: Problem) -> Problem:
    """The same numbers in float64."""
    wide = {True: torch.complex128, False: torch.float64}
    return {name: x.to(wide[x.is_complex()]) for name, x in problem.items()}


def everything(run: Run, problem: Problem, final: bool) -> dict[str, Tensor]:
    """Output, final state if wanted, and every gradient, by name, complex ones as pairs."""
    leaves = {name: x.detach().requires_grad_() for name, x in problem.items()}
    state = H3State(leaves["shift"], leaves["x"]) if "x" in leaves else None
    system = DiagonalSystem(*(leaves[name] for name in ("a", "b", "c", "skip")))
    operators = system.chunk_operators(leaves["taps"])
    o, end = run(leaves["q"], leaves["k"], leaves["v"], operators, state)
    random = torch.Generator().manual_seed(1)

    def weighed(x: Tensor) -> Tensor:  # by the same numbers in every dtype
        weight = torch.randn(x.shape, generator=random).bfloat16()
        return (x * weight.to(x.device, x.dtype)).sum(dtype=torch.float64)

    loss = weighed(o)
    results = {"o": o}
    if final:
        assert end is not None
        results |= {"end shift": end.shift, "end x": torch.view_as_real(end.diagonal)}
        loss = loss + weighed(end.shift) + weighed(torch.view_as_real(end.diagonal))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {f"d{name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    found |= results
    return {n: (torch.view_as_real(g) if g.is_complex() else g).detach() for n, g in found.items()}


def as_a_whole(head_dim: int = 1, bounds: Tensor | None = None) -> Run:
    """The plain path: all in float32 (float64 for float64), the result rounded."""
    return lambda q, k, v, operators, state: chunked.h3_core(
        q, k, v, operators, head_dim=head_dim, initial_state=state, cu_seqlens=bounds
    )


def by_steps(head_dim: int = 1, bounds: Tensor | None = None) -> Run:
    """Plain PyTorch whose steps round."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, operators: ChunkOperators, state: H3State | None
    ) -> tuple[Tensor, H3State]:
        assert operators.taps is not None
        return stepwise.h3_core(
            q, k, v, operators.taps, operators.system,
            head_dim=head_dim, initial_state=state, cu_seqlens=bounds,
        )  # fmt: skip

    return run


def by_kernel(backend: str, final: bool, head_dim: int = 1, bounds: Tensor | None = None) -> Run:
    """The kernels of a backend."""
    return lambda q, k, v, operators, state: library.h3_core(
        q, k, v, operators, backend=backend, head_dim=head_dim, initial_state=state,
        with_state=final, cu_seqlens=bounds,
    )  # fmt: skip


def write(folder: Path, backends: list[str], say: Callable[[str], None]) -> Path:
    """Measure the kernels' errors on this GPU, write a table and return its path."""
    rows = []
    for case in cases(backends):
        for row in errors(*case):
            rows.append(row)
            say("  ".join(f"{name} {value}" for name, value in row.items()))
    return write_rows(folder, rows)


def write_rows(folder: Path, rows: list[report.Row]) -> Path:
    """Write the table of `errors` and return its path."""
    environment = measure.environment("h3lm bench core")
    return report.write(f"core_{measure.gpu_name()}_errors", folder, environment, NOTES, rows)


def cases(backends: list[str]) -> Iterator[tuple[str, int, torch.dtype]]:
    """What the table is of: backend, channels of a head, dtype."""
    for backend in backends:
        for head_dim in HOPPER_HEAD_DIMS if backend == "gluon" else (1, 2, 8):
            for dtype in ROUNDING:
                if backend != "gluon" or dtype != torch.float32:
                    yield backend, head_dim, dtype


def errors(
    backend: str, head_dim: int, dtype: torch.dtype, device: str = "cuda"
) -> Iterator[report.Row]:
    """Rows of the table for one kernel: a multiple of the yardstick for each result, see NOTES."""
    for B, heads, L, decay in SHAPES:
        D = heads if head_dim == 1 else 2 * head_dim
        sums: dict[str, list[float]] = {}
        for draw in range(DRAWS):
            torch.manual_seed(draw)
            problem = random_problem(
                B, D, L, 32, 64, dtype, True, head_dim, device=torch.device(device), decay=decay
            )
            exact = everything(as_a_whole(head_dim), widened(problem), True)
            runs = by_kernel(backend, True, head_dim), by_steps(head_dim), as_a_whole(head_dim)
            found = [everything(run, problem, True) for run in runs]
            for name, right in exact.items():
                parts = [right, *(x[name].double() - right for x in found)]
                squares = [float(part.square().sum()) for part in parts]
                sums[name] = [
                    a + b for a, b in zip(sums.get(name, [0.0] * 4), squares, strict=True)
                ]
        row: report.Row = {
            "path": f"{backend}, head_dim {head_dim}",
            "dtype": str(dtype).removeprefix("torch."),
            "B×D×L": f"{B}×{D}×{L}" + (f", a = {decay} in size, b = 1" if decay else ""),
        }
        for name, (size, *squares) in sums.items():
            if name == "end shift":  # copied
                continue
            error, steps, whole = (math.sqrt(x / size) for x in squares)
            if name == "o":
                row["error of o"] = f"{error:.2e}"
            strict = error / max(whole, ROUNDING[dtype])
            row[name] = (
                f"{error / steps:.2f} ({strict:.2f})" if ROUNDING[dtype] else f"{strict:.2f}"
            )
        yield row
