"""`h3lm eval`."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Context, Option

from h3lm.cli.options import refuse

FOR_TASKS = ("num_fewshot", "fixed_fewshot", "max_length", "memory_gb")
FOR_TEXTS = ("lengths", "split", "context", "stride", "batch_size")


def evaluate(
    call: Context,
    model: Annotated[str, Argument(help="Model folder, or a name on the Hugging Face hub.")],
    data: Annotated[
        str | None,
        Option(
            help="Perplexity: text file (UTF-8), folder of them, or one made by `h3lm prepare`."
        ),
    ] = None,
    perplexity: Annotated[
        str | None,
        Option(
            help="Perplexity by name: wikitext103, wikitext2, pile, openwebtext, enwik8, text8; "
            "commas between."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        Option(help="Perplexity: lengths to test besides, in tokens, as 2048,32768."),
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
        Path | None,
        Option(help="Folder of local files of tasks and named texts; else from the hub."),
    ] = None,
    limit: Annotated[
        int | None,
        Option(
            min=1,
            help="First documents of each task or text only; not of prepared folders.",
        ),
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
        Option(
            min=1, help="Perplexity: longest context in tokens; that of prepared blocks, or 1024."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        Option(min=1, help="Perplexity: new tokens of each window; as many as the context."),
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Perplexity: windows at a time.")] = 8,
    precision: Annotated[str, Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, Option(help="auto, cpu, cuda or mps.")] = "auto",
    output: Annotated[
        Path | None,
        Option(help="Folder for the report; a killed run goes on from it."),
    ] = None,
) -> None:
    """Perplexity of a text, or zero- and few-shot tasks, with everything stated.

    h3lm eval MODEL --data novel.txt

    h3lm eval MODEL --perplexity wikitext103,pile --lengths 2048,32768

    h3lm eval MODEL --tasks superglue,hellaswag --num-fewshot 3 --output report
    """
    if (not data and not perplexity) == (not tasks):
        raise BadParameter("give either --data or --perplexity, or --tasks")
    if tasks:
        refuse(call, FOR_TEXTS, "--data and --perplexity")
        from h3lm.evals.progress import RequestLine
        from h3lm.evals.tasks import evaluate_tasks

        with RequestLine(sys.stderr) as line:
            found = evaluate_tasks(
                model,
                _names(tasks),
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
    refuse(call, FOR_TASKS, "--tasks")
    from h3lm.evals.progress import token_line
    from h3lm.evals.text import evaluate_texts

    for report in evaluate_texts(
        model,
        _names(perplexity or ""),
        data=data,
        data_dir=data_dir,
        split=split,
        context=context,
        stride=stride,
        lengths=_numbers(lengths or ""),
        limit=limit,
        batch_size=batch_size,
        precision=precision,
        device=device,
        output=output,
        progress=token_line(sys.stderr),
    ):
        print(report.lines())


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text and not names:
        raise BadParameter(f"{text!r}: give names with commas between")
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in _names(text)]
    except ValueError:
        raise BadParameter(f"{text!r}: give whole numbers with commas between") from None
