"""What is sharded between processes, and how."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from h3lm.models import H3ForCausalLM
from h3lm.ssm import SSMModule


def shard_model(
    model: H3ForCausalLM,
    mesh: DeviceMesh | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> H3ForCausalLM:
    """Shard a model in place with FSDP2.

    SSM modules are groups of their own that compute in fp32, whatever the rest computes in: a
    decay in bfloat16 is another model. So are the two norms of each block, then the rest of it.
    The embedding, which is the head too, and the last norm stay together in the root, in fp32.
    Nothing is cast on its way in. With all that, a sharded model computes under autocast what a
    whole one does: products in `compute_dtype`, norms and the residual stream in fp32.

    Args:
        model: The model.
        mesh: The processes; all of them if None.
        compute_dtype: What a block gathers its projections in, that of autocast; as stored if
            None.

    Returns:
        The same model; its parameters are DTensors.
    """
    exact, products = (
        MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for dtype in (torch.float32, compute_dtype)
    )
    # Nothing of ours writes into what an SSM returns
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for module in model.modules():
        if isinstance(module, SSMModule):
            # What `system` and `taps` give shares memory with the parameters, which therefore
            # must stay whole until the backward pass: they are small
            fully_shard(module, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
            for name in _parameter_readers(module):
                register_fsdp_forward_method(module, name)
    for layer in model.model.layers:
        norms: list[nn.Module] = [m for m in layer.children() if isinstance(m, nn.LayerNorm)]
        fully_shard(norms, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
        fully_shard(layer, mesh=mesh, mp_policy=products)
    fully_shard(model, mesh=mesh, mp_policy=exact)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of the model."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let go of whatever forward passes without a backward pass have left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: H3ForCausalLM) -> dict[str, Tensor]:
    """A sharded model's weights on the CPU of the first process; all must ask.

    Returns:
        The weights by name, tied ones once; nothing in the other processes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any = get_model_state_dict(model, options=options)
    tied = model.all_tied_weights_keys
    return {name: value for name, value in weights.items() if name not in tied}


def _parameter_readers(module: nn.Module) -> list[str]:
    """Methods of an SSM module that read its parameters, which must be whole by then.

    They are its public methods but `forward`; `reset_parameters` writes what each process has.
    """
    inherited = set(dir(SSMModule)) | {"reset_parameters", "forward"}
    found = []
    for name in dir(type(module)):
        method: Callable | None = getattr(type(module), name)
        if name not in inherited and not name.startswith("_") and callable(method):
            found.append(name)
    return found
