"""`torch.compile`, without a wrapper that would rename the weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from h3lm.models import H3ForCausalLM


def compile_model(model: H3ForCausalLM, way: str) -> None:
    """Have a model compiled in place, when it is first called.

    Only what the modules compute: hooks (of FSDP2) and gradient checkpointing stay outside.

    Args:
        model: The model.
        way: `blocks`, one after the other, of which equal ones are compiled once; or `model`, as
            a whole, which takes longer to start and may fuse across blocks.
    """
    if way == "model":
        model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
        return
    for layer in model.model.layers:
        layer.compute = _in_one_piece(torch.compile(layer.compute))


def _in_one_piece(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled block that is not cut where DDP's buckets would end in it.

    Its gradients come all at once all the same, and what is passed between its parts would be
    written in float32. Dynamo's setting is its user's again behind each call.
    """
    whole = torch._dynamo.config.patch(optimize_ddp=False)

    def compute(*given: Any) -> Any:
        with whole:
            return compiled(*given)

    return compute


def eagerly() -> AbstractContextManager[None]:
    """A compiled model called as it was written: for other shapes, which would be compiled for."""
    return torch.compiler.set_stance("force_eager")
