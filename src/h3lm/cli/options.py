"""What commands ask about the options that they were given."""

from collections.abc import Iterable

from typer import BadParameter, Context


def refuse(context: Context, names: Iterable[str], use: str) -> None:
    """Refuse options that this call would not look at.

    Args:
        context: Of the call.
        names: Parameters of the command.
        use: What they are for.

    Raises:
        BadParameter: naming the first that was given.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise BadParameter(f"--{name.replace('_', '-')} is for {use}")
