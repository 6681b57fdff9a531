import os
import subprocess
import sys

import pytest

from h3lm.cli.train import train
from h3lm.errors import UserError


def test_keys_are_explained(capsys: pytest.CaptureFixture):
    train(explain="batch_size")
    assert capsys.readouterr().out.startswith("batch_size (int, default 32 blocks): ")
    train(explain="all")
    assert len(capsys.readouterr().out.splitlines()) > 30


def test_no_recipe_says_how_to_find_one():
    with pytest.raises(UserError, match="`h3lm recipes` lists them"):
        train()


@pytest.mark.slow
def test_mistakes_are_one_line_and_a_non_zero_status(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    cases = {
        ("demo", "step=3"): "unknown recipe key 'step'; did you mean 'steps'",
        ("eltec", "output_dir=run"): "blocks/eltec: no prepared data here",
        ("demo", "steps=1", "output_dir=empty.txt/run"): "empty.txt/run: cannot write there",
    }
    for arguments, message in cases.items():
        done = subprocess.run(
            [sys.executable, "-m", "h3lm", "train", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=120,
        )
        assert done.returncode == 1, done.stdout
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
