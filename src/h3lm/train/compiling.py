"""`torch.compile`, without a wrapper that would rename the weights."""

from contextlib import AbstractContextManager

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
    # Else each block is cut where DDP's buckets would end in it, though its gradients come all at
    # once: an H3 block in slices of 512 K positions so took 3 ms more a pass
    torch._dynamo.config.optimize_ddp = False
    for layer in model.model.layers:
        layer.compute = torch.compile(layer.compute)


def eagerly() -> AbstractContextManager[None]:
    """A compiled model called as it was written: for other shapes, which would be compiled for."""
    return torch.compiler.set_stance("force_eager")
