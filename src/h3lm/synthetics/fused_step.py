"""A training step as few kernels, by PyTorch's compiler."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

logger = logging.getLogger("h3lm.synthetics")
Work = Callable[..., None]

_PART = 64  # rows
# No tuning: an ensemble is compiled for every size that it has, while others wait
_OPTIONS: dict[str, Any] = {
    "split_reductions": False,
    "combo_kernels": True,
    "triton.autotune_at_compile_time": False,
}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A batched product, in parts where it sums over many rows for few elements.

    So a library's kernel has few programs, each of which goes through all rows: a gradient of a
    weight takes twice as long as everything else of its layer.
    """
    rows = a.shape[2]
    parts = 1
    while rows % (2 * parts) == 0 and rows // (2 * parts) >= _PART:
        parts *= 2
    if parts == 1 or max(a.shape[1], b.shape[2]) > rows:
        return NotImplemented
    a = a.unflatten(2, (parts, -1)).movedim(2, 1).flatten(0, 1)
    b = b.unflatten(1, (parts, -1)).flatten(0, 1)
    return torch.bmm(a, b).unflatten(0, (-1, parts)).sum(1)


def trace(work: Work, tensors: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The operations of work that changes some of its tensors in place, its own gradients included.

    Nothing is computed. What the compiler would not look into, `vmap` and gradients within, is
    gone: what is left is a list of plain operations.
    """
    products = {torch.ops.aten.bmm.default: _product}
    return make_fx(work, products, tracing_mode="fake")(*tensors)


def _compile(step: torch.fx.GraphModule, tensors: Sequence[Tensor]) -> Work:
    # there is no Python for `torch.compile` to look into, which would take most of the time where
    # the compiler's cache has the rest
    with warnings.catch_warnings():
        # of products in TF32, which rounds too much, and of complex numbers, which stay PyTorch's
        warnings.simplefilter("ignore")
        return torch._inductor.standalone_compile(
            step,
            list(tensors),
            dynamic_shapes="from_example_inputs",
            options={"config_patches": _OPTIONS},
        )


def fuse(work: Work, tensors: Sequence[Tensor]) -> Work:
    """Work on tensors of these shapes, compiled; as it is where the compiler fails.

    Args:
        work: A function of tensors, some of which it changes in place.
        tensors: Tensors such as it will be given.
    """
    try:
        compiled = _compile(trace(work, tensors), tensors)
        with torch.no_grad():
            compiled(*(x.detach().clone() for x in tensors))
    except Exception as error:  # whatever a compiler may raise
        first = str(error).strip().partition("\n")[0]
        logger.warning("steps are not compiled: %s: %s", type(error).__name__, first)
        return work
    return compiled
