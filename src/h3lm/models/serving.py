"""Continuous batching: requests join and leave a batch that never stops decoding.

Every request has a slot of fixed memory while it runs: constant states, and keys and values with
a length of their own. A step is one CUDA graph for all slots, whoever sits there; a prompt is read
by itself between two steps and put in a free slot.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from h3lm.errors import UserError
from h3lm.models import decoding
from h3lm.models.cache import DecodingCache
from h3lm.models.decoding import Decoder

FIELDS = {"prompt", "max_new_tokens", "seed"}


@dataclass
class Request:
    """A prompt and what it has become.

    Attributes:
        ids: Prompt, at least one token.
        max_new_tokens: Tokens to generate at most.
        seed: Of its own samples, which do not depend on its neighbours.
        number: Of the caller.
        tokens: What was generated so far, its stop token included.
    """

    ids: list[int]
    max_new_tokens: int
    seed: int = 0
    number: int = 0
    tokens: list[int] = field(default_factory=list)


class RowChooser:
    """Picks a token for each row from random numbers of that row alone.

    A row's noise is a hash of its seed, of how many tokens it has and of the token's id. So the
    choice is the same whichever slot the row sits in and whoever sits beside it; it is not that of
    `generate`, where the rows of a batch share one generator.

    Args:
        rows: Slots.
        known: Ids that may be chosen: those below.
        temperature: 0 takes the likeliest token.
        top_k: Sample among so many likeliest tokens; 0 for all.
        top_p: Sample within this probability mass.
        device: Of the logits.
    """

    def __init__(
        self,
        rows: int,
        known: int,
        temperature: float,
        top_k: int,
        top_p: float,
        device: torch.device,
    ) -> None:
        self.known, self.temperature = known, temperature
        self.top_k, self.top_p = top_k, top_p
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ids = torch.arange(known, device=device)

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each row, from logits (rows, vocab_size)."""
        token = self.choose(logits, self.seeds, self.counts)
        self.counts.add_(1)
        return token

    def choose(self, logits: Tensor, seeds: Tensor, counts: Tensor) -> Tensor:
        """The token number `counts` of rows with these seeds."""
        logits = logits[:, : self.known]
        if self.temperature == 0:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        if 0 < self.top_k < self.known:
            scores = scores.masked_fill(scores < scores.topk(self.top_k)[0][:, -1:], -torch.inf)
        if self.top_p < 1:
            scores = _within_mass(scores, self.top_p)
        # the largest of score plus Gumbel noise is a sample of the softmax
        keys = _mix(_mix(seeds) + counts)[:, None] + self.ids
        # as many bits as stay below 1 in the widest float of the device
        wide, bits = (torch.float32, 23) if keys.device.type == "mps" else (torch.float64, 52)
        uniform = (_shifted(_mix(keys), 64 - bits).to(wide) + 0.5) * 2.0**-bits
        return (scores - torch.log(-torch.log(uniform))).argmax(-1)


class Slots:
    """A batch of a fixed number of rows that requests come to and leave.

    Args:
        model: An `H3ForCausalLM` in eval mode.
        rows: Slots.
        capacity: Positions of a slot, prompt and new tokens together.
        temperature, top_k, top_p: As in `RowChooser`.
        stop: Tokens that end a request.

    Raises:
        UserError: if so many slots do not fit; says how many would.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        capacity: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Iterable[int] = (),
    ) -> None:
        self.model, self.stop = model, set(stop)
        known = model.config.tokenizer_vocab_size or model.config.vocab_size
        self.choose = RowChooser(rows, known, temperature, top_k, top_p, model.device)
        # a row may step once more before the host knows that it has ended
        self.cache = decoding.new_cache(model, rows, capacity + 1)
        self.decoder = Decoder(model, self.cache, self.choose)
        if model.device.type == "cuda":
            self.decoder.capture()
        else:
            self.decoder.allocate()
        self.cache.start_empty()
        self.running: list[Request | None] = [None] * rows

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yield requests as they end; memory holds those that run and no others.

        Raises:
            UserError: if a request has no prompt or is longer than a slot.
        """
        waiting = iter(requests)
        riders: list[Request | None] = []  # who takes part in the newest step
        more = True
        while True:
            while more and None in self.running:
                request = next(waiting, None)
                more = request is not None
                if request is not None and self._join(request):
                    yield request
            if not any(self.running):
                return
            self.decoder.reader.send(self.decoder.token)
            self.decoder.step()
            present = list(self.running)
            tokens = self.decoder.reader.receive().tolist()  # of the step before
            yield from self._look_at(riders, tokens)
            riders = present

    def _look_at(self, riders: list[Request | None], tokens: list[int]) -> Iterator[Request]:
        """Give the tokens of a step to those who took part and have not ended since."""
        for row, request in enumerate(riders):
            if request is None or self.running[row] is not request:
                continue
            if self._add(request, tokens[row]):
                self.running[row] = None
                yield request

    @torch.no_grad()
    def _join(self, request: Request) -> bool:
        """Read a prompt and give it a slot; returns whether its first token was its last."""
        length = len(request.ids)
        if length == 0:
            raise UserError(f"request {request.number} has no prompt")
        if length + request.max_new_tokens > self.cache.capacity - 1:
            raise UserError(
                f"request {request.number} needs {length} + {request.max_new_tokens} positions, "
                f"a slot has {self.cache.capacity - 1}: shorten it or make the slots longer"
            )
        row = self.running.index(None)
        device = self.cache.lengths.device
        place = torch.tensor([row], device=device)
        seed = torch.tensor([request.seed], device=device)
        own = DecodingCache(self.model.config, 1, length, device)
        ids = torch.tensor([request.ids], device=device)
        logits = decoding.read_prompt(self.model, own, ids)
        token = self.choose.choose(logits, seed, torch.zeros_like(seed))
        if self._add(request, int(token)):
            return True
        self.cache.insert(place, own, length)
        self.decoder.token[place] = token
        self.choose.seeds[place], self.choose.counts[place] = seed, 1
        self.running[row] = request
        return False

    def _add(self, request: Request, token: int) -> bool:
        request.tokens.append(token)
        return token in self.stop or len(request.tokens) >= request.max_new_tokens


def read_requests(path: Path, encode: Any, max_new_tokens: int, seed: int) -> list[Request]:
    """Requests of a file with a JSON object in each line.

    Args:
        path: Lines such as {"prompt": "Once", "max_new_tokens": 20, "seed": 1}.
        encode: Text to ids.
        max_new_tokens: Of requests that do not say.
        seed: Of requests that do not say; each gets one of its own, seed + line.

    Raises:
        UserError: if the file cannot be read or a line is not a request; says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            fields = _request_fields(f"{path}, line {number}", line)
            count = fields.get("max_new_tokens", max_new_tokens)
            own_seed = fields.get("seed", seed + number)
            ids = [int(i) for i in encode(fields["prompt"])]
            if not ids:
                raise UserError(f"{path}, line {number}: the prompt is empty")
            requests.append(Request(ids, count, own_seed, number))
    if not requests:
        raise UserError(f"{path} has no requests")
    return requests


def _request_fields(where: str, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise UserError(f'{where}: needs an object with a "prompt", a text')
    unknown = sorted(set(fields) - FIELDS)
    if unknown:
        raise UserError(f"{where}: {unknown[0]!r} is not one of {', '.join(sorted(FIELDS))}")
    for name, least in (("max_new_tokens", 1), ("seed", 0)):
        value = fields.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
            raise UserError(f"{where}: {name} must be a whole number from {least} on")
    return fields


def _within_mass(scores: Tensor, top_p: float) -> Tensor:
    """Leave the likeliest tokens that hold the mass together, the first one always."""
    ordered, order = scores.sort(descending=True)
    mass = ordered.softmax(-1)
    out = mass.cumsum(-1) - mass >= top_p
    return scores.masked_fill(out.scatter(1, order, out), -torch.inf)


def _mix(x: Tensor) -> Tensor:
    """A hash of 64-bit integers whose bits are as good as random (the finaliser of SplitMix64).

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    x = x * -7046029254386353131 + 1442695040888963407
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
