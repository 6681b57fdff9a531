"""Trainings that were given up, in files from which another call goes on."""

import pickle
from collections.abc import Iterator, Sequence
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


def keep(
    out: Path,
    setting: str,
    mixer: str,
    models: Sequence[Wanted],
    standing: Standing | None,
    came_from: Path | None,
) -> None:
    """Write down where models stand, in place of the file that they came from.

    Args:
        out: Folder of the report.
        setting: Name of the setting.
        mixer: The mixer, as it was asked for.
        models: What was given up.
        standing: Where they stand; None if nothing was.
        came_from: File that a part of them was in; gone afterwards.
    """
    if standing is not None:
        kind, seed, recipe = models[0]
        label = f"{setting}-{mixer}-{kind}-{seed}-{recipe.learning_rate:g}-{recipe.epochs}"
        file = _folder(out) / f"{label.replace(':', '-').replace('+', '-')}.pt"
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".partial")
        keys = [_key(one) for one in models]
        torch.save(
            {"setting": setting, "mixer": mixer, "keys": keys, "standing": standing._asdict()},
            partial,
        )
        partial.replace(file)
        if came_from == file:
            return
    if came_from is not None:
        came_from.unlink(missing_ok=True)


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
