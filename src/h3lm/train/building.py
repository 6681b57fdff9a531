"""A model that is never whole in a process that holds only a part of it.

It is made without memory, sharded, given memory for its shards, and then filled one parameter at
a time: each is drawn, or read from a folder, as the whole that it would be in one process, and a
shard keeps its part. So a run starts from the same weights however many processes there are.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from h3lm.errors import UserError
from h3lm.models import H3Config, H3ForCausalLM

Shard = Callable[[H3ForCausalLM], H3ForCausalLM]


def build_model(config: H3Config, shard: Shard | None = None, device: str = "cpu") -> H3ForCausalLM:
    """A model with weights drawn from torch's generator of the CPU.

    Args:
        config: The model.
        shard: What shards it in place; None for a whole model.
        device: Where it then lies.
    """
    model = _without_memory(config, shard, device)
    drawn: set[int] = set()
    for name, module in model.named_modules():
        _draw(model, module, name, drawn)
    return model


def read_model(folder: str | Path, config: H3Config, shard: Shard, device: str) -> H3ForCausalLM:
    """A sharded model with the weights of a folder.

    Raises:
        UserError: as `read_weights`.
    """
    model = _without_memory(config, shard, device)
    read_weights(model, Path(folder))
    return model


def read_weights(model: H3ForCausalLM, folder: Path) -> None:
    """Fill a model with the weights in a folder's safetensors, one at a time.

    Raises:
        UserError: naming a file that is damaged, and the weights that are missing, unknown or of
            another shape.
    """
    wanted = {n: p for n, p in model.named_parameters() if n not in model.all_tied_weights_keys}
    found: dict[str, Path] = {}
    wrong = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (it is no dict)
                    if name not in wanted:
                        known = name in model.all_tied_weights_keys
                        wrong += [] if known else [f"has {name}, which the model lacks"]
                        continue
                    found[name] = path
                    shape = list(stored.get_slice(name).get_shape())
                    if shape != list(wanted[name].shape):
                        wrong.append(f"has {name} of shape {shape}, not {list(wanted[name].shape)}")
                    else:
                        _fill(wanted[name], stored.get_tensor(name))
        except SafetensorError as error:
            raise UserError(f"{path}: damaged: {error}") from None
    wrong += [f"lacks {name}" for name in sorted(wanted.keys() - found.keys())]
    if wrong:
        raise UserError(f"{folder}: the weights are not the model's: it {'; '.join(wrong)}")


def _without_memory(config: H3Config, shard: Shard | None, device: str) -> H3ForCausalLM:
    with torch.device("meta"):
        model = H3ForCausalLM(config)
    if shard is not None:
        shard(model)
    model.to_empty(device=device)
    model.lm_head.weight = model.model.embed_tokens.weight  # memory has come to each by itself
    return model


def _draw(model: H3ForCausalLM, module: nn.Module, name: str, drawn: set[int]) -> None:
    """Draw a module's own parameters, whole, and keep what the model has of them."""
    own = dict(module.named_parameters(recurse=False))
    if not own or all(id(p) in drawn for p in own.values()):  # the head is the embedding
        return
    drawn |= {id(p) for p in own.values()}
    missing = float("nan")
    wholes = {n: nn.Parameter(torch.full(p.shape, missing, dtype=p.dtype)) for n, p in own.items()}
    vars(module)["_parameters"].update(wholes)
    try:
        model._init_weights(module)
    finally:
        vars(module)["_parameters"].update(own)
    for part, whole in wholes.items():
        if whole.isnan().any():
            raise NotImplementedError(f"{type(model).__name__} does not initialise {name}.{part}")
        _fill(own[part], whole.detach())


def _fill(parameter: Tensor, whole: Tensor) -> None:
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            whole = whole.to(parameter.device)
            # every process has the whole: nothing needs to be sent
            part = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(whole)
