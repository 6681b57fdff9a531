"""`torch.compile`, without a wrapper that would rename the weights."""

from contextlib import AbstractContextManager

import torch
from torch import nn

from h3lm.models import H3ForCausalLM


def compile_model(model: H3ForCausalLM, way: str) -> None:
    """Have a model compiled in place, when it is first called.

    Only what the modules compute: hooks (of FSDP2) and gradient checkpointing stay outside.

    Args:
        model: The model.
        way: `blocks`, one after the other, of which equal ones are compiled once; or `model`, as
            a whole, which takes longer to start and may fuse across blocks.
    """
    modules: list[nn.Module] = list(model.model.layers) if way == "blocks" else [model]
    for module in modules:
        module.forward = torch.compile(module.forward)


def eagerly() -> AbstractContextManager[None]:
    """A compiled model called as it was written: for other shapes, which would be compiled for."""
    return torch.compiler.set_stance("force_eager")
