"""`h3lm doctor`."""

from typing import Annotated

from typer import Exit, Option


def doctor(
    device: Annotated[str, Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Show versions and devices, and check every fast path against its definition, here and now."""
    from h3lm.bench.doctor import examine

    if not examine(device, print):
        raise Exit(1)
