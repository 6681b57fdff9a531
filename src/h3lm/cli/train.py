"""`h3lm train`."""

import sys
from typing import Annotated

from typer import Argument, Option


def train(
    recipe: Annotated[
        str | None, Argument(help="A recipe file, or the name of a shipped recipe.")
    ] = None,
    overrides: Annotated[
        list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Values over the recipe's.")
    ] = None,
    explain: Annotated[
        str | None, Option(help="Explain a recipe key, or 'all' of them, and stop.")
    ] = None,
) -> None:
    """Train a model by a recipe.

    Run again in the same way, it goes on from its newest checkpoint. In several processes:
    torchrun --nproc-per-node N -m h3lm train RECIPE, with parallel=ddp or parallel=fsdp.
    """
    from h3lm.errors import UserError
    from h3lm.train import recipe as recipes

    if explain is not None:
        print(recipes.explain(None if explain == "all" else explain))
        return
    if recipe is None:
        raise UserError("name a recipe file or a shipped recipe; `h3lm recipes` lists them")
    from h3lm.train.interrupt import RunStopped
    from h3lm.train.processes import one_voice
    from h3lm.train.run import train as run

    with one_voice():
        try:
            run(recipes.load_recipe(recipe, overrides or []))
        except RunStopped as stopped:
            print(stopped, file=sys.stderr)
            raise SystemExit(stopped.status) from None
