"""Trainings that were given up, in files from which another call goes on."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from h3lm.errors import UserError
from h3lm.synthetics.ensemble import Recipe, Standing

Wanted = tuple[str, int, Recipe]  # kind, seed, how


def split(
    out: Path, setting: str, mixer: str, wanted: Sequence[Wanted]
) -> Iterator[tuple[Path | None, tuple[Wanted, ...]]]:
    """Models to train, those that an earlier call gave up together by the file that holds them.

    Raises:
        UserError: if a file cannot be read.
    """
    left = {_key(one): one for one in wanted}
    for file in sorted(_folder(out).glob("*.pt")):
        stored = _read(file)
        if (stored["setting"], stored["mixer"]) != (setting, mixer):
            continue
        found = tuple(left.pop(key) for key in stored["keys"] if key in left)
        if found:
            yield file, found
    if left:
        yield None, tuple(left.values())


def step_of(file: Path) -> int:
    """Steps that a file's models have taken."""
    step: int = _read(file)["standing"]["step"]
    return step


def load(file: Path, wanted: Sequence[Wanted], num_parameters: int) -> Standing:
    """Where these models stand.

    Raises:
        UserError: if the file cannot be read, or its models have other parameters.
    """
    stored = _read(file)
    standing = Standing(**stored["standing"])
    if standing.flat.shape[1] != num_parameters:
        raise UserError(f"{file} holds models of another size than these: move it away")
    return standing.of([stored["keys"].index(_key(one)) for one in wanted])


@dataclass(frozen=True)
class Pending:
    """Files to be put in place, and one that they replace."""

    files: tuple[tuple[Path, Path], ...]  # as written, and as it shall be named
    replaced: Path | None


def write(
    out: Path,
    setting: str,
    mixer: str,
    wanted: Sequence[Wanted],
    left: Sequence[Wanted],
    standing: Standing | None,
    came_from: Path | None,
) -> Pending:
    """Write down where models stand; `settle` makes it count, once everything else is written.

    Args:
        out: Folder of the report.
        setting: Name of the setting.
        mixer: The mixer, as it was asked for.
        wanted: What was trained.
        left: What of that was given up.
        standing: Where that stands; None if nothing was.
        came_from: File that `wanted` was in, perhaps with others, which go on standing there.
    """
    groups = [] if standing is None else [([_key(one) for one in left], standing)]
    if came_from is not None:
        stored = _read(came_from)
        gone = {_key(one) for one in wanted}
        rows = [row for row, key in enumerate(stored["keys"]) if key not in gone]
        if rows:
            others = Standing(**stored["standing"]).of(rows)
            groups.append(([stored["keys"][row] for row in rows], others))
    files = []
    for keys, where in groups:
        kind, seed, rate, epochs = keys[0]
        label = f"{setting}-{mixer}-{kind}-{seed}-{rate:g}-{epochs}"
        file = _folder(out) / f"{label.replace(':', '-').replace('+', '-')}.pt"
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".partial")
        held = {"setting": setting, "mixer": mixer, "keys": keys, "standing": where._asdict()}
        torch.save(held, partial)
        files.append((partial, file))
    return Pending(tuple(files), came_from)


def settle(pending: Pending) -> None:
    """Put in place what `write` has written, last what takes the place of the file of before.

    If it ends between two, that one still holds all.
    """
    for partial, file in sorted(pending.files, key=lambda pair: pair[1] == pending.replaced):
        partial.replace(file)
    if pending.replaced is not None and pending.replaced not in [f for _, f in pending.files]:
        pending.replaced.unlink(missing_ok=True)


def _folder(out: Path) -> Path:
    return out / "unfinished"


def _key(one: Wanted) -> tuple[str, int, float, int]:
    kind, seed, recipe = one
    return kind, seed, recipe.learning_rate, recipe.epochs


def _read(file: Path) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = torch.load(file, weights_only=True)
        stored["keys"], stored["standing"]["step"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        raise UserError(f"{file} is not of this lab: move it away") from None
    return stored
