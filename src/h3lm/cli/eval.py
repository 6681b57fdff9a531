"""`h3lm eval`."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option


def evaluate(
    model: Annotated[str, Argument(help="Model folder, or a name on the Hugging Face hub.")],
    data: Annotated[
        str | None,
        Option(help="Perplexity: text file (UTF-8), or a folder made by `h3lm prepare`."),
    ] = None,
    tasks: Annotated[
        str | None,
        Option(help="Tasks: names of lm-eval and `superglue`, with commas between."),
    ] = None,
    num_fewshot: Annotated[
        int, Option(min=0, help="Tasks: examples in front of each document.")
    ] = 0,
    fixed_fewshot: Annotated[
        bool, Option("--fixed-fewshot", help="Tasks: the same examples for a whole task.")
    ] = False,
    data_dir: Annotated[
        Path | None, Option(help="Tasks: folder of local files; else from the Hugging Face hub.")
    ] = None,
    limit: Annotated[
        int | None, Option(min=1, help="Tasks: the first documents of each only.")
    ] = None,
    max_length: Annotated[
        int | None, Option(min=1, help="Tasks: longest input; longer are cut from the left.")
    ] = None,
    memory_gb: Annotated[
        float | None, Option(min=0.001, help="Tasks: memory for states of shared prefixes.")
    ] = None,
    split: Annotated[str, Option(help="Perplexity: split of a prepared folder.")] = "valid",
    context: Annotated[
        int | None,
        Option(min=1, help="Longest context in tokens; that of the prepared blocks, or 1024."),
    ] = None,
    stride: Annotated[
        int | None, Option(min=1, help="New tokens of each window; as many as the context.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Windows at a time.")] = 8,
    precision: Annotated[str, Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, Option(help="auto, cpu, cuda or mps.")] = "auto",
    output: Annotated[
        Path | None,
        Option(help="Perplexity: a JSON file. Tasks: a folder; a killed run goes on from it."),
    ] = None,
) -> None:
    """Perplexity of a text, or zero- and few-shot tasks, with everything stated.

    h3lm eval MODEL --data novel.txt

    h3lm eval MODEL --tasks superglue,hellaswag --num-fewshot 3 --output report
    """
    if (data is None) == (tasks is None):
        raise BadParameter("give either --data, for perplexity, or --tasks")
    if tasks is not None:
        from h3lm.evals.progress import RequestLine
        from h3lm.evals.tasks import evaluate_tasks

        with RequestLine(sys.stderr) as line:
            found = evaluate_tasks(
                model,
                [name.strip() for name in tasks.split(",") if name.strip()],
                data_dir=data_dir,
                num_fewshot=num_fewshot,
                fixed_fewshot=fixed_fewshot,
                limit=limit,
                max_length=max_length,
                memory_gb=memory_gb,
                precision=precision,
                device=device,
                output=output,
                progress=line.show,
            )
        print(found.markdown())
        return
    assert data is not None
    from h3lm.evals.text import evaluate_text, write_json

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r{done:,} of {total:,} tokens", end=end, file=sys.stderr, flush=True)

    report = evaluate_text(
        model,
        data,
        split=split,
        context=context,
        stride=stride,
        batch_size=batch_size,
        precision=precision,
        device=device,
        progress=show,
    )
    print(report.lines())
    if output is not None:
        write_json(report, output)
