"""Several processes: how they agree, and what is sharded between them."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from h3lm.models import H3ForCausalLM
from h3lm.ssm import SSMModule


def world_size() -> int:
    """Number of processes of the run, as `torchrun` says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes and prints for all."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def first_says(number: float, device: torch.device) -> float:
    """The number that the first process has."""
    if not distributed.is_initialized():
        return number
    told = torch.tensor(number, dtype=torch.float64, device=device)
    distributed.broadcast(told, src=0)
    return told.item()


def largest(number: Tensor) -> Tensor:
    """The largest of all processes' numbers; a new tensor."""
    number = number.clone()
    if distributed.is_initialized():
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
    return number


def shard_model(
    model: H3ForCausalLM,
    mesh: DeviceMesh | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> H3ForCausalLM:
    """Shard a model in place with FSDP2.

    SSM modules are groups of their own that compute in fp32, whatever the rest computes in: a
    decay in bfloat16 is another model. Then each block is one; the embedding, which is the head
    too, and the last norm stay together in the root.

    Args:
        model: The model.
        mesh: The processes; all of them if None.
        compute_dtype: What everything but the SSM modules computes in; as stored if None.

    Returns:
        The same model; its parameters are DTensors.
    """
    exact = MixedPrecisionPolicy(
        param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, SSMModule):
            # What `system` and `taps` give shares memory with the parameters, which therefore
            # must stay whole until the backward pass: they are small
            fully_shard(module, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
            for name in _parameter_readers(module):
                register_fsdp_forward_method(module, name)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


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
