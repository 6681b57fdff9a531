"""A recipe in the library's words."""

import time

import torch
from transformers import TrainingArguments

from h3lm.errors import UserError
from h3lm.train.mesh import Mesh, check_same_recipe
from h3lm.train.processes import world_size
from h3lm.train.recipe import Recipe

NO_LIMIT = 10**9  # steps of a run that the clock ends


def training_arguments(recipe: Recipe, before: str = "") -> TrainingArguments:
    """The library's arguments for a recipe, but for the number of steps.

    Several processes find each other here.

    Args:
        recipe: The recipe.
        before: What the run was trained in before, if it goes on; see `use_bf16`.

    Raises:
        UserError: if a batch cannot be divided among the processes, they do not fit the mesh, or
            they have different recipes.
    """
    mesh = Mesh.of(recipe)
    processes = mesh.readers
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
        bf16=use_bf16(recipe, before),  # not later: the library looks once
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
        ddp_find_unused_parameters=False,
        ddp_bucket_cap_mb=mesh.bucket_mb,
        dataloader_num_workers=recipe.data_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        # or each batch waits for the step before it
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        remove_unused_columns=False,
        use_cache=recipe.task == "language",  # as the saved model shall have it; no step makes one
        disable_tqdm=True,
        report_to=[],
    )
    set_checkpointing(arguments, bool(recipe.gradient_checkpointing))
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or the library copies the model to all GPUs of one process
    check_same_recipe(recipe)
    return arguments


def precision_of(arguments: TrainingArguments) -> str:
    """What a run is trained in, bf16 (autocast) or fp32."""
    return "bf16" if arguments.bf16 else "fp32"


def use_bf16(recipe: Recipe, before: str = "") -> bool:
    """Whether to train under bfloat16 autocast.

    "auto" asks the machine: a GPU by its capability, a CPU by timing a matrix product, since
    emulated bfloat16 is several times slower than float32; processes that share a CPU could
    disagree about that, so they take float32. A run that goes on keeps what it had `before`,
    bf16 or fp32, where the machine can: a busy CPU may tell other times.

    Raises:
        UserError: if a recipe asks a GPU for bf16 that has none.
    """
    on_gpu = torch.cuda.is_available()
    lacking = on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
    if recipe.precision != "auto":
        if recipe.precision == "bf16" and lacking:
            raise UserError("precision=bf16: this GPU computes no bfloat16: take fp32 or auto")
        return recipe.precision == "bf16"
    if lacking or torch.backends.mps.is_available():
        return False
    if before:
        return before == "bf16"
    if on_gpu or world_size() > 1:
        return on_gpu
    return _time_product(torch.bfloat16) < 0.9 * _time_product(torch.float32)


def _time_product(dtype: torch.dtype) -> float:
    x = torch.randn(512, 512).to(dtype)
    times = []
    for _ in range(40):  # the best of many: other processes may be busy
        began = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - began)
    return min(times)


def set_checkpointing(arguments: TrainingArguments, wanted: bool) -> None:
    """Have blocks recomputed in the backward pass, or not."""
    for name in ("gradient_checkpointing", "activation_checkpointing"):  # 5.23 renamed it
        if hasattr(arguments, name):
            setattr(arguments, name, wanted)
