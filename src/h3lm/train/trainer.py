"""Training on Hugging Face's Trainer: what is ours on top of it."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from h3lm.data.blocks import Blocks
from h3lm.errors import UserError
from h3lm.evals.perplexity import score_tokens
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.models.folders import fit_tokenizer, load_model, save_model
from h3lm.models.generation import continue_ids
from h3lm.train.corpus import (
    BlockCollator,
    BlockDataset,
    HeldOut,
    held_out,
    prepared_folder,
    tokenizer_of,
)
from h3lm.train.param_groups import describe_groups, parameter_groups
from h3lm.train.progress import ProgressLine, StopAfter, plot_losses, write_log
from h3lm.train.recipe import Recipe
from h3lm.train.schedule import learning_rate_factor

NO_LIMIT = 10**9  # steps of a run that the clock ends


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        folder: The run's folder; the trained model lies in `model` in it.
        summary: What `summary.json` there says.
    """

    folder: Path
    summary: dict[str, Any]


class H3Trainer(Trainer):
    """The library's trainer with our parameter groups, schedule and evaluation.

    Args:
        recipe: The run.
        valid: Validation text, if there is any.
        arguments: As for `Trainer`.
    """

    model: H3ForCausalLM

    def __init__(self, recipe: Recipe, valid: HeldOut | None, **arguments: Any) -> None:
        self.recipe, self.valid = recipe, valid
        self.clock = None if recipe.time_limit_s is None else StopAfter(recipe.time_limit_s)
        super().__init__(**arguments)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if self.clock is not None:
            self.add_callback(self.clock)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the groups that the modules ask for."""
        if self.optimizer is None:
            recipe = self.recipe
            groups = parameter_groups(
                model if model is not None else self.model,
                learning_rate=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                ssm_max_learning_rate=recipe.ssm_max_learning_rate,
            )
            for group in groups:
                group.pop("names")
            self.optimizer = AdamW(
                groups,
                lr=recipe.learning_rate,
                betas=(recipe.beta1, recipe.beta2),
                eps=recipe.adam_epsilon,
                fused=True,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """The recipe's schedule, by steps or by the clock."""
        if self.lr_scheduler is None:
            clock = self.clock

            def factor(step: int) -> float:
                progress = step / num_training_steps if clock is None else clock.progress
                return learning_rate_factor(self.recipe, progress)

            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), factor)
        return self.lr_scheduler

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean validation loss of a token, by the code of `h3lm eval`."""
        if self.valid is None:
            return {}
        score = score_tokens(
            self.model,
            self.valid.tokens,
            first=self.valid.first,
            context=self.recipe.block_length,
            stride=self.recipe.eval_stride,
            batch_size=max(1, self.args.per_device_train_batch_size),
        )
        metrics = {"eval_loss": score.loss, "eval_perplexity": score.perplexity}
        self.log(metrics)
        return metrics


def build_config(recipe: Recipe, vocab_size: int) -> H3Config:
    """The model that a recipe describes.

    Raises:
        UserError: if its fields are unknown or do not fit together.
    """
    chosen = {"vocab_size": -8 * (-vocab_size // 8)} | dict(recipe.model)
    try:
        if recipe.preset is not None:
            return H3Config.from_preset(recipe.preset, recipe.mixers, **chosen)
        unknown = sorted(set(chosen) - set(H3Config().to_dict()))
        if unknown:
            raise ValueError(f"H3Config has no field {', '.join(unknown)}")
        return H3Config(mixers=recipe.mixers, **chosen)
    except (ValueError, TypeError) as error:
        raise UserError(f"the recipe's model: {' '.join(str(error).split())}") from None


def use_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether to train under bfloat16 autocast.

    "auto" asks the machine: a GPU by its capability, a CPU by timing a matrix product, since
    emulated bfloat16 is several times slower than float32.
    """
    if recipe.precision != "auto":
        return recipe.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return _time_product(torch.bfloat16) < 0.9 * _time_product(torch.float32)


def _time_product(dtype: torch.dtype) -> float:
    x = torch.randn(512, 512).to(dtype)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - began)
    return min(times)


def train(recipe: Recipe, console: Console | None = None) -> Result:
    """Run a recipe from data to a trained model folder.

    Raises:
        UserError: if the recipe, its data or its folder cannot be used.
    """
    console = console or Console()
    folder = recipe.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}") from None
    set_seed(recipe.seed)
    data = prepared_folder(recipe)
    blocks = Blocks(data, "train", recipe.block_length)
    tokenizer = tokenizer_of(blocks)
    if recipe.init_from is not None:
        model = load_model(recipe.init_from)
    else:
        model = H3ForCausalLM(build_config(recipe, len(tokenizer)))
    blocks.stream.check_vocabulary(model.config.vocab_size)
    fit_tokenizer(model, tokenizer)

    arguments = _arguments(recipe)
    trainer = H3Trainer(
        recipe,
        held_out(recipe, blocks, tokenizer),
        model=model,
        args=arguments,
        train_dataset=BlockDataset(blocks),
        eval_dataset=[],  # `evaluate` has the text, but the library insists
        data_collator=BlockCollator(recipe.reset_state_at_documents),
        callbacks=[ProgressLine(recipe, console)],
    )
    groups = parameter_groups(
        model,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        ssm_max_learning_rate=recipe.ssm_max_learning_rate,
    )
    precision = "bfloat16 autocast" if arguments.bf16 else "float32"
    console.print(
        f"{recipe.name}: {model.num_parameters():,} parameters in {precision} on "
        f"{arguments.device}, {len(blocks):,} blocks of {recipe.block_length} tokens",
        highlight=False,
    )
    console.print(describe_groups(groups), highlight=False)
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    return _finish(trainer, tokenizer, seconds, console)


def _arguments(recipe: Recipe) -> TrainingArguments:
    micro = recipe.micro_batch_size or recipe.batch_size
    timed = recipe.time_limit_s is not None
    arguments = TrainingArguments(
        output_dir=str(recipe.folder / "checkpoints"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // micro,
        max_steps=NO_LIMIT if timed else (recipe.steps or -1),
        num_train_epochs=recipe.epochs or 1.0,
        max_grad_norm=recipe.max_grad_norm,
        logging_strategy="steps",
        logging_steps=recipe.log_every,
        logging_first_step=True,
        eval_strategy="no" if recipe.eval_every is None else "steps",
        eval_steps=recipe.eval_every,
        save_strategy="no" if recipe.save_every is None else "steps",
        save_steps=recipe.save_every or 500,
        save_total_limit=recipe.keep_checkpoints,
        seed=recipe.seed,
        data_seed=recipe.seed,
        **_checkpointing(recipe.gradient_checkpointing),
        torch_compile=recipe.compile,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
    )
    arguments.bf16 = use_bf16(recipe, arguments.device)
    return arguments


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The library's argument for it, which 5.23 renamed."""
    names = TrainingArguments.__dataclass_fields__
    new = "activation_checkpointing" in names
    return {"activation_checkpointing" if new else "gradient_checkpointing": wanted}


def _finish(trainer: H3Trainer, tokenizer: Any, seconds: float, console: Console) -> Result:
    """Save, evaluate, draw and sample; print where things lie."""
    recipe, model, folder = trainer.recipe, trainer.model, trainer.recipe.folder
    save_model(model, folder / "model", tokenizer)
    write_log(trainer.state.log_history, folder / "log.jsonl")
    summary: dict[str, Any] = {
        "name": recipe.name,
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.state.global_step * recipe.batch_size * recipe.block_length,
        "train_seconds": round(seconds, 2),
        "precision": "bf16" if trainer.args.bf16 else "fp32",
    }
    metrics = trainer.evaluate()
    if trainer.valid is not None:
        loss = metrics["eval_loss"]
        summary |= _validation_summary(recipe, trainer.valid, loss)
        unit = "character" if trainer.valid.characters else "token"
        console.print(
            f"validation loss {loss:.4f} nats, {bits(loss):.4f} bits per {unit}", highlight=False
        )
    plot_losses(trainer.state.log_history, folder / "loss.png", recipe.name)
    if recipe.sample:
        model.eval()
        ids = tokenizer(recipe.sample, return_tensors="pt", add_special_tokens=False).input_ids
        pieces = continue_ids(
            model, tokenizer, ids.to(model.device), max_new_tokens=recipe.sample_tokens
        )
        summary["sample"] = "".join(pieces)
        console.print(summary["sample"], highlight=False, markup=False)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"model {folder / 'model'}\nloss curve {folder / 'loss.png'}\n"
        f"summary {folder / 'summary.json'}",
        highlight=False,
    )
    return Result(folder, summary)


def _validation_summary(recipe: Recipe, valid: HeldOut, loss: float) -> dict[str, Any]:
    unit = "char" if valid.characters else "token"
    return {
        "val_loss": loss,
        f"val_bits_per_{unit}": bits(loss),
        "val_tokens": len(valid.tokens) - valid.first,
        "val_context": recipe.block_length,
        "val_stride": recipe.eval_stride or recipe.block_length,
    }


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)
