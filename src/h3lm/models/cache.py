"""What transformers' native cache lacks for models whose state has a constant size.

The library's `LinearAttentionLayer` stores the tensors. Missing there: repeating rows, reordering
them without new memory, a shift state that is a ring, and any notion of length when no layer of
the model is attention. `DecodingCache` is a cache for a batch that decodes in place: fixed slots
of memory and a length for each row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer, StaticLayer

from h3lm.errors import UserError
from h3lm.flashconv import RingState, StepOperators, lagging
from h3lm.flashconv.dispatch import KERNELS, Problem, capability, choose
from h3lm.flashconv.state import as_real_pairs
from h3lm.flashconv.step import roll_in_place, unrolled
from h3lm.models.configuration_h3 import H3Config

Packed = tuple[Tensor | None, Tensor | None]
ONLY_STEPS = (
    "a cache whose states lag behind takes single steps under torch.no_grad() alone: restart it "
    "for chunks"
)


class RecurrentLayer(LinearAttentionLayer):
    """State of one layer: `conv_states` for the shift, `recurrent_states` for the rest.

    Both are written in place from the second call on, so that a captured graph keeps its
    addresses. Complex states are stored as float32 pairs (..., N/2, 2).

    Attributes:
        keeps: Whether the state behind a call is wanted; without it the call is cheaper.
    """

    keeps = True

    def read(self) -> Packed | None:
        """The state, or None before anything was seen."""
        if not self.has_previous_state[0]:
            return None
        return self.conv_states[0], self.recurrent_states[0]

    def write(self, state: Packed, length: int) -> None:
        """Store the state behind `length` more positions."""
        conv, recurrent = (None if x is None else x.detach() for x in state)
        if conv is not None:
            self._put_conv(conv)
        if recurrent is not None:
            self._put(self.recurrent_states, self.is_recurrent_states_initialized, recurrent)
        self.has_previous_state[0] = True
        self.count(length)

    def count(self, length: int) -> None:
        """Note that so many positions were seen; only some layers care."""

    def _put_conv(self, conv: Tensor) -> None:
        self._put(self.conv_states, self.is_conv_states_initialized, conv)
        self.conv_kernel_size[0] = conv.shape[-1]

    def _put(self, slot: dict[int, Tensor], made: dict[int, bool], value: Tensor) -> None:
        if not made[0]:
            self.dtype, self.device = value.dtype, value.device
            slot[0] = self._room_for(value)
            made[0] = True
            if value.is_cuda and not torch.compiler.is_compiling():
                # for CUDA graphs; on a CPU it would only load the compiler, which takes seconds
                torch._dynamo.mark_static_address(slot[0])
        slot[0].copy_(value)

    def _room_for(self, value: Tensor) -> Tensor:
        return torch.empty_like(value, memory_format=torch.contiguous_format)

    def insert(self, rows: Tensor, other: "RecurrentLayer") -> None:
        """Put the state of another layer in place of some rows, in place."""
        packed = other.read()
        assert packed is not None
        for mine, new in zip((self.conv_states[0], self.recurrent_states[0]), packed, strict=True):
            if mine is not None and new is not None:
                mine.index_copy_(0, rows, new)
        self.has_previous_state[0] = True

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

    def count(self, length: int) -> None:
        """Count positions."""
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


@dataclass
class RingPosition:
    """Where the rings of a cache go on, shared by all of them.

    Attributes:
        steps: Single steps of each row so far, (B,), int64; None before the first write.
        stepping: Whether nothing but single steps comes any more.
    """

    steps: Tensor | None = None
    stepping: bool = False

    def move(self) -> None:
        """Go on by one slot in all rows."""
        assert self.steps is not None
        self.steps.add_(1)


class RingLayer(RecurrentLayer):
    """A `RecurrentLayer` whose shift state is a ring of n_taps slots: a step writes one of them.

    `read` and `write` take the ring apart and put it together, for chunks of any length; `ring`
    is for a single step where it lies. Chunks leave the position as it is.

    Args:
        position: Shared by the rings of one cache.
        last: Whether this is the last of them, which moves the position on.
        lags: Whether the diagonal state lags behind (`flashconv.lagging`) once prompts are over.
        kwargs: For the library's layer.
    """

    def __init__(
        self, position: RingPosition, last: bool, lags: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.position, self.last, self.lags = position, last, lags
        self.recent: Tensor | None = None
        # Set where a captured graph must find the parameters at fixed addresses
        self.operators: StepOperators | None = None

    def read(self) -> Packed | None:
        """The state, its shift part oldest first, or None before anything was seen."""
        if not self.has_previous_state[0]:
            return None
        assert self.position.steps is not None
        diagonal = self.recurrent_states[0]
        if self.lags and self.position.stepping:
            if self.operators is None:
                raise ValueError(ONLY_STEPS)
            diagonal = as_real_pairs(lagging.caught_up(self._state(), self.operators))
        return unrolled(self.conv_states[0], self.position.steps), diagonal

    def ring(self) -> RingState | None:
        """The state where it lies; None before anything was seen, or it only lags in steps."""
        if not self.has_previous_state[0] or (self.lags and not self.position.stepping):
            return None
        return self._state()

    def _state(self) -> RingState:
        assert self.position.steps is not None
        return RingState(
            self.conv_states[0], self.position.steps, self.recurrent_states[0], self.recent
        )

    def write(self, state: Packed, length: int) -> None:
        """Store the state behind `length` more positions.

        Raises:
            ValueError: if it lags behind: then every call must be a single step.
        """
        if self.lags and self.position.stepping and self.has_previous_state[0]:
            raise ValueError(ONLY_STEPS)
        super().write(state, length)
        if self.lags and self.recent is None:
            rows, channels = self.recurrent_states[0].shape[:2]
            self.recent = lagging.new_recent(rows, channels, self.recurrent_states[0])

    def stepped(self, *, move: bool = True) -> None:
        """Note that every row advanced by one position in place.

        Args:
            move: Whether the last ring moves the position on; else somebody does it later.
        """
        self.count(1)
        if self.last and move:
            self.position.move()

    def _room_for(self, value: Tensor) -> Tensor:
        if not self.lags:
            return super()._room_for(value)
        return super()._room_for(value.movedim(1, -1)).movedim(-1, 1)

    def _put_conv(self, conv: Tensor) -> None:
        B, D, kept = conv.shape
        if not self.is_conv_states_initialized[0]:
            self._put(
                self.conv_states, self.is_conv_states_initialized, conv.new_zeros(B, D, kept + 1)
            )
            self.conv_kernel_size[0] = kept + 1
        if self.position.steps is None:
            self.position.steps = torch.zeros(B, dtype=torch.int64, device=conv.device)
        roll_in_place(self.conv_states[0], self.position.steps, conv)

    def insert(self, rows: Tensor, other: RecurrentLayer) -> None:
        """Put the state of another layer in place of some rows, in place."""
        packed = other.read()
        assert packed is not None
        assert packed[0] is not None
        assert packed[1] is not None
        assert self.position.steps is not None
        ring = torch.empty_like(self.conv_states[0][: len(rows)])
        roll_in_place(ring, self.position.steps[rows], packed[0])
        self.conv_states[0].index_copy_(0, rows, ring)
        self.recurrent_states[0].index_copy_(0, rows, packed[1])
        self.has_previous_state[0] = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i the state of row beam_idx[i], in place."""
        super().reorder_cache(beam_idx)
        if self.recent is not None:
            self.recent.copy_(self.recent.index_select(0, beam_idx.to(self.recent.device)))
        if self.last and self.position.steps is not None:
            steps = self.position.steps
            steps.copy_(steps.index_select(0, beam_idx.to(steps.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.recent is not None:
            self.recent = self.recent.repeat_interleave(repeats, dim=0)
        self._lay_out()
        if self.last and self.position.steps is not None:
            self.position.steps = self.position.steps.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        if self.recent is not None:
            self.recent = self.recent[indices]
        self._lay_out()
        if self.last and self.position.steps is not None:
            self.position.steps = self.position.steps[indices]

    def _lay_out(self) -> None:
        if self.lags:
            for slot, tensor in self._stored():
                slot[0] = lagging.innermost(tensor, 1)


class CountingRingLayer(RingLayer, CountingRecurrentLayer):
    """A `RingLayer` that counts positions, for models without an attention layer."""

    def __init__(self, position: RingPosition, last: bool, lags: bool = False) -> None:
        RingLayer.__init__(self, position, last, lags)
        self.length = 0


class SlotLayer(CacheLayerMixin):
    """Keys and values of an attention layer in memory of a fixed size.

    Chunks are stored one behind the other, the same for all rows, and read back as slices of
    exact length. In single steps each row has a length of its own, see `DecodingCache`.

    Args:
        capacity: Positions that there is room for.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0
        self.keys: Tensor
        self.values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory for rows like these."""
        B, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_zeros(B, heads, self.capacity, head_dim) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a chunk and return everything up to its end.

        Raises:
            UserError: if there is no room.
        """
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            raise UserError(
                f"this cache was made for {self.capacity} positions, the prompt needs {end}: "
                "make it larger or cut the prompt"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Positions of chunks."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions seen with the query, and their offset."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Positions that there is room for."""
        return self.capacity

    def reset(self) -> None:
        """Forget everything, keeping the memory. What lies there is never read again."""
        self.length = 0


class DecodingCache(Cache):
    """Slots for the rows of a batch that decodes in place, each with a length of its own.

    First a prompt is read in chunks, the same positions for all rows. Then `start_steps` says how
    long each row is, and every forward pass of one position advances all rows: nothing is
    allocated and no address changes, so that the pass can be captured in a CUDA graph. Rows can
    be exchanged between passes (`insert`). There is no padding anywhere.

    Args:
        config: The model's configuration.
        rows: Rows of the batch.
        capacity: Positions that attention layers have room for.
        device: Of the model.

    Attributes:
        lengths: Positions that each row has seen, (rows,), int64, on the device.
        longest: A bound on `lengths`, known without asking the device.
        stepping: Whether prompts are over.
    """

    def __init__(
        self, config: H3Config, rows: int, capacity: int, device: torch.device | str = "cpu"
    ) -> None:
        self.ring = RingPosition()
        behind = lags(config, torch.device(device), rows)
        super().__init__(layers=_layers(config, self.ring, lambda: SlotLayer(capacity), behind))
        self.rows, self.capacity = rows, capacity
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.longest = 0
        self.stepping = False

    def start_steps(self, length: int) -> None:
        """From here on every row has seen `length` positions and goes on by itself."""
        self.lengths.fill_(length)
        self.longest = length
        self.stepping = self.ring.stepping = True

    def start_empty(self) -> None:
        """From here on rows come by `insert`."""
        self.start_steps(0)

    def advance(self) -> None:
        """Note that every row advanced by one position.

        A row that has no room left stays where it is and overwrites its last position: rows that
        have ended step with the others until somebody takes their place.
        """
        self.lengths.add_(1).clamp_(max=self.capacity - 1)
        self.longest = min(self.longest + 1, self.capacity - 1)

    def restart(self) -> None:
        """Forget everything, keeping the memory, for another prompt."""
        self.reset()
        self.lengths.zero_()
        if self.ring.steps is not None:
            self.ring.steps.zero_()
        self.longest = 0
        self.stepping = self.ring.stepping = False

    def make_room(self, row: "DecodingCache") -> None:
        """Take memory for all rows, of the kinds that another cache of one row has."""

        def for_all(x: Any) -> Any:
            return None if x is None else x.expand(self.rows, *x.shape[1:])

        for mine, theirs in zip(self.layers, row.layers, strict=True):
            if isinstance(mine, SlotLayer):
                if not mine.is_initialized:
                    mine.lazy_initialization(for_all(theirs.keys), for_all(theirs.values))
            else:
                packed = theirs.read()
                mine.write(tuple(map(for_all, packed)), 0)

    def insert(self, rows: Tensor, other: "DecodingCache", length: int) -> None:
        """Put the rows of another cache, which has read a prompt, in place of some rows here.

        Args:
            rows: Their places, int64.
            other: Its row i goes to place rows[i].
            length: Positions that it has seen.
        """
        assert length <= self.capacity
        if self.ring.steps is not None:
            # sums over a ring are rounded in the order of its slots: a row that starts where all
            # rows start is the same to the last bit whenever it joins
            self.ring.steps.index_fill_(0, rows, 0)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(mine, SlotLayer):
                assert isinstance(theirs, SlotLayer)
                mine.keys[rows, :, :length] = theirs.keys[:, :, :length]
                mine.values[rows, :, :length] = theirs.values[:, :, :length]
            else:
                mine.insert(rows, theirs)
        self.lengths[rows] = length
        self.longest = max(self.longest, length)

    def own_operators(self, operators: dict[int, StepOperators]) -> None:
        """Keep the parameters of single steps, by layer, where a graph finds them."""
        for i, of_layer in operators.items():  # some are views of the parameters themselves
            self.layers[i].operators = StepOperators(*(x.clone() for x in of_layer.tensors()))

    def renew_operators(self, operators: dict[int, StepOperators]) -> None:
        """Put other values in their place."""
        for i, of_layer in operators.items():
            own = self.layers[i].operators.tensors()
            for mine, new in zip(own, of_layer.tensors(), strict=True):
                mine.copy_(new)


def lags(config: H3Config, device: torch.device, rows: int) -> bool:
    """Whether diagonal states of a decoding cache lag behind: where a kernel gains by it."""
    if rows < lagging.FROM_ROWS:
        return False
    modes, taps = config.d_state // 2, config.h3_num_taps or config.d_state
    problem = Problem(1, capability(device), config.h3_head_dim, modes, taps)
    takes = lagging.takes(config.h3_head_dim, config.hidden_size, taps)
    return takes and choose("h3_step", device, torch.float32, problem=problem).backend in KERNELS


def _layers(
    config: H3Config, ring: RingPosition, attention: Any, behind: bool = False
) -> list[Any]:
    """A layer of cache for each layer of the model."""
    counting = "full_attention" not in config.layer_types
    rings = [i for i, name in enumerate(config.mixers) if name == "h3"]
    layers: list[Any] = []
    for i, kind in enumerate(config.layer_types):
        if kind != "linear_attention":
            layers.append(attention())
        elif i in rings:
            kind_of_ring = CountingRingLayer if counting else RingLayer
            layers.append(kind_of_ring(ring, i == rings[-1], behind))
        else:
            layers.append(CountingRecurrentLayer() if counting else RecurrentLayer())
    return layers


def prepare_cache(cache: Cache | None, config: H3Config) -> Cache:
    """Make a cache of this model, or make one of the library's fit it.

    Args:
        cache: None for a new dynamic cache; else a cache of the library, which is changed in
            place as long as it is empty.
        config: The model's configuration.

    Raises:
        ValueError: if the cache belongs to another kind of model.
    """
    if isinstance(cache, DecodingCache):
        return cache
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
    ours = _layers(config, RingPosition(), lambda: None)
    for i, (layer, kind) in enumerate(zip(cache.layers, types, strict=True)):
        fits = isinstance(layer, LinearAttentionLayer) == (kind == "linear_attention")
        if not fits or (kind == "linear_attention" and _used_by_another(layer)):
            raise ValueError(
                f"layer {i} of the cache is a {type(layer).__name__}, the model's is {kind}: "
                f"make it with {type(cache).__name__}(config=model.config, ...)"
            )
        if kind == "linear_attention" and not isinstance(layer, RecurrentLayer):
            cache.layers[i] = ours[i]
    return cache


def check_room(cache: Any, positions: int) -> None:
    """See that the library's static layers can hold so many at all: else a kernel would fail.

    What they hold already is not counted: on a GPU that is a number nobody waits for.

    Raises:
        UserError: if they have not.
    """
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, StaticLayer) and positions > layer.max_cache_len:
            raise UserError(
                f"this cache was made for {layer.max_cache_len} positions, prompt and new tokens "
                f"need {positions}: make it larger or cut the prompt"
            )


def _used_by_another(layer: LinearAttentionLayer) -> bool:
    return not isinstance(layer, RecurrentLayer) and any(layer.has_previous_state.values())


def cache_bytes(cache: Cache) -> int:
    """Memory of everything that the cache stores, in bytes."""
    tensors: list[Tensor | None] = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            tensors += [*layer.conv_states.values(), *layer.recurrent_states.values()]
            tensors.append(getattr(layer, "recent", None))
        else:
            tensors += [layer.keys, layer.values]
    return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
