"""Which implementation runs, and why."""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

Backend = Literal["auto", "reference", "torch"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch")

logger = logging.getLogger("h3lm.flashconv")


@dataclass(frozen=True)
class Choice:
    """The implementation of one call.

    Attributes:
        backend: "reference" or "torch".
        reason: One sentence for people.
    """

    backend: str
    reason: str


def choose(op: str, device: torch.device, dtype: torch.dtype, backend: str = "auto") -> Choice:
    """Choose the implementation of an op, a pure function of its arguments.

    Args:
        op: Name of the public op.
        device: Where its tensors are.
        dtype: Their dtype.
        backend: What the user asked for.

    Raises:
        ValueError: if `backend` is unknown or cannot do this.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return Choice(backend, "asked for by backend=")
    return Choice("torch", f"{op} on {device.type} has no kernel: plain PyTorch")


def announce(op: str, choice: Choice) -> None:
    """Log a choice once for each op and reason."""
    if not torch.compiler.is_compiling():
        _announce_once(op, choice)


@cache
def _announce_once(op: str, choice: Choice) -> None:
    logger.info("%s: %s (%s)", op, choice.backend, choice.reason)


