"""Checkpoints that a crash cannot damage.

    checkpoints/
      checkpoint-1000/       whole, since it has its final name
        checkpoint.json      what it belongs to, and its files with their sizes
      unfinished/            what is being written, or was when the process died

A checkpoint is written aside, flushed to the disk and then renamed; older ones are removed after
that. (The library's trainer writes into the final folder, and resumes from the highest number.)
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from h3lm.errors import UserError

MANIFEST = "checkpoint.json"
UNFINISHED = "unfinished"
NAME = re.compile(r"checkpoint-(\d+)")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
# Kinds of files without which nothing can go on, each by the names it may have
NEEDED = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json"),
    TOKENIZER,
    ("optimizer/.metadata",),
    ("optimizer/__0_0.distcp",),
    ("scheduler.pt",),
    ("rng_state.pth", "rng_state_0.pth"),
    ("trainer_state.json",),
)


@dataclass(frozen=True)
class RunPoint:
    """What a checkpoint belongs to and how far the run was.

    Attributes:
        step: Optimiser steps done.
        blocks_seen: Training blocks taken, the position in the data.
        elapsed_s: Seconds trained, all starts together.
        processes: Number of processes that trained.
        recipe: The recipe's keys that decide the run.
        data: What tells prepared data apart.
        model: The model's configuration.
        precision: What it was trained in, bf16 or fp32, whatever the recipe left open; empty if
            an older h3lm wrote it.
        order: Names how labelled examples are ordered; empty for text, whose `data` says it, and
            if an older h3lm wrote it.
    """

    step: int
    blocks_seen: int
    elapsed_s: float
    processes: int
    recipe: dict[str, Any]
    data: str
    model: dict[str, Any]
    precision: str = ""
    order: str = ""

    def check_same_run(self, other: Self, folder: Path) -> None:
        """Refuse to go on with another run's checkpoint.

        Args:
            other: The run that wants to go on from here.
            folder: Where this checkpoint lies.

        Raises:
            UserError: naming everything that differs.
        """
        different = [
            f"{name}={_short(mine[name])} there, {_short(yours[name])} now"
            for mine, yours in ((self.recipe, other.recipe), (self.model, other.model))
            for name in sorted(mine.keys() & yours.keys())  # an older h3lm had fewer
            if mine[name] != yours[name]
        ]
        if self.data != other.data:
            different.append("the prepared data are not the same")
        if self.order != other.order:
            different.append("the version of h3lm that wrote it orders examples in another way")
        if different:
            raise UserError(
                f"{folder} is of another run: {'; '.join(different)}. Give another output_dir, or "
                f"remove {folder.parent} to start anew"
            )


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        folder: Where it lies.
        point: What it belongs to.
        files: Sizes of its files in bytes, by name.
    """

    folder: Path
    point: RunPoint
    files: dict[str, int]

    def check_files(self) -> None:
        """Check that every file is there and as long as it was.

        Raises:
            UserError: naming all that are missing, or the first that is shorter or longer.
        """
        remedy = f"bring it back, or remove {self.folder} to go on from an earlier checkpoint"
        classifier = self.point.recipe.get("task") == "classification"
        for names in NEEDED:
            if classifier and names == TOKENIZER:  # that of signals has none
                continue
            if not any(name in self.files for name in names):
                raise UserError(f"{self.folder}: the checkpoint has no {names[0]}: {remedy}")
        sizes = {name: _size(self.folder / name) for name in self.files}
        missing = [name for name, size in sizes.items() if size is None]
        if missing:
            raise UserError(f"{self.folder}: the checkpoint lacks {', '.join(missing)}: {remedy}")
        for name, size in self.files.items():
            if sizes[name] != size:
                raise UserError(
                    f"{self.folder / name}: {sizes[name]:,} bytes instead of {size:,}: {remedy}"
                )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a run.

    Args:
        folder: The run's `checkpoints`.

    Returns:
        The checkpoint, if there is one, and a line for each newer one that was passed over
        because it was never finished.

    Raises:
        UserError: if a file of the checkpoint is missing or has another size.
    """
    passed = []
    if (folder / UNFINISHED).exists():
        passed.append(
            f"passing over a checkpoint whose writing was cut short: {folder / UNFINISHED}"
        )
    for _, path in sorted(_numbered(folder), reverse=True):
        try:
            fields = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            checkpoint = Checkpoint(path, RunPoint(**fields["point"]), fields["files"])
        except (OSError, ValueError, KeyError, TypeError):
            passed.append(
                f"passing over a checkpoint that is not whole, without {MANIFEST}: {path}"
            )
            continue
        checkpoint.check_files()
        return checkpoint, passed
    return None, passed


def begin(folder: Path) -> Path:
    """Make room for writing a checkpoint.

    Returns:
        An empty folder; the checkpoint goes into a folder of its own in it.
    """
    aside = folder / UNFINISHED
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    return aside


def finish(folder: Path, point: RunPoint, keep: int) -> Path:
    """Give a written checkpoint its final name, then remove the oldest.

    Args:
        folder: The run's `checkpoints`.
        point: What the checkpoint belongs to.
        keep: How many stay.

    Returns:
        Where the checkpoint lies.
    """
    name = f"checkpoint-{point.step}"
    written, final = folder / UNFINISHED / name, folder / name
    files = [path for path in sorted(written.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(written)): path.stat().st_size for path in files}
    manifest = written / MANIFEST
    manifest.write_text(
        json.dumps({"point": asdict(point), "files": sizes}, indent=1) + "\n", encoding="utf-8"
    )
    for path in (*files, manifest, *(p for p in written.rglob("*") if p.is_dir()), written):
        _flush(path)
    if final.exists():  # not whole, or of a run that went on from an earlier one
        shutil.rmtree(final)
    written.rename(final)
    _flush(folder)
    shutil.rmtree(folder / UNFINISHED)
    _remove_old(folder, point.step, keep)
    return final


def _remove_old(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest up to a step.

    What is not whole does not count as one of them; beyond the step it is not ours to remove.
    """
    old = sorted(pair for pair in _numbered(folder) if pair[0] <= step)
    whole = [path for _, path in old if (path / MANIFEST).is_file()]
    for _, path in old:
        if path not in whole[-keep:]:
            (path / MANIFEST).unlink(missing_ok=True)  # first, or what is left would seem whole
            shutil.rmtree(path)


@contextlib.contextmanager
def failing_in_one_line(folder: Path) -> Iterator[None]:
    """Turn a failed write of a checkpoint into one line; what was written aside is removed.

    Raises:
        UserError: naming the reason and the newest checkpoint that is whole.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        reason = _reason(error)
        if reason is None:
            raise
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        steps = [step for step, path in _numbered(folder) if (path / MANIFEST).is_file()]
        rest = f"checkpoint-{max(steps)} there is whole" if steps else "there is no earlier one"
        raise UserError(
            f"{folder}: a checkpoint could not be written ({reason}); {rest}: make space and run "
            "the same command again"
        ) from error


def _reason(error: BaseException) -> str | None:
    """Why a write failed, in a line; None for what is no failed write."""
    if isinstance(error, CheckpointException):  # of one process or several, told to all
        reasons = [_reason(cause) for cause, _ in error.failures.values()]
        return next((reason for reason in reasons if reason is not None), None)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = str(error).partition("\n")[0]
    if isinstance(error, RuntimeError):
        # torch tells a failed write by a RuntimeError without an errno
        told = ("Writer failed", "iostream error", "file write failed", "unexpected pos")
        known = any(words in str(error) for words in told)
        return f"write error, as on a full disk: {first}" if known else None
    return first if isinstance(error, OSError | SafetensorError) else None


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [(int(match[1]), path) for match, path in found if match]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
