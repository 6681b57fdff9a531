"""`h3lm presets`."""


def presets() -> None:
    """List the paper's sizes with the mixers of its Table 3, and how many parameters each has."""
    from h3lm.models.presets import parameter_table

    print(parameter_table())
