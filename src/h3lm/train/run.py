"""A recipe run from data to a trained model folder, or from where it was interrupted."""

import errno
import functools
import math
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as library_logging

from h3lm.data.joined import JoinedBlocks
from h3lm.data.lock import only_writer
from h3lm.errors import NO_SPACE, UserError
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.models.folders import fit_tokenizer, load_config, load_model
from h3lm.models.generation import load_tokenizer_of
from h3lm.train import checkpoints
from h3lm.train.arguments import NO_LIMIT, precision_of, set_checkpointing, training_arguments
from h3lm.train.building import build_model, read_model
from h3lm.train.checkpoints import Checkpoint
from h3lm.train.corpus import (
    BlockCollator,
    BlockDataset,
    fingerprint,
    folders,
    held_out,
    prepare_shipped_text,
    test_texts,
    tokenizer_of,
)
from h3lm.train.interrupt import RunStopped, StopOnSignal
from h3lm.train.memory import Estimate, short_of_memory
from h3lm.train.mesh import Mesh
from h3lm.train.outcome import Result, finish
from h3lm.train.parallel import shard_model
from h3lm.train.param_groups import describe_groups, parameter_groups
from h3lm.train.processes import is_first, largest, rank, wait_for_all, world_size
from h3lm.train.profiling import Profiler
from h3lm.train.progress import Clock, LogFile, ProgressLine, Speed
from h3lm.train.recipe import Recipe, model_fields
from h3lm.train.throughput import FORMULA, flops_per_token, peak_flops
from h3lm.train.trainer import H3Trainer


def train(recipe: Recipe, console: Console | None = None) -> Result:
    """Run a recipe; where its folder has a checkpoint of the same recipe, go on from there.

    Raises:
        UserError: if the recipe, its data or its folder cannot be used, another run is in that
            folder, the loss is not finite, or there is no space left.
        RunStopped: if SIGINT or SIGTERM ended it before its time.
    """
    console = console or Console()
    if not is_first():
        console = Console(quiet=True)
    _make_folder(recipe.folder)
    only = only_writer(recipe.folder, "another h3lm train") if is_first() else nullcontext()
    try:
        with only:
            if recipe.task == "classification":
                from h3lm.train.classification import train_classifier

                return train_classifier(recipe, console)
            return _train(recipe, console)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        where = error.filename or recipe.folder
        raise UserError(f"{where}: cannot be written: {error.strerror}") from error


def _train(recipe: Recipe, console: Console) -> Result:
    if recipe.deterministic:
        compute_the_same_bits()
    checkpoint = find_checkpoint(recipe, console)
    before = checkpoint.point.precision if checkpoint else ""
    arguments = training_arguments(recipe, before)  # several processes find each other here
    mesh = Mesh.of(recipe)
    library_logging.disable_progress_bar()
    blocks = _open_blocks(recipe)
    tokenizer = tokenizer_of(blocks.tokenizer_folder)
    valid, test = held_out(recipe, blocks, tokenizer), test_texts(recipe, blocks)
    if recipe.init_from is not None:
        _check_tokenizer(blocks, recipe.init_from)
    config = _config(recipe, len(tokenizer))
    recomputed, gathered = _choose_memory(recipe, config, mesh, arguments, console)
    set_checkpointing(arguments, recomputed > 0)
    set_seed(recipe.seed)
    model = _make_model(recipe, config, mesh, arguments, gathered)
    blocks.check_vocabulary(model.config.vocab_size)
    fit_tokenizer(model, tokenizer)
    mesh.check(model, recipe)
    if world_size() > 1:
        set_seed(recipe.seed + rank())  # or all would drop out the same of different texts

    clock = Clock(recipe.time_limit_s, checkpoint.point.elapsed_s if checkpoint else 0.0)
    arguments.max_steps = number_of_steps(recipe, len(blocks), clock, checkpoint)
    speed = Speed(clock, recipe.batch_size * recipe.block_length, _peak_rate(recipe, model))
    line = ProgressLine(speed, console)
    stop = StopOnSignal()
    callbacks: list[TrainerCallback] = [clock, speed, stop]
    if is_first():
        callbacks += [line, *logs(recipe.folder)]
        if recipe.profile_steps is not None:
            label = recipe.compile is None
            callbacks.append(Profiler(recipe.profile_steps, recipe.folder, label=label))
    trainer = H3Trainer(
        recipe,
        valid,
        clock=clock,
        speed=speed,
        data=fingerprint(blocks),
        recomputed=recomputed,
        model=model,
        args=arguments,
        train_dataset=BlockDataset(blocks),
        eval_dataset=[],  # `evaluate` has the text, but the library insists
        data_collator=BlockCollator(recipe.reset_state_at_documents, mesh.row_slice),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if checkpoint is not None:
        checkpoint.point.check_same_run(trainer.point(checkpoint.point.step), checkpoint.folder)
        say_resumed(checkpoint, precision_of(arguments), console)
    write_recipe(recipe)
    _describe(trainer, blocks, console)
    try:
        everything = recomputed == model.config.num_hidden_layers
        graphs = recipe.graphs if recipe.graphs or not recomputed else False
        chosen = replace(recipe, gradient_checkpointing=everything, graphs=graphs)
        with short_of_memory(chosen, arguments.per_device_train_batch_size):
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
    finally:
        stop.close()
        line.close()
    if stop.agreed:
        raise stopped(trainer, stop.agreed)
    return finish(trainer, test, tokenizer, console)


def build_config(recipe: Recipe, vocab_size: int) -> H3Config:
    """The model that a recipe describes.

    Raises:
        UserError: if its fields are unknown or do not fit together.
    """
    chosen = {"vocab_size": -8 * (-vocab_size // 8)} | model_fields(recipe.model, H3Config)
    try:
        if recipe.preset is not None:
            return H3Config.from_preset(recipe.preset, recipe.mixers, **chosen)
        unknown = sorted(set(chosen) - set(H3Config().to_dict()))
        if unknown:
            raise ValueError(f"H3Config has no field {', '.join(unknown)}")
        return H3Config(mixers=recipe.mixers, **chosen)
    except (ValueError, TypeError) as error:
        raise UserError(f"the recipe's model: {' '.join(str(error).split())}") from None


def compute_the_same_bits() -> None:
    """Have every run compute the same bits, also on a GPU."""
    # cuBLAS reads it when CUDA starts; 8 buffers of 4 MiB keep its fast kernels
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def stopped(trainer: H3Trainer, number: int) -> RunStopped:
    """What ends a run that a signal has stopped."""
    step = trainer.state.global_step
    if trainer.recipe.save_every is None:
        rest = "nothing was saved, since the recipe has no save_every"
    else:
        rest = f"the same command goes on from {trainer.checkpoints_folder / f'checkpoint-{step}'}"
    return RunStopped(f"{signal.Signals(number).name} ended the run at step {step}: {rest}", number)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}") from None


def find_checkpoint(recipe: Recipe, console: Console) -> Checkpoint | None:
    """The newest whole checkpoint of a run; what is passed over is told."""
    checkpoint, passed = checkpoints.newest(recipe.folder / "checkpoints")
    for words in passed:
        console.print(words, highlight=False)
    return checkpoint


def _open_blocks(recipe: Recipe) -> JoinedBlocks:
    """The training blocks; the first process prepares and verifies what is not."""
    if is_first():
        prepare_shipped_text(recipe)
        blocks = JoinedBlocks(folders(recipe), "train", recipe.block_length)
        if recipe.verify_data:
            blocks.verify()
    wait_for_all()
    return JoinedBlocks(folders(recipe), "train", recipe.block_length)


def _config(recipe: Recipe, vocab_size: int) -> H3Config:
    """The configuration of the model that is trained."""
    if recipe.init_from is None:
        return build_config(recipe, vocab_size)
    return load_config(recipe.init_from)


def _choose_memory(
    recipe: Recipe, config: H3Config, mesh: Mesh, arguments: TrainingArguments, console: Console
) -> tuple[int, bool]:
    """How many blocks to recompute, and whether sharded ones stay whole until needed again.

    By an estimate of the memory that is told.

    Raises:
        UserError: if the model cannot fit, with the nearest setting that does.
    """
    estimate = Estimate.of(config, recipe, mesh, arguments.device, arguments.bf16)
    estimate.check(recipe)
    chosen, why = estimate.choose(recipe.gradient_checkpointing)
    chosen = int(largest(chosen))  # all processes alike
    gathered = not largest(int(not estimate.keeps_gathered(chosen)))
    console.print(estimate.words(chosen, gathered), highlight=False)
    which = "" if chosen in (0, len(estimate.kept)) else f"{chosen} of {len(estimate.kept)} "
    how = "recomputed in the backward pass" if chosen else "kept, not recomputed"
    if estimate.total is not None or chosen:
        console.print(
            f"activations of {which}blocks are {how}: {why}", highlight=False, soft_wrap=True
        )
    if gathered:
        console.print("sharded blocks stay whole from forward to backward pass: there is room")
    return chosen, gathered


def _make_model(
    recipe: Recipe, config: H3Config, mesh: Mesh, arguments: TrainingArguments, gathered: bool
) -> H3ForCausalLM:
    """The model as it is trained: on the CPU, or sharded on its devices."""
    shard = None
    if recipe.parallel == "fsdp" and world_size() > 1:
        compute_dtype = torch.bfloat16 if arguments.bf16 else None
        grid = mesh.sharding(arguments.device)
        shard = functools.partial(
            shard_model, mesh=grid, compute_dtype=compute_dtype, keep_gathered=gathered
        )
    device = "cpu" if shard is None else str(arguments.device)
    if recipe.init_from is None:
        return build_model(config, shard, device)
    if shard is None:
        return load_model(recipe.init_from)
    if any(Path(recipe.init_from).glob("*.safetensors")):
        return read_model(recipe.init_from, config, shard, device)
    return shard(load_model(recipe.init_from, device=device))


def _check_tokenizer(blocks: JoinedBlocks, model: str) -> None:
    """Check that a model to start from knows the data's tokens, if it has a tokenizer."""
    from h3lm.evals.text import check_same_tokenizer

    try:
        tokenizer = load_tokenizer_of(model)
    except UserError:
        return
    for part in blocks.parts.values():
        check_same_tokenizer(part.stream, tokenizer, model)


def number_of_steps(
    recipe: Recipe, num_blocks: int, clock: Clock, checkpoint: Checkpoint | None
) -> int:
    """Optimiser steps that a recipe asks for."""
    if recipe.steps is not None:
        return recipe.steps
    if recipe.epochs is not None:
        return max(1, math.ceil(recipe.epochs * num_blocks / recipe.batch_size))
    over = checkpoint is not None and clock.progress >= 1.0
    return checkpoint.point.step if checkpoint is not None and over else NO_LIMIT


def _peak_rate(recipe: Recipe, model: H3ForCausalLM) -> float | None:
    """Tokens a second at the peak of all processes' hardware."""
    peak = peak_flops(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if peak is None:
        return None
    return peak * world_size() / flops_per_token(model, recipe.block_length)


def logs(folder: Path) -> list[TrainerCallback]:
    """What writes `log.jsonl`, and TensorBoard's files if it is installed."""
    from transformers.integrations import TensorBoardCallback

    try:
        callback = TensorBoardCallback()
    except RuntimeError:  # not installed
        return [LogFile(folder / "log.jsonl")]
    callback.logging_dir = str(folder / "tensorboard")
    return [LogFile(folder / "log.jsonl"), callback]


def say_resumed(checkpoint: Checkpoint, precision: str, console: Console) -> None:
    """Tell where a run goes on from."""
    point = checkpoint.point
    words = f"resuming at step {point.step:,} from {checkpoint.folder}"
    if point.processes != world_size():
        words += (
            f", written by {point.processes} process{'es' * (point.processes != 1)} and read by "
            f"{world_size()}: "
            "random numbers (dropout) will be others"
        )
    if point.precision not in ("", precision):
        words += f", trained in {point.precision} and from here on in {precision}"
    console.print(words, highlight=False)


def write_recipe(recipe: Recipe) -> None:
    """Write the whole recipe into its folder."""
    if is_first():
        (recipe.folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def _describe(trainer: H3Trainer, blocks: JoinedBlocks, console: Console) -> None:
    recipe, model = trainer.recipe, trainer.model
    precision = "bfloat16 autocast" if trainer.args.bf16 else "float32"
    several = f", {world_size()} processes, {recipe.parallel}" if world_size() > 1 else ""
    several += "".join(f", {name}={size}" for name, size in recipe.mesh.items())
    console.print(
        f"{recipe.name}: {model.num_parameters():,} parameters in {precision} on "
        f"{trainer.args.device}{several}, {len(blocks):,} blocks of {recipe.block_length} tokens",
        highlight=False,
    )
    if recipe.graphs and trainer.graphs is None:
        console.print(
            "graphs=true: only one process with a GPU has CUDA graphs, so steps are launched"
        )
    for words in _mixture(recipe, blocks, trainer.args.max_steps):
        console.print(words, highlight=False)
    groups = parameter_groups(
        model,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        ssm_max_learning_rate=recipe.ssm_max_learning_rate,
    )
    console.print(describe_groups(groups), highlight=False)
    if trainer.speed.peak_tokens_per_s is not None:
        console.print(FORMULA, highlight=False)


def _mixture(recipe: Recipe, blocks: JoinedBlocks, steps: int) -> Iterator[str]:
    """A line for each source of several: what part of the run it is, and how often it is read."""
    if len(blocks.parts) == 1:
        return
    weights = recipe.mixing or {name: float(size) for name, size in blocks.sizes.items()}
    for name, size in blocks.sizes.items():
        share = weights[name] / sum(weights.values())
        passes = share * steps * recipe.batch_size / size
        often = "" if steps == NO_LIMIT else f", {passes:.2f} passes"
        yield f"{name}: {size:,} blocks, {share:.1%} of what is read{often}"
