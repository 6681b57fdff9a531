"""What is sharded between processes, and how."""

import itertools
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from h3lm.models import H3ForCausalLM
from h3lm.ssm import SSMModule


def shard_model(
    model: H3ForCausalLM,
    mesh: DeviceMesh | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    keep_gathered: bool = False,
) -> H3ForCausalLM:
    """Shard a model in place with FSDP2.

    SSM modules and norms of all blocks are one group that computes in fp32, whatever the rest
    computes in: a decay in bfloat16 is another model. They are small, and gathered once a step.
    The rest of each block is a group; the embedding, which is the head too, and the last norm stay
    together in the root, in fp32. Nothing is cast on its way in. With all that, a sharded model
    computes under autocast what a whole one does: products in `compute_dtype`, norms and the
    residual stream in fp32.

    Args:
        model: The model.
        mesh: The processes; all of them if None.
        compute_dtype: What a block gathers its projections in, that of autocast; as stored if
            None.
        keep_gathered: Whether a block stays whole between its forward and its backward pass: half
            of what is sent, for the memory of one model in `compute_dtype`.

    Returns:
        The same model; its parameters are DTensors.
    """
    exact, products = (
        MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for dtype in (torch.float32, compute_dtype)
    )
    small: list[nn.Module] = [
        module
        for module in model.model.layers.modules()
        if isinstance(module, SSMModule | nn.LayerNorm)
    ]
    fully_shard(small, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    for module in small:
        # Of an SSM's methods FSDP knows nothing, and hooks inside a block would break what is
        # compiled there: the model gathers them before its first block instead
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    layers = list(model.model.layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=products, reshard_after_forward=not keep_gathered)
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
    fully_shard(model, mesh=mesh, mp_policy=exact)
    gathered: Any = small[0]
    model.register_forward_pre_hook(lambda *_: gathered.unshard())
    return model


class ShardAdamW(AdamW):
    """AdamW that steps over the parts of sharded parameters that this process holds.

    Element by element the same as over DTensors, which ask for each operation and each of hundreds
    of parameters how the result is divided: on the host that takes longer than the step on a GPU.
    The state that is saved is still one of DTensors.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [_own_part(x) for x in tensors]
        return has_complex


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` of a sharded model, by one sum over the processes.

    Nothing waits for a device.

    Args:
        model: A model of `shard_model`; all processes must come here.
        max_norm: The norm of all gradients that is left; infinite to leave them.

    Returns:
        The norm that they had, the same in every process.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return torch.zeros(())
    parts = [part for grad in grads if (part := _own_part(grad)).numel()]
    total = _own_part(grads[0]).new_zeros((), dtype=torch.float64)
    if parts:  # a process may hold no element of a small model
        total += torch.stack(torch._foreach_norm(parts)).double().square().sum()
    for group in _sharing(grads):
        distributed.all_reduce(total, group=group)
    total = total.sqrt().float()
    if parts and max_norm != float("inf"):
        torch._foreach_mul_(parts, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


def _sharing(tensors: list[Tensor]) -> list[distributed.ProcessGroup]:
    """The processes among which DTensors are divided; all alike."""
    first = tensors[0]
    if not isinstance(first, DTensor):
        return []
    mesh = first.device_mesh
    return [mesh.get_group(i) for i, place in enumerate(first.placements) if place.is_shard()]


def _own_part(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


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
