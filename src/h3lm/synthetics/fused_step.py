"""A training step as few kernels, by PyTorch's compiler."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

logger = logging.getLogger("h3lm.synthetics")
Work = Callable[..., None]

# No tuning: an ensemble is compiled for every size that it has, while others wait
_OPTIONS: dict[str, Any] = {"split_reductions": False, "combo_kernels": True}


def trace(work: Work, tensors: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The operations of work that changes some of its tensors in place, its own gradients included.

    Nothing is computed. What the compiler would not look into, `vmap` and gradients within, is
    gone: what is left is a list of plain operations.
    """
    return make_fx(work, tracing_mode="fake")(*tensors)


def fuse(work: Work, tensors: Sequence[Tensor]) -> Work:
    """Work on tensors of these shapes, compiled; as it is where the compiler fails.

    Args:
        work: A function of tensors, some of which it changes in place.
        tensors: Tensors such as it will be given.
    """
    try:
        compiled = torch.compile(trace(work, tensors), fullgraph=True, options=_OPTIONS)
        with torch.no_grad():
            compiled(*(x.detach().clone() for x in tensors))
    except Exception as error:  # whatever a compiler may raise
        first = str(error).strip().partition("\n")[0]
        logger.warning("steps are not compiled: %s: %s", type(error).__name__, first)
        return work
    return compiled
