import os
import signal
import subprocess
import sys
import time

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


@pytest.mark.slow
def test_a_signal_to_the_whole_job_leaves_readers_alone(tmp_path):
    settings = ["time_limit_s=100", "save_every=1000", "data_workers=1", "output_dir=run",
                "log_every=1", "precision=fp32"]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "h3lm", "train", "demo", *settings],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    ) as job:  # fmt: skip
        log = tmp_path / "run" / "log.jsonl"
        for _ in range(600):
            if job.poll() is not None or (log.is_file() and len(log.read_text().splitlines()) > 2):
                break
            time.sleep(0.2)
        os.killpg(job.pid, signal.SIGTERM)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert "SIGTERM ended the run at step" in errors
    assert len(list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))) == 1
