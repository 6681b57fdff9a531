"""Train in children that are killed while they write a checkpoint; a process of its own.

python save_killed.py RECIPE FOLDER prints a line of JSON for each kill: where it fell, the newest
checkpoint that was whole after it, and the losses of the resumed run.
"""

# ruff: noqa: T201 (what it prints is its result)

import io
import json
import os
import resource
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import h3lm.train.outcome
from h3lm.train import checkpoints
from h3lm.train.recipe import load_recipe
from h3lm.train.run import train

KILLS_BETWEEN_CALLS = 20
KILLS_INSIDE_A_WRITE = (100, 3000, 20_000)  # bytes of a file


def in_child(work, *arguments) -> int:
    """How a child ended that did this."""
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def run(recipe) -> None:
    h3lm.train.outcome.plot_losses = lambda *_: None  # takes longer than all the rest
    train(recipe, Console(file=io.StringIO()))


def at_second_save(recipe, before_saving) -> None:
    """Train, and call a function just before the second checkpoint is begun."""
    begin = checkpoints.begin

    def begin_watched(folder):
        if (folder / "checkpoint-2").exists():
            before_saving()
        return begin(folder)

    checkpoints.begin = begin_watched
    run(recipe)


def count_calls(deadly: int | None, report: Path | None = None):
    """From now on count what touches files, and die at one of them."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if not (event.startswith(("os.", "shutil.")) or event == "open"):
            return
        if not any(name in str(arguments) for name in ("unfinished", "checkpoint")):
            return
        seen += 1
        if seen == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if report is not None:
            report.write_text(str(seen))

    sys.addaudithook(hook)


def die_inside_a_write(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def main(recipe_file: str, place: str) -> None:
    torch.set_num_threads(1)
    folder = Path(place)
    recipe = replace(load_recipe(recipe_file), output_dir=str(folder / "straight"))
    report = folder / "calls"
    status = in_child(at_second_save, recipe, lambda: count_calls(None, report))
    assert status == 0
    calls = int(report.read_text())
    points = [1 + i * (calls - 1) // (KILLS_BETWEEN_CALLS - 1) for i in range(KILLS_BETWEEN_CALLS)]
    kills = [("call", point, lambda p=point: count_calls(p)) for point in points]
    kills += [("byte", n, lambda n=n: die_inside_a_write(n)) for n in KILLS_INSIDE_A_WRITE]
    print(json.dumps({"straight": losses(folder / "straight"), "calls": calls}))
    for kind, where, prepare in kills:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        killed = replace(recipe, output_dir=str(folder / "killed"))
        status = in_child(at_second_save, killed, prepare)
        checkpoint, _ = checkpoints.newest(folder / "killed" / "checkpoints")
        names = sorted(path.name for path in (folder / "killed" / "checkpoints").iterdir())
        resumed = in_child(run, killed)
        print(
            json.dumps(
                {
                    "kind": kind,
                    "where": where,
                    "signal": os.WTERMSIG(status),
                    "newest": None if checkpoint is None else checkpoint.point.step,
                    "names": names,
                    "resumed": resumed,
                    "losses": losses(folder / "killed"),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
