"""What a run leaves behind when it is done."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from h3lm.evals.figures import figure
from h3lm.models.folders import load_model, save_model
from h3lm.models.generation import continue_ids
from h3lm.train.arguments import precision_of
from h3lm.train.corpus import HeldOut
from h3lm.train.parallel import is_sharded, whole_weights
from h3lm.train.processes import is_first, world_size
from h3lm.train.progress import plot_losses
from h3lm.train.recipe import Recipe
from h3lm.train.trainer import H3Trainer, sum_of_scores


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        folder: The run's folder; the trained model lies in `model` in it.
        summary: What `summary.json` there says.
    """

    folder: Path
    summary: dict[str, Any]


def finish(trainer: H3Trainer, test: list[HeldOut], tokenizer: Any, console: Console) -> Result:
    """Evaluate, save, draw and sample; print where things lie. All processes must come here."""
    recipe, model, folder = trainer.recipe, trainer.model, trainer.recipe.folder
    metrics = trainer.evaluate()
    tested = sum_of_scores([trainer.score(text) for text in test]) if test else None
    summary: dict[str, Any] = {
        "name": recipe.name,
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.state.global_step * recipe.batch_size * recipe.block_length,
        "train_seconds": round(trainer.trained_s, 2),
        "precision": precision_of(trainer.args),
        "processes": world_size(),
        "data": trainer.data,
    }
    weights = whole_weights(model) if is_sharded(model) else None
    if not is_first():
        return Result(folder, summary)
    save_model(model, folder / "model", tokenizer, weights)
    if trainer.valid:
        summary |= _score_summary(recipe, "val", trainer.valid, metrics["eval_loss"])
        if len(trainer.valid) > 1:
            by_source = {one.source: metrics[f"eval_loss_{one.source}"] for one in trainer.valid}
            summary["val_loss_by_source"] = by_source
        found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        best = min(found, key=lambda entry: entry["eval_loss"])
        summary |= {"best_val_loss": best["eval_loss"], "best_step": best["step"]}
        console.print(_told("validation", trainer.valid, metrics["eval_loss"]), highlight=False)
    if tested is not None:
        summary |= _score_summary(recipe, "test", test, tested.loss)
        console.print(_told("test", test, tested.loss), highlight=False)
    plot_losses(trainer.state.log_history, folder / "loss.png", recipe.name)
    if recipe.sample:
        summary["sample"] = _sample(recipe, folder / "model", tokenizer, trainer.args.device)
        console.print(summary["sample"], highlight=False, markup=False)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"model {folder / 'model'}\nloss curve {folder / 'loss.png'}\n"
        f"summary {folder / 'summary.json'}",
        highlight=False,
    )
    return Result(folder, summary)


def _sample(recipe: Recipe, folder: Path, tokenizer: Any, device: torch.device) -> str:
    """What the saved model, which is whole, continues the recipe's prompt with."""
    model = load_model(folder, device=device)
    ids = tokenizer(recipe.sample, return_tensors="pt", add_special_tokens=False).input_ids
    pieces = continue_ids(
        model, tokenizer, ids.to(model.device), max_new_tokens=recipe.sample_tokens
    )
    return "".join(pieces)


def _score_summary(recipe: Recipe, split: str, texts: list[HeldOut], loss: float) -> dict[str, Any]:
    unit = "char" if texts[0].characters else "token"
    return {
        f"{split}_loss": loss,
        f"{split}_perplexity": figure("perplexity", loss, 1),
        f"{split}_bits_per_{unit}": bits(loss),
        f"{split}_tokens": sum(text.predicted for text in texts),
        f"{split}_context": recipe.block_length,
        f"{split}_stride": recipe.eval_stride or recipe.block_length,
    }


def _told(split: str, texts: list[HeldOut], loss: float) -> str:
    unit = "character" if texts[0].characters else "token"
    return (
        f"{split} loss {loss:.4f} nats, perplexity {figure('perplexity', loss, 1):.2f}, "
        f"{bits(loss):.4f} bits per {unit}"
    )


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)
