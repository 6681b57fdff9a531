"""One writer to a folder."""

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from h3lm.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "in-use.lock"


@contextmanager
def only_writer(folder: Path, command: str) -> Iterator[None]:
    """Keep other processes from writing into a folder at the same time.

    The operating system holds the lock and lets go of it when a process ends in whatever way: the
    file that a killed one leaves behind locks nothing.

    Args:
        folder: The folder; it exists.
        command: What writes, for the others to read.

    Raises:
        UserError: if another process writes there, naming it.
        OSError: if the lock cannot be written.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK_FILE
    descriptor = _locked(path)
    if descriptor is None:
        raise UserError(
            f"{folder}: {_holder(path)} writes here: wait for it or take another folder"
        )
    try:
        words = f"{command} (process {os.getpid()} on {socket.gethostname()})\n"
        os.truncate(descriptor, 0)
        os.write(descriptor, words.encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").strip() or "another process"
    return "another process"


def _locked(path: Path) -> int | None:
    """Open and lock a file; None if another process has locked it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it before may have removed the file since it was opened
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
