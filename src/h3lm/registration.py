"""Makes transformers' Auto classes know H3, without loading transformers for it.

`transformers` takes seconds to load, and somebody who came for `h3lm.flashconv` does not need it.
So the registration waits until the Auto classes themselves are loaded, by whomever.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_transformers() -> None:
    """Register now what is loaded already, and the rest as it is loaded."""
    waiting = {}
    for name, register in _REGISTRATIONS.items():
        if name in sys.modules:
            register(sys.modules[name])
        else:
            waiting[name] = register
    if waiting:
        sys.meta_path.insert(0, _RegisterAfterImport(waiting))


def _register_config(configuration_auto: ModuleType) -> None:
    from h3lm.models.configuration_classification import H3ClassificationConfig
    from h3lm.models.configuration_h3 import H3Config

    for config in (H3Config, H3ClassificationConfig):
        configuration_auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models(modeling_auto: ModuleType) -> None:
    # Where our models are what loads the Auto classes, they are half-imported now: they register
    # themselves when they are done
    if "h3lm.models.modeling_h3" not in sys.modules:
        import_module("h3lm.models.modeling_h3")


def _register_classifiers(modeling_h3: ModuleType) -> None:
    import_module("h3lm.models.modeling_classification")  # it needs the one that is done now


_REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "h3lm.models.modeling_h3": _register_classifiers,
}


class _RegisterAfterImport(MetaPathFinder):
    """Runs a function once a module has been executed."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]) -> None:
        self.waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register = self.waiting.pop(name, None)
        if register is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, register)
        return spec


class _Then(Loader):
    def __init__(self, loader: Loader, then: Callable[[ModuleType], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then(module)
