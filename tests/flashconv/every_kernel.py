"""Every kernel of state passing on small problems, for compute-sanitizer.

    compute-sanitizer --tool racecheck python tests/flashconv/every_kernel.py gluon

Each name runs forward and backward with all optional inputs, at lengths that leave a chunk and a
tile unfinished, and compares the output with plain PyTorch, so that an empty run cannot pass.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from h3lm.flashconv import (
    RingState,
    StepOperators,
    chunked,
    dispatch,
    h3_step_in_place,
    lagging,
    library,
)
from h3lm.flashconv.state import H3State, diagonal_shape
from h3lm.ssm import DiagonalSSM, ShiftSSM
from h3lm.ssm.fused_operators import fused_operators, operators_fault
from h3lm.ssm.fused_parameters import parameters_fault
from h3lm.ssm.operators import ChunkOperators

DEVICE = torch.device("cuda", 0)


def _operators(D: int, head_dim: int, n_taps: int) -> ChunkOperators:
    torch.manual_seed(0)
    with torch.no_grad():
        taps = ShiftSSM(D, d_state=n_taps).taps()
        made = DiagonalSSM(D // head_dim).system().plain_chunk_operators(taps, 64)
    moved = {name: getattr(made, name).to(DEVICE) for name in ("M", "K", "P", "F", "decay")}
    system = type(made.system)(*(x.to(DEVICE) for x in vars(made.system).values()))
    return ChunkOperators(**moved, system=system, taps=taps.to(DEVICE))


def _core(
    backend: str,
    B: int,
    D: int,
    L: int,
    *,
    head_dim: int = 1,
    n_taps: int = 64,
    bounds: tuple[int, ...] | None = None,
    copied: bool = False,
) -> None:
    operators = _operators(D, head_dim, n_taps)
    exact = operators
    if copied:  # kernels copy operators of the dtype of their inputs, others they convert
        half = {name: getattr(operators, name).bfloat16() for name in ("M", "K", "P", "F")}
        operators = replace(operators, **half)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    rows = B if bounds is None else len(bounds) - 1
    q, k, v = (torch.randn(B, D, L).bfloat16().to(DEVICE).requires_grad_() for _ in range(3))
    shape = diagonal_shape(rows, D // head_dim, head_dim, 32)
    state = H3State(
        torch.randn(rows, D, n_taps - 1).bfloat16().to(DEVICE),
        torch.randn(shape, dtype=torch.complex64).to(DEVICE).requires_grad_(),
    )
    given = {"head_dim": head_dim, "initial_state": state, "cu_seqlens": cu_seqlens}
    o, end = library.h3_core(q, k, v, operators, backend=backend, **given)
    assert end is not None
    loss = o.float().sum() + torch.view_as_real(end.diagonal).sum()
    torch.autograd.grad(loss, [q, k, v, state.diagonal])
    _close(o, chunked.h3_core(q, k, v, exact, **given)[0])


def _segments(backend: str, head_dim: int) -> None:
    dispatch.segments = lambda *problem: 2
    _core(backend, 1, head_dim, 4096 + 112, head_dim=head_dim)


@torch.no_grad()
def _steps(lags: bool) -> None:
    """Steps in place by kernels and in plain PyTorch, each from states of its own."""
    B, D = 3, 64
    made = _operators(D, 1, 64)
    assert made.taps is not None
    operators = StepOperators.of(made.taps, made.system, lags=lags)
    qkv, outputs = torch.randn(10, B, 3 * D).bfloat16().to(DEVICE), []
    for backend in ("triton", "torch"):
        pairs = torch.zeros(B, D, 32, 2, device=DEVICE)
        ring = torch.zeros(B, D, 64, device=DEVICE).bfloat16()
        if lags:
            pairs, ring = lagging.innermost(pairs, 1), lagging.innermost(ring, 1)
        recent = lagging.new_recent(B, D, pairs) if lags else None
        state = RingState(ring, torch.zeros(B, dtype=torch.int64, device=DEVICE), pairs, recent)
        for x in qkv:
            q, k, v = x.chunk(3, -1)
            outputs.append(h3_step_in_place(q, k, v, operators, state, backend=backend))
            state.position.add_(1)
    _close(torch.stack(outputs[:10]), torch.stack(outputs[10:]))


def _making() -> None:
    assert not operators_fault(DEVICE), operators_fault(DEVICE)
    assert not parameters_fault(DEVICE), parameters_fault(DEVICE)
    system = DiagonalSSM(2).to(DEVICE).system()
    taps = torch.randn(4, 128, device=DEVICE)
    M = fused_operators(system.a, system.b, system.c, system.skip, taps, 64)[0]
    _close(M, system.plain_chunk_operators(taps, 64).M)


def _close(found: Tensor, expected: Tensor) -> None:
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert error < 1e-2, f"relative error {error:.1e}"


NAMES: dict[str, Callable[[], None]] = {
    "gluon": lambda: _core("gluon", 1, 2, 4096 + 80),
    "gluon_short_rows": lambda: _core("gluon", 3, 2, 1040),
    "gluon_many_channels": lambda: _core("gluon", 3, 280, 320, copied=True),
    "gluon_segments": lambda: _segments("gluon", 1),
    "triton": lambda: _core("triton", 1, 2, 4096 + 81),
    "triton_short_rows": lambda: _core("triton", 3, 2, 301, n_taps=128),
    "triton_segments": lambda: _segments("triton", 1),
    "triton_packed": lambda: _core("triton", 1, 2, 401, bounds=(0, 100, 101, 229, 401)),
    "heads_2": lambda: _core("triton", 3, 4, 301, head_dim=2),
    "heads_8": lambda: _core("triton", 3, 16, 256, head_dim=8),
    "gluon_heads": lambda: _core("gluon", 3, 16, 320, head_dim=8),
    "heads_8_segments": lambda: _segments("triton", 8),
    "heads_8_packed": lambda: _core(
        "triton", 1, 8, 401, head_dim=8, n_taps=128, bounds=(0, 100, 101, 229, 401)
    ),
    "steps": lambda: _steps(False),
    "steps_lagging": lambda: _steps(True),
    "operators": _making,
}


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        NAMES[name]()
        torch.cuda.synchronize()
        sys.stdout.write(f"{name}: right\n")
