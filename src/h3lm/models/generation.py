"""Text in, text out."""

import json
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, set_seed
from transformers.generation.streamers import BaseStreamer

from h3lm.data.tokenizers import encode
from h3lm.errors import UserError
from h3lm.models.folders import load_model
from h3lm.models.modeling_h3 import H3ForCausalLM
from h3lm.models.serving import Slots, read_requests


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name; "auto" takes a GPU if there is one.

    Raises:
        UserError: if the device is unknown or not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def answer(
    model: str, prompt: str | None, requests: str | None, *, slots: int, **options: Any
) -> Generator[str, None, None]:
    """The text of `stream_text`, or the lines of `serve_text`: what `h3lm generate` prints.

    Raises:
        UserError: if there is neither a prompt nor a file of requests, or both; and theirs.
    """
    if (prompt is None) == (requests is None):
        raise UserError("give --prompt or --requests, one of them")
    if prompt is not None:
        yield from stream_text(model, prompt, **options)
    elif requests is not None:
        for i, line in enumerate(serve_text(model, requests, slots=slots, **options)):
            yield f"\n{line}" if i else line


def stream_text(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    device: str = "auto",
) -> Iterator[str]:
    """Load a model folder and continue a prompt, yielding text as it is made.

    Memory does not grow with the text but for attention's keys and values.

    Raises:
        UserError: if the model or its tokenizer cannot be loaded, the tokenizer cannot spell the
            prompt, it has ids that the model lacks, or the sampling options contradict each other.
    """
    check_sampling(temperature, top_p, top_k)
    where = pick_device(device)
    loaded = load_model(model, device=where, dtype=_inference_dtype(where))
    tokenizer = load_tokenizer_of(model)
    ids = torch.from_numpy(encode(tokenizer, prompt)).long()[None]
    if ids.shape[1] == 0:
        start = (
            tokenizer.bos_token_id
            if tokenizer.bos_token_id is not None
            else (tokenizer.eos_token_id)
        )
        if start is None:
            raise UserError("the prompt is empty and the tokenizer has no token to begin with")
        ids = torch.tensor([[start]])
    if seed is not None:
        set_seed(seed)
    yield prompt
    yield from continue_ids(
        loaded,
        tokenizer,
        ids.to(where),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )


def continue_ids(
    model: H3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Iterator[str]:
    """Continue one prompt (1, L) by sampling, yielding text as it is made.

    Raises:
        UserError: if the prompt has ids that the model lacks.
    """
    known = model.config.tokenizer_vocab_size or model.config.vocab_size
    if int(ids.max()) >= known or int(ids.min()) < 0:
        raise UserError(
            f"the prompt has ids from {int(ids.min())} to {int(ids.max())}, "
            f"the model knows 0 to {known - 1}: the tokenizer is not its own"
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    streamer = _TextStreamer(tokenizer)
    failure: list[BaseException] = []

    def run() -> None:
        try:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=_pad_id(model),
                streamer=streamer,
                **sampling,
            )
        except _NobodyListens:
            pass
        except BaseException as error:  # handed to the caller's thread
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        # also where the caller stops listening, as by Ctrl-C: a process that ends while a thread
        # is within PyTorch is aborted
        streamer.closed = True
        thread.join()
    if failure:
        raise failure[0]


def serve_text(
    model: str,
    requests: str,
    *,
    slots: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    device: str = "auto",
) -> Iterator[str]:
    """Load a model folder and run the requests of a file, yielding JSON lines as they end.

    A line has the request's line in the file, its prompt and what follows it. The prompt's tokens
    and what was generated are the same whatever else the file has.

    Raises:
        UserError: if the model or its tokenizer cannot be loaded, a line of the file is not a
            request, the slots do not fit, or the sampling options contradict each other.
    """
    check_sampling(temperature, top_p, top_k)
    where = pick_device(device)
    loaded = load_model(model, device=where, dtype=_inference_dtype(where))
    tokenizer = load_tokenizer_of(model)
    jobs = read_requests(
        Path(requests), partial(encode, tokenizer), max_new_tokens, 0 if seed is None else seed
    )
    stop = loaded.generation_config.eos_token_id
    batch = Slots(
        loaded,
        min(slots, len(jobs)),
        max(len(job.ids) + job.max_new_tokens for job in jobs),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=[] if stop is None else [stop] if isinstance(stop, int) else stop,
    )
    for done in batch.run(jobs):
        prompt, text = (
            tokenizer.decode(ids, skip_special_tokens=True) for ids in (done.ids, done.tokens)
        )
        line = {"line": done.number, "prompt": prompt, "text": text, "tokens": len(done.tokens)}
        yield json.dumps(line, ensure_ascii=False)


def check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    """Refuse options that contradict each other.

    Raises:
        UserError: if sampling is narrowed down where nothing is sampled.
    """
    narrowed = [name for name, on in (("top_p", top_p < 1), ("top_k", top_k > 0)) if on]
    if temperature == 0 and narrowed:
        raise UserError(
            f"temperature 0 always takes the likeliest token, which contradicts "
            f"{' and '.join(narrowed)}: leave that out or raise the temperature"
        )


def load_tokenizer_of(model: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder.

    Raises:
        UserError: if the folder has none.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{model}: this model folder has no tokenizer; put one there with save_pretrained, or "
            "convert again with --tokenizer"
        ) from None


def _inference_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _pad_id(model: H3ForCausalLM) -> int:
    config = model.generation_config
    for value in (config.pad_token_id, config.eos_token_id):
        if value is not None:
            return value[0] if isinstance(value, list) else value
    return 0


class _NobodyListens(Exception):
    """Ends a generation behind its step."""


class _TextStreamer(BaseStreamer):
    """Yields text as soon as it is certain, byte-level tokens of one character together.

    transformers' own streamer holds a word back until a space follows it, which a text of
    characters may not have for long.

    Attributes:
        closed: Whether nobody listens any more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.queue: SimpleQueue[str | None] = SimpleQueue()
        self.pending: list[int] = []
        self.prompt_seen = False
        self.closed = False

    def put(self, value: Tensor) -> None:
        if self.closed:
            raise _NobodyListens
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.pending += value.flatten().tolist()
        text = self.tokenizer.decode(self.pending, skip_special_tokens=True)
        if not text.endswith("�"):  # the first bytes of a character
            self.queue.put(text)
            self.pending = []

    def end(self) -> None:
        if self.pending:
            self.queue.put(self.tokenizer.decode(self.pending, skip_special_tokens=True))
        self.queue.put(None)

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                piece = self.queue.get(timeout=1.0)
            except Empty:
                continue
            if piece is None:
                return
            yield piece
