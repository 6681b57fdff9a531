"""Hugging Face's Trainer with what is ours: groups, schedule, evaluation, checkpoints."""

import json
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as library_logging

from h3lm.errors import UserError
from h3lm.evals.perplexity import TextScore, score_tokens
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.models.folders import save_model
from h3lm.models.slices import share_rows, whole_rows
from h3lm.train import checkpoints
from h3lm.train.arguments import precision_of
from h3lm.train.building import read_weights
from h3lm.train.checkpoints import RunPoint
from h3lm.train.compiling import compile_model, eagerly
from h3lm.train.corpus import BlockDataset, BlockOrder, HeldOut, order_of
from h3lm.train.finite import FiniteWatch
from h3lm.train.graphs import GraphedSteps, wants_graphs
from h3lm.train.memory import keep_activations
from h3lm.train.mesh import Mesh
from h3lm.train.optimizer_state import load_optimizer, save_optimizer
from h3lm.train.parallel import (
    ShardAdamW,
    clip_gradients,
    is_sharded,
    reshard,
    whole_weights,
)
from h3lm.train.param_groups import parameter_groups
from h3lm.train.processes import first_says, is_first, rank, summed, wait_for_all, world_size
from h3lm.train.progress import Clock, Speed
from h3lm.train.recipe import Recipe
from h3lm.train.schedule import learning_rate_factor

NUMBER = "num_items_in_batch"


class H3Trainer(Trainer):
    """The library's trainer with our parameter groups, schedule, evaluation and checkpoints.

    One epoch of the library's is the whole run: `BlockOrder` has the passes.

    Args:
        recipe: The run.
        valid: Validation texts, of which there may be none.
        clock: The run's clock.
        speed: Its figures.
        data: What tells the prepared data apart; see `RunPoint`.
        recomputed: How many blocks are recomputed, the first ones, if `args` asks for it; else
            all are.
        arguments: As for `Trainer`.
    """

    model: H3ForCausalLM
    train_dataset: BlockDataset
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None

    def __init__(
        self,
        recipe: Recipe,
        valid: list[HeldOut],
        *,
        clock: Clock,
        speed: Speed,
        data: str,
        recomputed: int | None = None,
        **arguments: Any,
    ) -> None:
        self.recipe, self.valid, self.data = recipe, valid, data
        self.recomputed = recomputed
        self.clock, self.speed = clock, speed
        self.mesh = Mesh.of(recipe)
        self.aside: Path | None = None  # where a checkpoint is being written
        self.trained_s = 0.0  # when it is done
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})
        super().__init__(**arguments)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if self.accelerator.ddp_handler is not None:
            # else DDP keeps all gradients once more, and copies them
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.finite = FiniteWatch(self.args.device)
        captured = self.args.device.type == "cuda" and world_size() == 1 and self.wants_graphs()
        self.graphs = GraphedSteps(self.model.parameters()) if captured else None

    @property
    def checkpoints_folder(self) -> Path:
        """Where the run keeps its checkpoints."""
        return self.recipe.folder / "checkpoints"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's, noting in `trained_s` how long all starts together have trained."""
        output = super().train(*args, **kwargs)
        self.trained_s = self.clock.elapsed_s
        if self.graphs is not None:
            self.graphs = None  # whose memory what follows may need
            self.model.zero_grad()
        if self.mesh.seq > 1:
            share_rows(self.model, None)
        return output

    # What is trained, how, and on what

    def wants_graphs(self) -> bool:
        """Whether one process with a GPU replays its steps; see `graphs.wants_graphs`."""
        return wants_graphs(self.recipe, self.args.gradient_checkpointing)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        # Here the model is on its device with a checkpoint's weights, and has no optimiser yet
        recipe = self.recipe
        if is_sharded(self.model):
            # Autocast only: what is prepared once is not wrapped in DDP afterwards
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        if self.recomputed is not None:
            keep_activations(self.model, self.recomputed)
        if recipe.compile is not None:
            compile_model(self.model, recipe.compile)
        self.mesh.share_rows(self.model, self.args.device)
        return super()._prepare_for_training(*args, **kwargs)

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
            self.optimizer = ShardAdamW(
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

    def get_train_dataloader(self) -> DataLoader:
        """As the library's; processes that read leave SIGTERM to the run, which ends by itself."""
        loader: Any = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(_start_reader, inner.worker_init_fn)
        return loader

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        total = self.args.max_steps * self.recipe.batch_size
        return BlockOrder(
            order_of(self.recipe, self.train_dataset.blocks), total,
            batch=self.args.per_device_train_batch_size, readers=self.mesh.seq,
        )  # fmt: skip

    # What a person sees

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean validation loss of a token, by the code of `h3lm eval`."""
        self.control.should_evaluate = False  # or the library asks again when the run ends
        if not self.valid:
            return {}
        if self.evaluated[0] == self.state.global_step:
            return self.evaluated[1]
        with self.speed.aside():
            parts = {text.source: self.score(text) for text in self.valid}
        score = sum_of_scores(list(parts.values()))
        metrics = {"eval_loss": score.loss, "eval_perplexity": score.perplexity}
        if len(parts) > 1:
            metrics |= {f"eval_loss_{source}": part.loss for source, part in parts.items()}
        self.evaluated = self.state.global_step, metrics
        before = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        self.log(metrics)
        if self.recipe.keep_best and all(score.loss < loss for loss in before):
            with self.speed.aside():
                self._save_best()
        return metrics

    def _save_best(self) -> None:
        """Write the weights as they are into `best`; all must come here."""
        weights = whole_weights(self.model) if is_sharded(self.model) else None
        if is_first():
            best, aside = self.recipe.folder / "best", self.recipe.folder / "best.part"
            shutil.rmtree(aside, ignore_errors=True)
            save_model(self.model, aside, self.processing_class, weights)
            shutil.rmtree(best, ignore_errors=True)
            aside.rename(best)
        wait_for_all()

    def score(self, text: HeldOut) -> TextScore:
        """The score of all processes together, each on its share; all must come here."""
        eager = eagerly() if self.recipe.compile is not None else nullcontext()
        with eager, whole_rows(self.model):
            part = score_tokens(
                self.model,
                text.tokens,
                first=text.first,
                context=self.recipe.block_length,
                stride=self.recipe.eval_stride,
                batch_size=max(1, self.args.per_device_train_batch_size),
                share=(rank(), world_size()),
            )
        reshard(self.model)
        nats, tokens = summed(part.nats, part.tokens)
        return replace(part, nats=nats, tokens=int(tokens))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with passes over the data for epochs, and with speed beside a loss."""
        taken = self.state.global_step * self.recipe.batch_size
        self.state.epoch = taken / len(self.train_dataset)
        if "loss" in logs:
            self.speed.mark(self.state)
            logs = logs | self.speed.figures(self.state)
        super().log(logs)

    # A loss that is not finite ends the run before anything is saved

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the library's, without logits that nobody reads."""
        return super().compute_loss(model, inputs | {"skip_logits": True}, *args, **kwargs)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the library's, by a graph where steps are captured; keeps an eye on the loss."""
        step = super().training_step
        if self.graphs is None:
            loss = step(model, inputs, num_items_in_batch)
        else:
            model.train()  # as the library's step does, in case a callback has generated
            given = self._prepare_inputs(inputs)
            if num_items_in_batch is not None:
                number = torch.as_tensor(num_items_in_batch, device=self.args.device)
                given = given | {NUMBER: number}
            loss = self.graphs(given, lambda held: step(model, held, held.pop(NUMBER, None)))
        self.finite.see(loss, self.state.global_step + 1)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        if is_sharded(self.model):
            return clip_gradients(self.model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        if isinstance(norm, DTensor):  # of which a process has its own part
            norm = norm.full_tensor()
        self.finite.see(norm, self.state.global_step + 1)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        # A mean of losses is not carried over: one that goes on behind a checkpoint would be
        # another in a resumed run
        control.should_log |= control.should_save
        if control.should_log or control.should_evaluate or control.should_training_stop:
            self._check_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _check_finite(self) -> None:
        step = self.finite.first_bad_step()
        if not step:
            return
        good, _ = checkpoints.newest(self.checkpoints_folder)
        kept = f"the last good checkpoint is {good.folder}" if good else "no checkpoint was written"
        start = ", and init_from=CHECKPOINT to start from its weights" if good else ""
        raise UserError(
            f"the loss or its gradient is not finite at step {step}; {kept}. A lower "
            "learning_rate or max_grad_norm, or a longer warm-up, may help: that is another run, "
            f"so give it another output_dir{start}"
        )

    # Checkpoints

    def point(self, step: int) -> RunPoint:
        """Where the run is."""
        names = H3Config.__annotations__.keys() - {"use_cache"}  # decides nothing here
        model = {name: getattr(self.model.config, name) for name in names}
        return RunPoint(
            step=step,
            blocks_seen=step * self.recipe.batch_size,
            elapsed_s=first_says(self.clock.elapsed_s),
            processes=world_size(),
            recipe=json.loads(json.dumps(self.recipe.decisive())),
            data=self.data,
            model=json.loads(json.dumps(model)),
            precision=precision_of(self.args),
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        point = self.point(self.state.global_step)
        folder = self.checkpoints_folder
        with self.speed.aside(), checkpoints.failing_in_one_line(folder):
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the library's; of a sharded model the whole, gathered in the first process."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        weights = whole_weights(self.model)
        if is_first():
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.lr_scheduler is not None
        folder = Path(output_dir)
        save_optimizer(self.model, _bare(self.optimizer), folder)
        if is_first():
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.lr_scheduler is not None
        folder = Path(checkpoint)
        load_optimizer(self.model, _bare(self.optimizer), folder)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        return (
            str(self.aside) if self.aside is not None else super()._get_output_dir(*args, **kwargs)
        )

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        said = library_logging.get_verbosity()
        library_logging.set_verbosity_error()  # that a recipe's free keys differ
        started = super()._init_training_state(max_steps, *args, **kwargs)
        library_logging.set_verbosity(said)
        # A checkpoint's idea of when to log, evaluate and save is not the recipe's
        self.state.compute_steps(self.args, max_steps)
        return started

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_sharded(self.model):
            read_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(self.model.all_tied_weights_keys)
        missing = sorted(set(load_result.missing_keys) - tied)
        wrong = [f"lacks {name}" for name in missing]
        wrong += [f"has {name}, which the model lacks" for name in load_result.unexpected_keys]
        if wrong:
            raise UserError(f"the checkpoint's weights are not the model's: it {'; '.join(wrong)}")


def _start_reader(start: Callable[[int], None] | None, number: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if start is not None:
        start(number)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """An optimiser without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def sum_of_scores(parts: list[TextScore]) -> TextScore:
    """The score of several texts as one."""
    return replace(
        parts[0], nats=sum(part.nats for part in parts), tokens=sum(part.tokens for part in parts)
    )
