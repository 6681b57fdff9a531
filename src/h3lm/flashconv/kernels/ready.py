"""Launching a Triton kernel without what Triton works out anew for each launch.

Which compiled kernel a call is for follows from the dtypes and the alignment of its tensors and
from its numbers. Triton looks at every argument to find out, about 40 us on a server's processor;
a short row is convolved in less. `ready` asks Triton once for arguments like these, and then
launches what it got, as Triton's own tutorials do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

MAX_KEPT = 256  # kinds of calls of a kernel


class Ready:
    """A kernel of `triton.jit` that keeps what it was compiled to.

    It is launched like that one: `kernel[grid](*arguments, **constants)`. Arguments by position,
    constants and options of the compiler by name.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._kept: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        key = (
            *((x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x for x in arguments),
            *constants.values(),
            torch.cuda.current_device() if torch.cuda.is_initialized() else None,
        )
        found = self._kept.get(key)
        if found is None:
            self._keep(key, self.kernel[grid](*arguments, **constants), arguments, constants)
            return
        compiled, behind = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *behind)

    def _keep(
        self,
        key: tuple[Any, ...],
        compiled: Any,
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        if compiled is None:  # the interpreter compiles nothing
            return
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        names = self.kernel.arg_names[len(arguments) :]
        self._kept[key] = compiled, tuple(constants[name] for name in names)


def ready(kernel: Any) -> Ready:
    """Decorate a kernel, above `triton.jit`."""
    return Ready(kernel)
