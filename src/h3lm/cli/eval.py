"""`h3lm eval`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def evaluate(
    model: Annotated[str, Argument(help="Model folder, or a name on the Hugging Face hub.")],
    data: Annotated[
        str,
        Option(help="Text file (UTF-8), or a folder made by `h3lm prepare`.", show_default=False),
    ],
    split: Annotated[str, Option(help="Split of a prepared folder.")] = "valid",
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
    output: Annotated[Path | None, Option(help="Write the result there as JSON.")] = None,
) -> None:
    """Perplexity per token and word, and bits per byte, with context and stride stated."""
    import sys

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
