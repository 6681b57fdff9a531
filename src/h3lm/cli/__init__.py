"""The command line. Each command has a file; none of them holds logic."""

import logging
import os
import signal
import sys
from typing import Any

import typer

from h3lm import __version__
from h3lm.cli.baseline import baseline
from h3lm.cli.bench import bench
from h3lm.cli.compare import compare
from h3lm.cli.convert import convert
from h3lm.cli.doctor import doctor
from h3lm.cli.eval import evaluate
from h3lm.cli.generate import generate
from h3lm.cli.prepare import prepare
from h3lm.cli.presets import presets
from h3lm.cli.recipes import recipes
from h3lm.cli.synthetics import synthetics
from h3lm.cli.train import train
from h3lm.errors import NO_SPACE, UserError

# typer 0.29 carries a click of its own, earlier ones use the package: the base of their errors
UsageMistake: type[Any] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)

INTERRUPTED = 128 + signal.SIGINT  # as shells have it

app = typer.Typer(
    name="h3lm",
    help="State space language models that people use: H3, its hybrids, and FlashConv.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    prepare, presets, recipes, train, generate, convert, compare, baseline, synthetics, doctor,
):  # fmt: skip
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(bench)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version."),
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run the command line; mistakes of the user end in one line and a non-zero status."""
    # without a network a name that is no folder would take a dozen lines of tries first
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()  # what cannot be written shall fail here
        if status == INTERRUPTED:  # newer typers turn Ctrl-C into a status
            _fail("interrupted", INTERRUPTED)
    except UsageMistake as error:
        _fail(" ".join(error.format_message().split()), error.exit_code)
    except UserError as error:
        if os.environ.get("H3LM_TRACEBACK"):
            raise
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # `h3lm recipes | head`
        _close_stdout()
        status = 0
    except OSError as error:  # a disk may be full, or closed to us, wherever a command writes
        full = error.errno in NO_SPACE
        if not (full or error.filename) or os.environ.get("H3LM_TRACEBACK"):
            raise
        _close_stdout()
        where = f"{error.filename}: " if error.filename else ""
        what = f"no space left ({error.strerror}): make room and run the same again"
        _fail(where + (what if full else error.strerror or str(error)), 1)
    sys.exit(status if isinstance(status, int) else 0)


def _close_stdout() -> None:
    """Spare Python, as it ends, a failing try to write what is left."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (nobody reads on)


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
