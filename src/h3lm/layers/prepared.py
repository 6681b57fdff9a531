"""Things derived from parameters, kept while the parameters provably stand still."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Prepared(Generic[T]):
    """The last result of a function of parameters.

    It is reused only while gradients are off and the owner is in eval mode, and only if every
    parameter has the same storage, dtype, device and version as before. Versions alone prove
    nothing (fused optimisers and sharding engines write without counting), so the owner is a
    `PreparingModule`, which drops it wherever parameters may change.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._value: T | None = None

    def drop(self) -> None:
        """Forget the result."""
        self._key = self._value = None

    def get(self, owner: nn.Module, make: Callable[[], T]) -> T:
        """Return the result for the owner's parameters, made anew where reuse is not safe."""
        if owner.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        key = _key(owner.parameters())
        if key is None:
            return make()
        if self._value is None or key != self._key:
            self._key, self._value = key, make()
        return self._value


class PreparingModule(nn.Module):
    """Base of modules with `Prepared` attributes: drops them wherever parameters may change."""

    def drop_prepared(self) -> None:
        """Forget what was prepared."""
        for attribute in vars(self).values():
            if isinstance(attribute, Prepared):
                attribute.drop()

    def train(self, mode: bool = True) -> "PreparingModule":
        """Switch mode; an optimiser may have run in between."""
        self.drop_prepared()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PreparingModule":
        self.drop_prepared()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.drop_prepared()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _key(parameters: Iterable[Tensor]) -> tuple[Any, ...] | None:
    key = []
    for p in parameters:
        if type(p) is not nn.Parameter or p.is_inference():  # sharded, or without a version
            return None
        key.append((p.data_ptr(), p.dtype, p.device, p._version))
    return tuple(key)
