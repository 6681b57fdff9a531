import pytest

from h3lm.cli.presets import presets
from h3lm.models.presets import PRESETS, TABLE_3


def test_presets_are_listed_with_their_parameters(capsys: pytest.CaptureFixture):
    presets()
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["mixers", *PRESETS]
    assert [row.split()[0] for row in rows] == list(TABLE_3)
    assert "126,139,392" in rows[TABLE_3.index("hybrid")]
