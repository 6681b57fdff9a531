"""Model folders: weights, configuration and tokenizer together."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from h3lm.errors import UserError
from h3lm.models.configuration_h3 import H3Config
from h3lm.models.modeling_h3 import H3ForCausalLM, H3PreTrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def save_model(
    model: H3PreTrainedModel,
    out_dir: str | Path,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a folder that `from_pretrained` loads, tokenizer included.

    The configuration learns how many ids the tokenizer has, so that `generate` emits no others.
    A model that is sharded between processes needs its `weights` given, gathered.

    Raises:
        UserError: if the tokenizer has more ids than the model, or the folder cannot be written.
    """
    if tokenizer is not None and isinstance(model, H3ForCausalLM):
        fit_tokenizer(model, tokenizer)
    if Path(out_dir).is_file():  # of which transformers only warns, and saves nothing
        raise UserError(f"{out_dir}: cannot write the model there: it is a file")
    try:
        with _no_progress_bars():
            model.save_pretrained(out_dir, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(out_dir)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out_dir}: cannot write the model there: {error}") from None


def fit_tokenizer(model: H3ForCausalLM, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Tell the model which ids and special tokens its tokenizer has.

    Raises:
        UserError: if the tokenizer has ids that the model lacks.
    """
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} ids, the model only {model.config.vocab_size}"
        )
    model.config.tokenizer_vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name)
        if value is not None:
            setattr(model.config, name, value)
            setattr(model.generation_config, name, value)


def load_config(folder: str | Path) -> H3Config:
    """Read the configuration of a model folder, or of a model of the hub by its name.

    Raises:
        UserError: if there is no model, or its configuration is damaged.
    """
    with _loading(folder):
        config = H3Config.from_pretrained(folder)
        assert isinstance(config, H3Config)
        return config


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> H3ForCausalLM:
    """Load a model folder, or a model of the hub by its name, for inference.

    Raises:
        UserError: if there is no model, or it is damaged.
    """
    with _loading(folder):
        model = H3ForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    return model.to(device).eval()


@contextmanager
def _loading(folder: str | Path) -> Iterator[None]:
    """Say in one line what is wrong with a folder that is being loaded."""
    path = Path(folder)
    if path.exists() and not (path / "config.json").is_file():
        inside = path / "model"  # where a training run keeps it
        there = f"; {inside} is one" if (inside / "config.json").is_file() else ""
        raise UserError(f"{folder}: not a model folder, it has no config.json{there}")
    if path.exists():
        _check_kind(path)
    if not path.exists() and (path.is_absolute() or str(folder).startswith(".")):
        raise UserError(f"{folder}: no such model folder")
    try:
        with _no_progress_bars():
            yield
    except SafetensorError as error:
        raise UserError(f"{folder}: model.safetensors is damaged: {error}") from None
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        here = "" if path.exists() else "there is no such folder, and as a name on the hub: "
        raise UserError(f"{folder}: cannot load this model: {here}{first}") from None


def _check_kind(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # loading says what is wrong with it
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in (None, H3Config.model_type):
        raise UserError(
            f"{folder}: its config.json is of a model of type {kind!r}; this is for language "
            f"models of type {H3Config.model_type!r}"
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without the library's bars: a model of ours is there before one could be read."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
