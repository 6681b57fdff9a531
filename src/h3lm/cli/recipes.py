"""`h3lm recipes`."""


def recipes() -> None:
    """List the recipes that are shipped, a line each."""
    from h3lm.train.recipe import shipped_recipes

    found = shipped_recipes()
    width = max(map(len, found))
    for name, description in found.items():
        print(f"{name:<{width}}  {description}")
