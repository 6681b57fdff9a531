"""`h3lm eval --tasks`: from a model folder to a report."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from h3lm.errors import UserError
from h3lm.evals.harness import load_tasks, quiet, require_harness, run_tasks
from h3lm.evals.report import TaskReport, write_report
from h3lm.evals.run_folder import command_line, identity_of, open_run
from h3lm.evals.scorer import Limits, Work
from h3lm.models import H3ForCausalLM
from h3lm.models.folders import load_model
from h3lm.models.generation import load_tokenizer_of, pick_device

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    data_dir: Path | None = None,
    num_fewshot: int = 0,
    fixed_fewshot: bool = False,
    limit: int | None = None,
    max_length: int | None = None,
    memory_gb: float | None = None,
    precision: str = "fp32",
    device: str = "auto",
    output: Path | None = None,
    progress: Callable[[int, int, Work], None] | None = None,
) -> TaskReport:
    """Score tasks of the harness, every shared prefix once.

    Args:
        model: Model folder, or a model of the hub.
        tasks: Names of the harness, or `superglue`.
        data_dir: Folder of local files; the hub if None.
        num_fewshot: Examples in front of each document.
        fixed_fewshot: The same examples for all documents of a task.
        limit: First documents of each task only.
        max_length: Longest input in tokens; the harness's choice if None.
        memory_gb: Budget for the states of shared prefixes.
        precision: fp32 or bf16; SSM parameters stay in fp32.
        device: auto, cpu, cuda or mps.
        output: Folder for the report. Answers are kept there as they come: a run that was killed
            goes on from them.
        progress: Called with requests answered, of all, and the work so far.

    Raises:
        UserError: if anything that was asked for is not there, or does not belong together.
    """
    require_harness()
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    where = pick_device(device)
    loaded_tasks = load_tasks(
        tasks, data_dir=data_dir, num_fewshot=num_fewshot, fixed_fewshot=fixed_fewshot
    )
    loaded = load_model(model, device=where, dtype=PRECISIONS[precision])
    tokenizer = load_tokenizer_of(model)
    check_fits(loaded, tokenizer, model)
    identity = identity_of(
        model,
        precision,
        tasks=list(loaded_tasks.tasks),
        num_fewshot=num_fewshot,
        fixed_fewshot=fixed_fewshot,
        limit=limit,
        max_length=max_length,
        data=loaded_tasks.files or "hub",
    )
    with ExitStack() as stack:
        journal = None
        if output is not None:
            journal = stack.enter_context(open_run(output, identity))
        from h3lm.evals.tree_lm import TreeLM

        with quiet():
            lm = TreeLM(
                loaded,
                tokenizer,
                max_length=max_length,
                limits=Limits.of(where, None if memory_gb is None else int(memory_gb * 1e9)),
                journal=journal,
                progress=progress,
            )
        results = run_tasks(lm, loaded_tasks, limit=limit)
    report = TaskReport(
        model=model,
        fingerprint=identity["model"],
        num_parameters=loaded.num_parameters(),
        num_fewshot=num_fewshot,
        fixed_fewshot=fixed_fewshot,
        precision=precision,
        device=str(where),
        max_length=lm.max_length,
        truncated=lm.truncated,
        results=results,
        left_out=loaded_tasks.left_out,
        files=loaded_tasks.files,
        work=lm.scorer.work,
        command=command_line(),
    )
    if output is not None:
        write_report(report, output)
    return report


def check_fits(model: H3ForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Check that every id of the tokenizer is one of the model's.

    Raises:
        UserError: if not.
    """
    known = model.config.vocab_size
    if len(tokenizer) > known:
        raise UserError(
            f"{name}: its tokenizer has {len(tokenizer):,} ids, the model {known:,}: this is "
            "another model's tokenizer"
        )
