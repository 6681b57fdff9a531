"""`h3lm compare`."""

from pathlib import Path
from typing import Annotated

from typer import Argument


def compare(
    first: Annotated[Path, Argument(help="Report folder of `h3lm eval --output`.")],
    second: Annotated[Path, Argument(help="Another one.")],
) -> None:
    """Two evaluation reports side by side, paired by document where they can be."""
    from h3lm.evals import compare as reports

    print(reports.lines(reports.compare(first, second), (str(first), str(second))))
