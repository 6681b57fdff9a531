import pytest

from h3lm.cli.recipes import recipes
from h3lm.train.recipe import shipped_recipes


def test_recipes_are_listed_with_one_line_each(capsys: pytest.CaptureFixture):
    recipes()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(line.endswith(shipped_recipes()[line.split()[0]]) for line in lines)
