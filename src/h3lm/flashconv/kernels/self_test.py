"""The check that stands before the first use of the Hopper kernels.

Gluon is experimental: a Triton release may change or break it. So the kernels run once on a small
problem beside the plain Triton ones, and where they fail, these take over and say so.
"""

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from h3lm.flashconv.kernels.launch import Operators

logger = logging.getLogger("h3lm.flashconv")
TOLERANCE = 1e-2  # both round operands to bfloat16, 2^-9 each


def hopper_kernels(device: torch.device) -> ModuleType | None:
    """The Hopper kernels if they work on this machine, else None."""
    if torch.cuda.is_current_stream_capturing():
        return _import()  # no test inside of a CUDA graph
    return None if hopper_fault(device) else _import()


@cache
def hopper_fault(device: torch.device) -> str:
    """What is wrong with the Hopper kernels on this machine; empty if they work."""
    try:
        fault = _compare(device)
    except Exception as error:  # whatever a compiler may raise
        fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if fault:
        logger.warning("Hopper kernels are off, Triton takes over: %s", fault)
    return fault


def _import() -> ModuleType:
    from h3lm.flashconv.kernels import chunk_hopper

    return chunk_hopper


def _compare(device: torch.device) -> str:
    from h3lm.flashconv.kernels import chunk_triton

    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=random, device=device) * scale

    L, T, N = 4096, 64, 64
    q, k, v, do = (normal(1, 1, L).bfloat16() for _ in range(4))
    decay = torch.stack([torch.full((32,), 0.6), torch.linspace(-0.6, 0.6, 32)], -1)
    operators = Operators(
        F=normal(1, 2, T, T, scale=0.1), M=normal(1, T, T, scale=0.1),
        K=normal(1, N, T, scale=0.1), P=normal(1, T, N, scale=0.1),
        decay=decay[None].to(device),
    )  # fmt: skip
    results = []
    for kernels in (_import(), chunk_triton):
        o, end, states = kernels.forward(
            q,
            k,
            v,
            operators,
            None,
            None,
            with_output=True,
            with_end=True,
            save_states=True,
        )
        grads = kernels.backward(do, end, q, k, v, operators, None, None, states)
        named = {"o": o, "end": end, **vars(grads)}
        results.append({name: x.float() for name, x in named.items() if x is not None})
    for name, expected in results[1].items():
        error = float((results[0][name] - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            return f"{name} differs by {error:.1e} from the Triton kernel"
    return ""
