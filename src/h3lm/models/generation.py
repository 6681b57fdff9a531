"""Text in, text out."""

from collections.abc import Iterator
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

PREFILL_CHUNK = 4096  # tokens of a prompt that are in memory at a time


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
            prompt, or it has ids that the model lacks.
    """
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
    if ids.shape[1] > PREFILL_CHUNK:
        sampling["prefill_chunk_size"] = PREFILL_CHUNK
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
        except BaseException as error:  # handed to the caller's thread
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]


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


class _TextStreamer(BaseStreamer):
    """Yields text as soon as it is certain, byte-level tokens of one character together.

    transformers' own streamer holds a word back until a space follows it, which a text of
    characters may not have for long.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.queue: SimpleQueue[str | None] = SimpleQueue()
        self.pending: list[int] = []
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
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
