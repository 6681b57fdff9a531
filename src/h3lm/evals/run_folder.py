"""A folder that belongs to one run: what was run, and what every report says of it."""

import platform
import subprocess
import sys
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from h3lm.errors import UserError
from h3lm.evals.journal import Journal

REPORT, DOCUMENTS, JOURNAL = "report.json", "documents.jsonl", "journal.jsonl"
_PACKAGES = ("h3lm", "torch", "transformers", "lm_eval", "datasets", "tokenizers", "numpy")


def identity_of(model: str, precision: str, **asked: Any) -> dict[str, Any]:
    """What a report depends on: the model's weights, precision, and all that was asked for."""
    return {"model": fingerprint(model), "precision": precision, **asked}


def open_run(folder: Path, identity: dict[str, Any]) -> Journal:
    """Take a folder for a run, or go on with the one that it holds.

    Raises:
        UserError: if it holds the report of another run, or cannot be written.
    """
    if (folder / REPORT).exists() and not (folder / JOURNAL).exists():
        raise UserError(
            f"{folder}: holds a report whose journal is gone, so whose it is cannot be told: give "
            "another --output"
        )
    return Journal(folder / JOURNAL, identity)


def fingerprint(model: str) -> str:
    """Hash of a folder's configuration, weights and tokenizer; of a hub model's name."""
    digest = blake2b(digest_size=16)
    folder = Path(model)
    if not folder.is_dir():
        digest.update(model.encode())
    named = [folder / "config.json", folder / "tokenizer.json"]
    for path in sorted([*filter(Path.is_file, named), *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of what a figure may depend on."""
    found = {"python": platform.python_version(), "commit": _commit()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def command_line() -> str:
    """What was typed."""
    program = Path(sys.argv[0])
    name = "python -m h3lm" if program.name == "__main__.py" else program.name
    return " ".join([name, *sys.argv[1:]])


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def markdown_table(rows: list[list[str]]) -> list[str]:
    """Lines of a table; the first row is its head. Nothing for no rows."""
    if not rows:
        return []
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:], ""]
