"""`h3lm compare`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def compare(
    folders: Annotated[
        list[Path],
        Argument(
            help="Two report folders of `h3lm eval --output`, or any number of training runs."
        ),
    ],
    output: Annotated[
        Path | None, Option(help="Training runs: folder for the table and the picture.")
    ] = None,
) -> None:
    """Two evaluation reports, paired by document where they can be, or training runs, side by side.

    h3lm compare report/ other/

    h3lm compare runs/* --output comparison
    """
    from h3lm.errors import UserError
    from h3lm.train import side_by_side as runs

    if all(runs.is_run(folder) for folder in folders):
        groups = runs.side_by_side(folders)
        print(runs.write(groups, output) if output else runs.markdown(runs.table(groups)), end="")
        return
    others = [str(folder) for folder in folders if not runs.is_run(folder)]
    if len(folders) != 2 or len(others) != 2:
        raise UserError(
            "two report folders are compared, or finished training runs; no such run: "
            f"{', '.join(others)}"
        )
    from h3lm.evals import compare as reports

    first, second = folders
    print(reports.lines(reports.compare(first, second), (str(first), str(second))))
