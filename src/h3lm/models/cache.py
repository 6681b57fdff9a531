"""What transformers' native cache lacks for models whose state has a constant size.

The library's `LinearAttentionLayer` stores the tensors. Missing there: repeating rows, reordering
them without new memory, and any notion of length when no layer of the model is attention.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from h3lm.models.configuration_h3 import H3Config

Packed = tuple[Tensor | None, Tensor | None]


class RecurrentLayer(LinearAttentionLayer):
    """State of one layer: `conv_states` for the shift, `recurrent_states` for the rest.

    Both are written in place from the second call on, so that a captured graph keeps its
    addresses. Complex states are stored as float32 pairs (..., N/2, 2).
    """

    def read(self) -> Packed | None:
        """The state, or None before anything was seen."""
        if not self.has_previous_state[0]:
            return None
        return self.conv_states[0], self.recurrent_states[0]

    def write(self, state: Packed, length: int) -> None:
        """Store the state behind `length` more positions."""
        conv, recurrent = (None if x is None else x.detach() for x in state)
        if conv is not None:
            self._put(self.conv_states, self.is_conv_states_initialized, conv)
            self.conv_kernel_size[0] = conv.shape[-1]
        if recurrent is not None:
            self._put(self.recurrent_states, self.is_recurrent_states_initialized, recurrent)
        self.has_previous_state[0] = True

    def _put(self, slot: dict[int, Tensor], made: dict[int, bool], value: Tensor) -> None:
        if not made[0]:
            self.dtype, self.device = value.dtype, value.device
            slot[0] = torch.empty_like(value, memory_format=torch.contiguous_format)
            made[0] = True
            if value.is_cuda and not torch.compiler.is_compiling():
                # for CUDA graphs; on a CPU it would only load the compiler, which takes seconds
                torch._dynamo.mark_static_address(slot[0])
        slot[0].copy_(value)

    def _stored(self) -> list[tuple[dict[int, Tensor], Tensor]]:
        slots = (self.conv_states, self.recurrent_states)
        return [(slot, slot[0]) for slot in slots if slot[0] is not None]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i the state of row beam_idx[i], in place."""
        for _, tensor in self._stored():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for slot, tensor in self._stored():
            slot[0] = tensor.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        for slot, tensor in self._stored():
            slot[0] = tensor[indices]


class CountingRecurrentLayer(RecurrentLayer, CacheLayerMixin):
    """A `RecurrentLayer` that counts positions, for models without an attention layer."""

    def __init__(self, **kwargs: Any) -> None:
        RecurrentLayer.__init__(self, **kwargs)
        self.length = 0

    def write(self, state: Packed, length: int) -> None:
        """Store the state and count its positions."""
        super().write(state, length)
        self.length += length

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """There are no keys and values to store."""
        raise TypeError("this layer has a state of constant size, not keys and values")

    def get_seq_length(self) -> int:
        """Positions seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions seen with the query, and their offset."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything, keeping the memory."""
        LinearAttentionLayer.reset(self)
        self.length = 0


def prepare_cache(cache: Cache | None, config: H3Config) -> Cache:
    """Make a cache of this model, or make one of the library's fit it.

    Args:
        cache: None for a new dynamic cache; else a cache of the library, which is changed in
            place as long as it is empty.
        config: The model's configuration.

    Raises:
        ValueError: if the cache belongs to another kind of model.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if not cache.layers and isinstance(cache, DynamicCache):  # made without a config
        cache.layers = DynamicCache(config=config).layers
        cache.layer_class_to_replicate = None
    types = config.layer_types
    if len(cache.layers) != len(types):
        raise ValueError(
            f"the cache has {len(cache.layers)} layers, the model {len(types)}: make it with "
            f"{type(cache).__name__}(config=model.config, ...)"
        )
    counting = "full_attention" not in types
    for i, (layer, kind) in enumerate(zip(cache.layers, types, strict=True)):
        fits = isinstance(layer, LinearAttentionLayer) == (kind == "linear_attention")
        if not fits or (kind == "linear_attention" and _used_by_another(layer)):
            raise ValueError(
                f"layer {i} of the cache is a {type(layer).__name__}, the model's is {kind}: "
                f"make it with {type(cache).__name__}(config=model.config, ...)"
            )
        if kind == "linear_attention" and not isinstance(layer, RecurrentLayer):
            cache.layers[i] = CountingRecurrentLayer() if counting else RecurrentLayer()
    return cache


def _used_by_another(layer: LinearAttentionLayer) -> bool:
    return not isinstance(layer, RecurrentLayer) and any(layer.has_previous_state.values())


def cache_bytes(cache: Cache) -> int:
    """Memory of everything that the cache stores, in bytes."""
    tensors: list[Tensor | None] = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            tensors += [*layer.conv_states.values(), *layer.recurrent_states.values()]
        else:
            tensors += [layer.keys, layer.values]
    return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
