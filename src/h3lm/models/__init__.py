"""Hugging Face from here up. Names are loaded when they are used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h3lm.models.configuration_classification import (
        H3ClassificationConfig as H3ClassificationConfig,
    )
    from h3lm.models.configuration_h3 import H3Config as H3Config
    from h3lm.models.modeling_classification import (
        H3ForSequenceClassification as H3ForSequenceClassification,
    )
    from h3lm.models.modeling_h3 import H3ForCausalLM as H3ForCausalLM
    from h3lm.models.modeling_h3 import H3Model as H3Model

_PUBLIC = {
    "H3ClassificationConfig": "h3lm.models.configuration_classification",
    "H3Config": "h3lm.models.configuration_h3",
    "H3ForCausalLM": "h3lm.models.modeling_h3",
    "H3ForSequenceClassification": "h3lm.models.modeling_classification",
    "H3Model": "h3lm.models.modeling_h3",
}

__all__ = [
    "H3ClassificationConfig",
    "H3Config",
    "H3ForCausalLM",
    "H3ForSequenceClassification",
    "H3Model",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'h3lm.models' has no attribute {name!r}")
