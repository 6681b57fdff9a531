"""Hugging Face's Trainer with what is ours: groups, schedule, evaluation, checkpoints."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from h3lm.errors import UserError
from h3lm.evals.perplexity import score_tokens
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.train import checkpoints
from h3lm.train.checkpoints import RunPoint
from h3lm.train.corpus import BlockDataset, BlockOrder, HeldOut
from h3lm.train.parallel import first_says, is_first, largest, wait_for_all, world_size
from h3lm.train.param_groups import parameter_groups
from h3lm.train.progress import Clock, Speed
from h3lm.train.recipe import Recipe
from h3lm.train.schedule import learning_rate_factor

NO_LIMIT = 10**9  # steps of a run that the clock ends


class H3Trainer(Trainer):
    """The library's trainer with our parameter groups, schedule, evaluation and checkpoints.

    One epoch of the library's is the whole run: `BlockOrder` has the passes.

    Args:
        recipe: The run.
        valid: Validation text, if there is any.
        clock: The run's clock.
        speed: Its figures.
        data: What tells the prepared data apart; see `RunPoint`.
        arguments: As for `Trainer`.
    """

    model: H3ForCausalLM
    train_dataset: BlockDataset
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None

    def __init__(
        self,
        recipe: Recipe,
        valid: HeldOut | None,
        *,
        clock: Clock,
        speed: Speed,
        data: str,
        **arguments: Any,
    ) -> None:
        self.recipe, self.valid, self.data = recipe, valid, data
        self.clock, self.speed = clock, speed
        self.aside: Path | None = None  # where a checkpoint is being written
        self.trained_s = 0.0  # when it is done
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})
        super().__init__(**arguments)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.first_bad_step = torch.zeros((), dtype=torch.int64, device=self.args.device)

    @property
    def checkpoints_folder(self) -> Path:
        """Where the run keeps its checkpoints."""
        return self.recipe.folder / "checkpoints"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's, noting in `trained_s` how long all starts together have trained."""
        output = super().train(*args, **kwargs)
        self.trained_s = self.clock.elapsed_s
        return output

    # What is trained, how, and on what

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
                by_steps = clock.limit_s is None
                progress = step / num_training_steps if by_steps else clock.progress
                return learning_rate_factor(self.recipe, progress)

            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), factor)
        return self.lr_scheduler

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        total = self.args.max_steps * self.recipe.batch_size
        return BlockOrder(len(self.train_dataset), total, self.recipe.seed)

    # What a person sees

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean validation loss of a token, by the code of `h3lm eval`."""
        self.control.should_evaluate = False  # or the library asks again when the run ends
        if self.valid is None:
            return {}
        if self.evaluated[0] == self.state.global_step:
            return self.evaluated[1]
        score = score_tokens(
            self.model,
            self.valid.tokens,
            first=self.valid.first,
            context=self.recipe.block_length,
            stride=self.recipe.eval_stride,
            batch_size=max(1, self.args.per_device_train_batch_size),
        )
        metrics = {"eval_loss": score.loss, "eval_perplexity": score.perplexity}
        self.evaluated = self.state.global_step, metrics
        self.log(metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with passes over the data for epochs, and with speed beside a loss."""
        taken = self.state.global_step * self.recipe.batch_size
        self.state.epoch = taken / len(self.train_dataset)
        if "loss" in logs:
            logs = logs | self.speed.figures(self.state)
        super().log(logs)

    # A loss that is not finite ends the run before anything is saved. The look at the numbers
    # waits until they are needed anyway: each look would stall a GPU.

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the library's, keeping an eye on the loss."""
        loss = super().training_step(*args, **kwargs)
        self._watch(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self._watch(norm)
        return norm

    def _watch(self, number: Any) -> None:
        number = torch.as_tensor(getattr(number, "full_tensor", lambda: number)())
        bad = ~torch.isfinite(number.detach().to(self.first_bad_step.device))
        step = torch.full_like(self.first_bad_step, self.state.global_step + 1)
        self.first_bad_step = torch.where(
            bad & (self.first_bad_step == 0), step, self.first_bad_step
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if (
            control.should_log
            or control.should_save
            or control.should_evaluate
            or control.should_training_stop
        ):
            self._check_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _check_finite(self) -> None:
        step = int(largest(self.first_bad_step))
        if not step:
            return
        good, _ = checkpoints.newest(self.checkpoints_folder)
        kept = f"the last good checkpoint is {good.folder}" if good else "no checkpoint was written"
        raise UserError(
            f"the loss or its gradient is not finite at step {step}; {kept}. A lower "
            "learning_rate or max_grad_norm, or a longer warm-up, may help"
        )

    # Checkpoints

    def point(self, step: int) -> RunPoint:
        """Where the run is."""
        model = {name: getattr(self.model.config, name) for name in H3Config.__annotations__}
        return RunPoint(
            step=step,
            blocks_seen=step * self.recipe.batch_size,
            elapsed_s=first_says(self.clock.elapsed_s, self.args.device),
            processes=world_size(),
            recipe=json.loads(json.dumps(self.recipe.decisive())),
            data=self.data,
            model=json.loads(json.dumps(model)),
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        point = self.point(self.state.global_step)
        folder = self.checkpoints_folder
        with checkpoints.failing_in_one_line(folder):
            if is_first():
                checkpoints.begin(folder)
            wait_for_all()
            self.aside = folder / checkpoints.UNFINISHED
            try:
                super()._save_checkpoint(*args, **kwargs)
            finally:
                self.aside = None
            wait_for_all()
            if is_first():
                checkpoints.finish(folder, point, self.recipe.keep_checkpoints)
            wait_for_all()

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        return (
            str(self.aside) if self.aside is not None else super()._get_output_dir(*args, **kwargs)
        )

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        started = super()._init_training_state(max_steps, *args, **kwargs)
        # A checkpoint's idea of when to log, evaluate and save is not the recipe's
        self.state.compute_steps(self.args, max_steps)
        return started

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(self.model.all_tied_weights_keys)
        missing = sorted(set(load_result.missing_keys) - tied)
        wrong = [f"lacks {name}" for name in missing]
        wrong += [f"has {name}, which the model lacks" for name in load_result.unexpected_keys]
        if wrong:
            raise UserError(f"the checkpoint's weights are not the model's: it {'; '.join(wrong)}")


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The library's arguments for a recipe, but for the number of steps."""
    processes = world_size()
    if recipe.batch_size % processes:
        raise UserError(
            f"batch_size={recipe.batch_size} cannot be divided among {processes} processes"
        )
    share = recipe.batch_size // processes
    micro = recipe.micro_batch_size or share
    if share % micro:
        raise UserError(
            f"micro_batch_size={micro} must divide {share}, the part of batch_size="
            f"{recipe.batch_size} that each of {processes} processes takes"
        )
    arguments = TrainingArguments(
        output_dir=str(recipe.folder / "checkpoints"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        max_steps=NO_LIMIT,
        max_grad_norm=recipe.max_grad_norm,
        bf16=use_bf16(recipe),  # not later: the library looks once
        use_cpu=not torch.accelerator.is_available(),  # or bf16 is refused
        logging_strategy="steps",
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="no" if recipe.eval_every is None else "steps",
        eval_steps=recipe.eval_every,
        save_strategy="no" if recipe.save_every is None else "steps",
        save_steps=recipe.save_every or 500,
        seed=recipe.seed,
        data_seed=recipe.seed,
        **_checkpointing(recipe.gradient_checkpointing),
        torch_compile=recipe.compile,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or the library copies the model to all GPUs of one process
    return arguments


def use_bf16(recipe: Recipe) -> bool:
    """Whether to train under bfloat16 autocast.

    "auto" asks the machine: a GPU by its capability, a CPU by timing a matrix product, since
    emulated bfloat16 is several times slower than float32; processes that share a CPU could
    disagree about that, so they take float32.
    """
    if recipe.precision != "auto":
        return recipe.precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available() or world_size() > 1:
        return False
    return _time_product(torch.bfloat16) < 0.9 * _time_product(torch.float32)


def _time_product(dtype: torch.dtype) -> float:
    x = torch.randn(512, 512).to(dtype)
    times = []
    for _ in range(40):  # the best of many: other processes may be busy
        began = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - began)
    return min(times)


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The library's argument for it, which 5.23 renamed."""
    names = TrainingArguments.__dataclass_fields__
    new = "activation_checkpointing" in names
    return {"activation_checkpointing" if new else "gradient_checkpointing": wanted}
