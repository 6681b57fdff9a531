"""Answers written down as they come, so that a killed run goes on where it was."""

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from h3lm.errors import UserError
from h3lm.evals.prefix_tree import Request
from h3lm.evals.scorer import Answer

# The harness has a cache of its own, an SQLite file asked and written request by request, which
# takes longer than the tree does; and it does not know which model an answer came from.


class Journal:
    """A file of answered requests: one line for what they belong to, then one for each.

    Args:
        path: The file; continued if it is there.
        belongs_to: What an answer depends on besides its request: model, precision.

    Raises:
        UserError: if the file belongs to something else, or cannot be read or written.
    """

    def __init__(self, path: Path, belongs_to: dict[str, Any]) -> None:
        self.path, self.known = path, dict[str, Answer]()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._read(belongs_to) if path.exists() else 0
            self._file = path.open("r+b" if whole else "wb")
        except OSError as error:
            raise UserError(f"{path}: cannot be used ({error.strerror or error})") from None
        # What a kill left of its last line goes
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._write([json.dumps(belongs_to)])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @staticmethod
    def key(request: Request) -> str:
        """What a request is known by."""
        parts = ([len(request.context)], request.context, request.continuation)
        ids = b"".join(np.asarray(part, dtype="<i4").tobytes() for part in parts)
        return blake2b(ids, digest_size=16).hexdigest()

    def add(self, keys: Sequence[str], answers: Sequence[Answer]) -> None:
        """Write answers down; they survive the end of the process from here on."""
        self.known.update(zip(keys, answers, strict=True))
        self._write(json.dumps([k, *a]) for k, a in zip(keys, answers, strict=True))

    def _write(self, lines) -> None:
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()

    def _read(self, belongs_to: dict[str, Any]) -> int:
        """Read what is there; returns how many bytes of it are whole lines."""
        data = self.path.read_bytes()
        data = data[: data.rfind(b"\n") + 1]
        lines = data.splitlines()
        if not lines:
            return 0
        try:
            found = json.loads(lines[0])
            for line in lines[1:]:
                key, log_likelihood, is_greedy = json.loads(line)
                self.known[key] = Answer(log_likelihood, is_greedy)
        except (ValueError, TypeError):
            raise UserError(f"{self.path}: is no journal of answers; remove it") from None
        if found != belongs_to:
            differ = [k for k in found | belongs_to if found.get(k) != belongs_to.get(k)]
            raise UserError(
                f"{self.path.parent}: holds the report of another run (its {', '.join(differ)} "
                "differs): give another --output"
            )
        return len(data)
