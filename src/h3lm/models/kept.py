"""Decoders that outlive their call of `generate`: the next one of its shape captures nothing.

Capturing a step costs as much as some dozens of tokens. A decoder holds addresses, not values: of
weights, of its cache and of the numbers that its chooser looks at. So it may serve another call
only where all of these are what they were, and where a pass of the model is nothing but our own
modules: `key` says so. One is kept for each model, as long as the model lives in eval mode, unless
its cache takes much of the device.
"""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from h3lm.models.cache import cache_bytes

SHARE = 0.25  # of the device's memory that a kept cache may take
OURS = ("h3lm.", "torch.nn.modules.")  # where modules come from whose pass we know

_kept: "WeakKeyDictionary[Any, tuple[Any, Any]]" = WeakKeyDictionary()


def key(
    model: Any, rows: int, capacity: int, processors: Iterable[Any], do_sample: bool
) -> tuple[Any, ...] | None:
    """What a captured step depends on; None if it must not be kept.

    Args:
        model: An `H3ForCausalLM`.
        rows: Rows of the batch.
        capacity: Positions of the cache.
        processors: What changes logits before the choice.
        do_sample: Whether tokens are sampled.
    """
    modules = list(model.modules())
    if not all(map(_is_ours, modules)):
        return None
    tensors = [*model.parameters(), *model.buffers()]
    return (
        rows, capacity, do_sample, *map(_description, processors),
        *((x.data_ptr(), x.dtype, x.device) for x in tensors),
        *(getattr(module, "backend", None) for module in modules),
        torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"),
    )  # fmt: skip


def take(model: Any, wanted: tuple[Any, ...] | None) -> Any:
    """The kept decoder if it is the wanted one, ready for a prompt; None otherwise.

    It is kept no longer: two threads never share it, and where it is not wanted its memory is free.
    """
    found, decoder = _kept.pop(model, (None, None))
    if decoder is None or found != wanted:
        return None
    decoder.resume(model)
    return decoder


def keep(model: Any, of: tuple[Any, ...] | None, decoder: Any) -> None:
    """Keep a decoder of a key behind its call, if it has a graph and its cache is not too large."""
    device = decoder.token.device
    if of is None or decoder.graph is None or not _may_take(cache_bytes(decoder.cache), device):
        return
    decoder.pause()
    _kept[model] = of, decoder


def forget(model: Any = None) -> None:
    """Free the decoder that is kept for a model, or all of them."""
    if model is None:
        _kept.clear()
    else:
        _kept.pop(model, None)


def _may_take(size: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return size <= SHARE * torch.cuda.get_device_properties(device).total_memory


def _is_ours(module: Any) -> bool:
    """Whether a module is plain: not wrapped, not hooked, not quantised, no adapter."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    hooked = hooked or vars(module).keys() & {"forward", "compute"}
    return not hooked and type(module).__module__.startswith(OURS)


def _description(processor: Any) -> tuple[Any, ...]:
    """A processor of logits by its numbers."""
    fields = sorted(vars(processor).items())
    return type(processor), *((k, _plain(v)) for k, v in fields)


def _plain(value: Any) -> Any:
    return tuple(value.flatten().tolist()) if isinstance(value, Tensor) else repr(value)
