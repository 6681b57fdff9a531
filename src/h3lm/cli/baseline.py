"""`h3lm baseline`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def baseline(
    data: Annotated[Path, Argument(help="Labelled signals that `h3lm prepare` wrote.")],
    seeds: Annotated[int, Option(help="Runs, with seeds 0, 1, ...")] = 5,
    out: Annotated[Path | None, Option(help="A JSON file for the accuracies.")] = None,
) -> None:
    """MiniRocket on the CPU: a linear classifier on random convolutions, from the library aeon."""
    from h3lm.evals.rocket import run, write

    summary = run(data, seeds)
    if out is not None:
        write(summary | {"data": str(data)}, out)
        print(f"summary {out}")
