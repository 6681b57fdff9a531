"""The check that stands before the first use of a kernel, told once on each machine."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from logging import Logger
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.graph import saved_tensors_hooks

Found = dict[Any, str]


def first_use(
    logger: Logger, said: str, found: Found
) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Make a comparison with plain PyTorch the check before a kernel's first use.

    The comparison says what is wrong, nothing if all is well. It then runs once for the same
    arguments, a kernel that does not compile or run is wrong too, and what is wrong is warned of.

    Args:
        logger: Where to warn.
        said: What is off and what takes over; `{0}` is the comparison's first argument,
            `{1}` its second.
        found: What is wrong, by the argument or the tuple of them: also for where nothing can be
            tried, in a CUDA graph or under a compiler, and only an earlier check can say no.

    Returns:
        A decorator. What it makes has `cache_clear`, which forgets what was found.
    """

    def around(compare: Callable[..., str]) -> Callable[..., str]:
        @wraps(compare)
        def fault(*key: Any) -> str:
            place = key[0] if len(key) == 1 else key
            if place in found:
                return found[place]
            try:
                with _apart():
                    wrong = compare(*key)
            except Exception as error:  # whatever a compiler may raise
                first = str(error).splitlines()[0] if str(error) else ""
                wrong = f"{type(error).__name__}: {first}"
            found[place] = wrong
            if wrong:
                logger.warning("%s: %s", said.format(*key), wrong)
            return wrong

        fault.cache_clear = found.clear  # type: ignore[attr-defined]
        return fault

    return around


def _apart() -> AbstractContextManager[object]:
    """Make the comparison no part of what goes on around it.

    Hooks of activation checkpointing count what is saved, and raise; vmap raises for random
    numbers. Transforms of functorch allow no hooks at all, and need none: they save nothing then.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return temporarily_clear_interpreter_stack()
    return saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(x: Tensor) -> Tensor:
    return x
