"""Decoding without host work: one forward pass over fixed memory, replayed as a CUDA graph.

The loop of transformers does eager work at every token. `generate` here is that loop for the
options it knows (`H3ForCausalLM._sample` asks `refusal`): the prompt is read in chunks, then every
step is the same pass of the same model code over a `DecodingCache`, with the choice of the token
behind it. The host sees tokens one step late, while the next step runs already; what it finds out
too late (a row has stopped) it mends in its own copy. Without CUDA the same loop runs the pass
eagerly.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from h3lm.errors import UserError
from h3lm.flashconv import StepOperators, lagging
from h3lm.layers import H3
from h3lm.models import kept
from h3lm.models.cache import DecodingCache, lags
from h3lm.models.capture import capturing
from h3lm.models.sampling import Chooser, unknown_processor

CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
ARGUMENTS = {
    "attention_mask", "past_key_values", "position_ids", "use_cache", "logits_to_keep", "tokenizer",
}  # fmt: skip
PREFILL_TOKENS = {"cuda": 2**16, "cpu": 4096}  # of all rows, that are in memory at a time
GRAPH_DEVICES = {"cuda"}
GRAPH_FROM = 8  # steps from which capturing pays
ROUND = 64  # capacities are multiples of this


def check_prompts(ids: Tensor, arguments: dict[str, Any]) -> None:
    """Check that there is something to continue in every row.

    Raises:
        UserError: if there are no rows, or one has no prompt.
    """
    mask = arguments.get("attention_mask")
    if not len(ids):
        raise UserError("generate was given a batch without rows")
    if not ids.shape[1] and arguments.get("inputs_embeds") is None:
        raise UserError("the prompt is empty: begin with a token, such as the end of text")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.any(1).all()):
        row = int(mask.any(1).logical_not().nonzero()[0])
        raise UserError(f"row {row} has no prompt: its attention_mask is 0 everywhere")


def refusal(
    model: Any,
    ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    synced_gpus: bool,
    arguments: dict[str, Any],
) -> str | None:
    """Why a call of `generate` is not for this loop; None if it is."""
    cache = arguments.get("past_key_values")
    stranger = next((type(c).__name__ for c in criteria if type(c) not in CRITERIA), None)
    unknown = sorted(k for k, v in arguments.items() if v is not None and k not in ARGUMENTS)
    if not config.use_cache or not getattr(cache, "made_by_generate", False):
        return "it has a cache of its own, or none"
    if config.return_dict_in_generate or synced_gpus:
        return "more than tokens is asked for"
    if unknown_processor(processors) or stranger:
        return f"{unknown_processor(processors) or stranger} is not known here"
    if unknown:
        return f"the model is given {', '.join(unknown)}"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model is spread over devices"
    head = getattr(model.lm_head, "weight", None)
    if not (isinstance(head, Tensor) and head.is_floating_point()) or head.is_meta:
        return "the head's weights are quantised or elsewhere"
    if ids.shape[1] == 0 or _steps(criteria, ids) < 1:
        return "the prompt is no ids or nothing is to be generated"
    if config.prefill_chunk_size is not None and config.prefill_chunk_size < 1:
        return "prefill_chunk_size is no size"
    if not _counts_positions(arguments.get("position_ids"), arguments.get("attention_mask")):
        return "positions are given"
    if model.training or torch.is_grad_enabled():
        return "gradients may be wanted"
    return None


def generate(
    model: Any,
    ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    streamer: Any = None,
    attention_mask: Tensor | None = None,
    **ignored: Any,
) -> Tensor:
    """What the library's loop does, for what `refusal` does not refuse.

    Args:
        model: An `H3ForCausalLM`.
        ids: Prompts, (B, L).
        processors: Processors of logits.
        criteria: When to stop.
        config: A resolved `GenerationConfig`.
        streamer: Is given tokens as they come.
        attention_mask: Zeros where a prompt is padded, (B, L).
        ignored: What follows from the rest.

    Returns:
        Prompts and what follows them, (B, up to the longest).

    Raises:
        UserError: if the batch does not fit.
    """
    ids = ids.to(model.device)
    steps = _steps(criteria, ids)
    rows, positions = ids.shape[0], ids.shape[1] + steps
    key = None
    if ids.device.type in GRAPH_DEVICES:
        key = kept.key(model, rows, capacity_for(positions), processors, config.do_sample)
    decoder = kept.take(model, key)
    if decoder is None:
        cache = new_cache(model, rows, positions)
        logits_of = model.lm_head.out_features
        chooser = Chooser(processors, config.do_sample, rows, logits_of, ids.device)
        decoder = Decoder(model, cache, chooser)
        if ids.device.type in GRAPH_DEVICES and steps >= GRAPH_FROM:
            decoder.capture()
    prefill(model, decoder.cache, decoder, ids, attention_mask, config.prefill_chunk_size)
    decoder.chooser.start(ids)
    decoder.choose()
    text = _Text(ids, steps, criteria, config, streamer)
    for tokens in decoder.tokens(steps):
        if text.add(tokens):
            break
    kept.keep(model, key, decoder)
    if streamer is not None:
        streamer.end()
    return text.result().to(ids.device)


def capacity_for(positions: int) -> int:
    """Positions of a cache in which so many are used."""
    return -(-(positions + 1) // ROUND) * ROUND  # one step runs ahead of the last token


def new_cache(model: Any, rows: int, positions: int) -> DecodingCache:
    """A decoding cache for a model, after a look whether it fits.

    Raises:
        UserError: if the device has not the memory; says how many rows would fit.
    """
    kept.forget()
    capacity = capacity_for(positions)
    room = _free_bytes(model.device)
    need = bytes_of_row(model, capacity, rows)
    if room is not None and rows * need > room:
        fits = f"a batch of {room // need} fits" if room >= need else "not even one row fits"
        raise UserError(
            f"{rows} rows of {capacity} positions need {rows * need / 2**30:.1f} GiB of keys, "
            f"values and states, {room / 2**30:.1f} GiB are free: {fits}"
        )
    return DecodingCache(model.config, rows, capacity, model.device)


def bytes_of_row(model: Any, capacity: int, rows: int = 64) -> int:
    """Memory of one row of a decoding cache with so many; few of them may need less."""
    config = model.config
    width = model.lm_head.weight.dtype.itemsize
    attention = len(config.attention_layers) * 2 * capacity * config.hidden_size * width
    shift = (config.h3_num_taps or config.d_state) * config.hidden_size * width
    diagonal = config.hidden_size * config.h3_head_dim * config.d_state * 4
    recent = 2 * lagging.BLOCK * config.hidden_size * 4 if lags(config, model.device, rows) else 0
    return attention + config.mixers.count("h3") * (shift + diagonal + recent)


class Decoder:
    """Steps of a batch: forward pass, choice of the token, all on the device.

    Args:
        model: An `H3ForCausalLM` in eval mode.
        cache: Fixed memory for its states.
        chooser: Picks the token of each row from logits (rows, vocab_size), on the device.

    Attributes:
        token: The newest token of each row, (rows,), int64, at a fixed address.
    """

    def __init__(
        self, model: Any, cache: DecodingCache, chooser: Callable[[Tensor], Tensor]
    ) -> None:
        self.model, self.cache, self.chooser = model, cache, chooser
        device = cache.lengths.device
        self.token = torch.zeros(cache.rows, dtype=torch.int64, device=device)
        self.logits = torch.zeros(
            cache.rows, model.lm_head.out_features, dtype=model.lm_head.weight.dtype, device=device
        )
        self.graph: Any = None
        self.reader = _Reader(cache.rows, device)
        self.paused: torch.cuda.Event | None = None

    @torch.no_grad()
    def capture(self) -> None:
        """Record a step as a CUDA graph. What the cache holds is lost: prompts come later."""
        self.allocate()
        self.graph = self.record()
        self.cache.restart()

    @torch.no_grad()
    def record(self) -> Any:
        """A step as a CUDA graph.

        Everything that a step touches must be in its place, every kernel compiled and every
        library warmed up before; the generator is put back to where it was.
        """
        device = self.token.device
        random = torch.cuda.get_rng_state(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._advance()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, stream=stream):
            self._advance()
        torch.cuda.set_rng_state(random, device)
        return graph

    def pause(self) -> None:
        """Let go of the model, for a time without a call: its life must not depend on ours."""
        self.model = None
        if self.token.is_cuda:
            self.paused = torch.cuda.Event()
            self.paused.record()

    @torch.no_grad()
    def resume(self, model: Any) -> None:
        """Serve another call: an empty cache, and parameters of steps as they are now."""
        self.model = model
        if self.paused is not None:  # the last call's last step, perhaps on another stream
            torch.cuda.current_stream(self.token.device).wait_event(self.paused)
        self.cache.restart()
        self.cache.renew_operators(self._operators())

    @torch.no_grad()
    def allocate(self) -> None:
        """Put all states in their place, as one row that reads a token has them; parameters too."""
        one = DecodingCache(self.model.config, 1, 1, self.token.device)
        self.model(input_ids=self.token[:1, None], past_key_values=one, use_cache=True)
        self.cache.make_room(one)
        self.cache.start_steps(1)
        self.cache.own_operators(self._operators())

    def _operators(self) -> dict[int, StepOperators]:
        layers = zip(self.model.model.layers, self.cache.layers, strict=True)
        return {
            i: layer.mixer.step_operators(lags=stored.lags)
            for i, (layer, stored) in enumerate(layers)
            if isinstance(layer.mixer, H3)
        }

    @torch.no_grad()
    def choose(self) -> None:
        """Pick the first token from the logits of the prompt."""
        self.token.copy_(self.chooser(self.logits))

    @torch.no_grad()
    def step(self) -> None:
        """Read the newest token of every row and choose the next one."""
        if self.graph is None:
            self._advance()
        else:
            self.graph.replay()

    def tokens(self, count: int) -> Iterator[Tensor]:
        """The newest tokens on the host, `count` times, while the next step runs already."""
        for left in range(count, 0, -1):
            self.reader.send(self.token)
            if left > 1:
                self.step()
            yield self.reader.receive()

    def _advance(self) -> None:
        output = self.model(
            input_ids=self.token[:, None], past_key_values=self.cache, use_cache=True
        )
        self.token.copy_(self.chooser(output.logits[:, -1]))
        self.cache.advance()


@torch.no_grad()
def prefill(
    model: Any,
    cache: DecodingCache,
    decoder: Decoder,
    ids: Tensor,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> None:
    """Read prompts into a cache and leave the logits behind them in the decoder.

    Rows of equal length go together; where lengths differ, every group is read without its
    padding into a cache of its own, and its rows are put in their places.

    Args:
        model: An `H3ForCausalLM`.
        cache: An empty cache.
        decoder: Takes the logits.
        ids: (B, L).
        mask: Zeros at padding, (B, L).
        chunk: Positions that are read at a time; a fixed number of tokens if None.
    """
    if mask is None or bool(mask.all()):
        decoder.logits.copy_(read_prompt(model, cache, ids, chunk))
        cache.start_steps(ids.shape[1])
        if decoder.graph is None:
            cache.own_operators(decoder._operators())
        return
    if decoder.graph is None:
        decoder.allocate()
    cache.start_empty()
    lengths = mask.bool().sum(1)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        prompt = ids[rows][mask[rows].bool()].view(len(rows), length)
        own = DecodingCache(model.config, len(rows), length, ids.device)
        decoder.logits[rows] = read_prompt(model, own, prompt, chunk)
        cache.insert(rows, own, length)


@torch.no_grad()
def read_prompt(model: Any, cache: DecodingCache, ids: Tensor, chunk: int | None = None) -> Tensor:
    """Read prompts of equal length in chunks; returns the logits behind them, (B, vocab_size)."""
    if chunk is None:
        tokens = PREFILL_TOKENS.get(ids.device.type, PREFILL_TOKENS["cpu"])
        step = ROUND if tokens // len(ids) >= ROUND else 16
        chunk = max(step, tokens // len(ids) // step * step)
    for part in ids.split(chunk, dim=1):
        output = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1]


class _Reader:
    """Brings tokens to the host behind the device's back."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=self.cuda)
        self.event = torch.cuda.Event() if self.cuda else None

    def send(self, tokens: Tensor) -> None:
        self.tokens.copy_(tokens, non_blocking=True)
        if self.event is not None:
            self.event.record()

    def receive(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.tokens


class _Text:
    """The host's copy of what was generated, where rows end as they should."""

    def __init__(self, ids: Tensor, steps: int, criteria: Any, config: Any, streamer: Any) -> None:
        B, self.length = ids.shape
        self.ids = torch.zeros(B, self.length + steps, dtype=torch.int64)
        self.ids[:, : self.length] = ids.cpu()
        self.criteria, self.streamer = criteria, streamer
        self.ended = torch.zeros(B, dtype=torch.bool)
        # as the library: without a stop token, a row goes on until all have ended
        pads = any(hasattr(c, "eos_token_id") for c in criteria)
        pad = config._pad_token_tensor
        self.pad = int(pad) if pads and pad is not None else None

    def add(self, tokens: Tensor) -> bool:
        """Add a token to each row; returns whether all rows have ended."""
        tokens = tokens.clone()
        if self.pad is not None:
            tokens[self.ended] = self.pad
        self.ids[:, self.length] = tokens
        self.length += 1
        if self.streamer is not None:
            self.streamer.put(tokens)
        self.ended |= self.criteria(self.result(), None)
        return bool(self.ended.all())

    def result(self) -> Tensor:
        return self.ids[:, : self.length]


def _steps(criteria: Any, ids: Tensor) -> int:
    """How many tokens may follow the prompts."""
    limit = criteria.max_length
    return 0 if limit is None else limit - ids.shape[1]


def _counts_positions(positions: Tensor | None, mask: Tensor | None) -> bool:
    """Whether positions are those of unpadded text, as the library makes them."""
    if positions is None:
        return True
    if mask is None:
        return bool((positions == torch.arange(positions.shape[1], device=positions.device)).all())
    mask = mask.bool().to(positions.device)
    return bool(((positions == mask.long().cumsum(1) - 1) | ~mask).all())


def _free_bytes(device: torch.device) -> int | None:
    """Memory that a new cache may take; None where that is not known."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # reading prompts takes some too
    return int(0.95 * (torch.cuda.mem_get_info(device)[0] + unused))


def largest_batch(model: Any, positions: int, room: int | None = None) -> int:
    """Rows of so many positions that fit on the model's device (or into `room` bytes)."""
    room = _free_bytes(model.device) if room is None else room
    assert room is not None
    return room // bytes_of_row(model, positions)
