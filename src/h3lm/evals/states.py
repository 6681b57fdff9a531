"""The caches of many prefixes side by side, taken apart and put together again row by row."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from h3lm.errors import UserError
from h3lm.evals.prefix_tree import Ints
from h3lm.models.cache import CountingRecurrentLayer, Packed, RecurrentLayer, prepare_cache
from h3lm.models.configuration_h3 import H3Config

# What our models take in place of an attention mask where every row has seen equally many tokens:
# new tokens attend to all of them and causally to each other, without a mask in memory
NO_MASK = {"full_attention": None, "linear_attention": None}


class _Handed(RecurrentLayer):
    """A layer that keeps the state it is given instead of copying it to a fixed address."""

    def write(self, state: Packed, length: int) -> None:
        self.hand(*state)

    def hand(self, conv: Tensor | None, recurrent: Tensor | None) -> None:
        self.conv_states[0], self.recurrent_states[0] = conv, recurrent
        self.has_previous_state[0] = True


class _CountingHanded(_Handed, CountingRecurrentLayer):
    """The same for models without an attention layer."""

    def write(self, state: Packed, length: int) -> None:
        super().write(state, length)
        self.length += length


class _Slots(DynamicLayer):
    """Keys and values that join tensors with room for them, instead of a longer copy."""

    def hand(self, keys: Tensor, values: Tensor, used: int) -> None:
        self.lazy_initialization(keys, values)
        self.room = keys, values
        self._use(used)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        begin = self.keys.shape[2]
        end = begin + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, begin:end] = new
        self._use(end)
        return self.keys, self.values

    def _use(self, slots: int) -> None:
        self.keys, self.values = (x[:, :, :slots] for x in self.room)


@dataclass(frozen=True)
class StateShape:
    """What one row of a model's cache holds.

    Attributes:
        layers: For each layer the shapes (without the row) and dtypes of its two tensors, None
            where it has only one. Those of a growing layer are of a single token.
        grows: For each layer whether it keeps keys and values.
        device: Where the model is.
    """

    layers: tuple[tuple[tuple[torch.Size, torch.dtype] | None, ...], ...]
    grows: tuple[bool, ...]
    device: torch.device

    @property
    def constant_bytes(self) -> int:
        """Bytes of a row whatever its length."""
        return self._bytes(growing=False)

    @property
    def token_bytes(self) -> int:
        """Bytes of a row for each of its tokens: keys and values."""
        return self._bytes(growing=True)

    @property
    def has_attention(self) -> bool:
        """Whether any layer keeps keys and values."""
        return any(self.grows)

    def row_bytes(self, length: int) -> int:
        """Bytes of a row of so many tokens."""
        return self.constant_bytes + length * self.token_bytes

    def _bytes(self, *, growing: bool) -> int:
        return sum(
            shape.numel() * dtype.itemsize
            for layer, grows in zip(self.layers, self.grows, strict=True)
            for shape, dtype in filter(None, layer)
            if grows == growing
        )


def probe(model: PreTrainedModel) -> StateShape:
    """Run two tokens and look at what the cache holds.

    Raises:
        UserError: if the cache of this model cannot be split into rows: sliding windows and
            layers of other models that keep more than keys and values.
    """
    cache = empty_cache(model)
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers, grows = [], []
    for layer in cache.layers:
        if not isinstance(layer, RecurrentLayer) and type(layer) is not DynamicLayer:
            raise UserError(
                f"{type(model).__name__} keeps a {type(layer).__name__}, which the prefix tree "
                "cannot branch: score it with lm_eval --model hf"
            )
        growing = not isinstance(layer, RecurrentLayer)
        first, second = _tensors(layer)
        cut = 2 if growing else 1  # (R, heads, S, head_dim) without rows and length
        described = tuple(
            None
            if x is None
            else (torch.Size([*x.shape[1:cut], *x.shape[cut + growing :]]), x.dtype)
            for x in (first, second)
        )
        layers.append(described)
        grows.append(growing)
    return StateShape(tuple(layers), tuple(grows), model.device)


class States:
    """What a model remembers of R prefixes of different lengths.

    Constant states are (R, ...); keys and values are (R, heads, S, head_dim), token j of a row in
    slot j, with zeros behind a row's length.

    Args:
        shape: What a row holds.
        lengths: (R,) tokens of each prefix, on the host.
        layers: The tensors.
    """

    def __init__(
        self, shape: StateShape, lengths: Ints, layers: list[tuple[Tensor | None, Tensor | None]]
    ) -> None:
        self.shape, self.lengths, self.layers = shape, lengths, layers

    @classmethod
    def zeros(cls, shape: StateShape, rows: int, slots: int) -> "States":
        """Empty prefixes with room for so many keys."""
        layers = []
        for layer, grows in zip(shape.layers, shape.grows, strict=True):
            made: list[Tensor | None] = []
            for described in layer:
                if described is None:
                    made.append(None)
                    continue
                size, dtype = described
                full = (rows, size[0], slots, *size[1:]) if grows else (rows, *size)
                made.append(torch.zeros(full, dtype=dtype, device=shape.device))
            layers.append((made[0], made[1]))
        return cls(shape, np.zeros(rows, dtype=np.int64), layers)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        return sum(x.nbytes for layer in self.layers for x in layer if x is not None)

    def select(self, rows: Ints, slots: int | None = None) -> "States":
        """Copies of some rows, a row as often as it is named.

        Args:
            rows: Which.
            slots: Room for keys in the copy; as many as the longest of the rows if None.
        """
        room = 0 if slots is None else slots - int(self.lengths[rows].max(initial=0))
        return self._gathered(rows, room, to_read=False)

    def borrow(self, rows: Ints) -> "States":
        """Some rows to read from only: these tensors themselves where that is all of them."""
        if not self.are_all(rows):
            return self.select(rows)
        used = int(self.lengths.max(initial=0))
        return States(
            self.shape, self.lengths, [self._cut(i, used) for i in range(len(self.layers))]
        )

    def for_leaves(self, rows: Ints, new_tokens: int) -> "States":
        """Some rows for one call that nothing follows: `cache(..., last=True)` may be made of them.

        Keys and values are copied once, with room for the new ones behind the longest row.
        """
        return self._gathered(rows, new_tokens, to_read=True)

    def _gathered(self, rows: Ints, room: int, *, to_read: bool) -> "States":
        """Rows as often as they are named, with so many slots behind the longest.

        Those are zero, or left as they are where rows are `to_read`: then constant states of all
        rows are these themselves.
        """
        lengths = self.lengths[rows]
        used = int(lengths.max(initial=0))
        index = to_device(rows, self.shape.device)
        share = to_read and self.are_all(rows)
        layers: list[tuple[Tensor | None, Tensor | None]] = []
        for layer, grows in zip(self.layers, self.shape.grows, strict=True):
            picked: list[Tensor | None] = []
            for x in layer:
                if x is None or (share and not grows):
                    picked.append(x)
                elif not grows:
                    picked.append(x.index_select(0, index))
                else:
                    copy = x.new_empty(len(rows), x.shape[1], used + room, x.shape[3])
                    torch.index_select(x[:, :, :used], 0, index, out=copy[:, :, :used])
                    if not to_read:
                        copy[:, :, used:] = 0
                    picked.append(copy)
            layers.append((picked[0], picked[1]))
        return States(self.shape, lengths, layers)

    @property
    def is_aligned(self) -> bool:
        """Whether all prefixes have the same length."""
        return bool((self.lengths == self.lengths[:1]).all())

    def cache(self, model: PreTrainedModel, *, in_place: bool = False, last: bool = False) -> Cache:
        """A cache of the library that holds these tensors, not copies.

        Args:
            model: The model.
            in_place: Let the cache write new keys and values into these tensors, of which there
                must be enough. Only where all prefixes have the same length.
            last: Nothing follows the next call: the constant states behind it are not made. For
                what `for_leaves` made.
        """
        cache = empty_cache(model)
        used = int(self.lengths.max(initial=0))
        for i, (first, second) in enumerate(self.layers):
            layer = cache.layers[i]
            if isinstance(layer, _Handed):
                layer.keeps = not last
                if used:
                    layer.hand(first, second)
                if isinstance(layer, _CountingHanded):
                    layer.length = used
            elif first is not None and second is not None and (in_place or last):
                assert last or self.is_aligned
                slots = _Slots()
                slots.hand(first, second, used)
                cache.layers[i] = slots
            elif first is not None and second is not None and first.shape[2]:
                layer.lazy_initialization(first, second)
                layer.keys, layer.values = first, second
        return cache

    def take(self, cache: Cache, rows: Ints, new_tokens: int) -> None:
        """Put rows of a cache that has seen exactly so many tokens more in their place."""
        everything = self.are_all(rows)
        index = to_device(rows, self.shape.device)
        slots = index.new_zeros(0)
        if self.shape.has_attention:
            begin = to_device(self.lengths[rows], self.shape.device)
            slots = begin[:, None] + torch.arange(new_tokens, device=begin.device)
        for i, (layer, grows) in enumerate(zip(cache.layers, self.shape.grows, strict=True)):
            if isinstance(layer, _Slots):
                continue  # they are there already
            new, old = _tensors(layer), self.layers[i]
            if grows:
                for mine, theirs in zip(old, new, strict=True):
                    assert mine is not None
                    assert theirs is not None
                    # (rows, 1) and (rows, new) index together; heads stay between them
                    mine[index[:, None], :, slots] = theirs[:, :, -new_tokens:].transpose(1, 2)
            elif everything:
                self.layers[i] = new
            else:
                for mine, theirs in zip(old, new, strict=True):
                    if mine is not None and theirs is not None:
                        mine.index_copy_(0, index, theirs)
        self.lengths[rows] += new_tokens

    def are_all(self, rows: Ints) -> bool:
        """Whether these are all rows, in order."""
        return len(rows) == len(self) and bool((rows == np.arange(len(self))).all())

    def _cut(self, layer: int, slots: int) -> tuple[Tensor | None, Tensor | None]:
        first, second = self.layers[layer]
        if self.shape.grows[layer] and first is not None and second is not None:
            return first[:, :, :slots], second[:, :, :slots]
        return first, second


def empty_cache(model: PreTrainedModel) -> Cache:
    """A cache that has seen nothing, whose constant states are handed over and not copied."""
    config: Any = model.config
    if not isinstance(config, H3Config):
        return DynamicCache(config=config)
    cache = prepare_cache(None, config)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, CountingRecurrentLayer):
            cache.layers[i] = _CountingHanded()
        elif isinstance(layer, RecurrentLayer):
            cache.layers[i] = _Handed()
    return cache


def to_device(array: Ints, device: torch.device) -> Tensor:
    """Copy numbers to a device without waiting for what it is doing."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _tensors(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(layer, RecurrentLayer):
        return layer.conv_states[0], layer.recurrent_states[0]
    return layer.keys, layer.values
