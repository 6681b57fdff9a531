"""State space language models that people use: H3, its hybrids, and FlashConv.

Importing this package is cheap: it touches no GPU, loads no Triton, and loads transformers only
when the models are used. It makes transformers' Auto classes know H3.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from h3lm.registration import register_with_transformers

if TYPE_CHECKING:
    from h3lm.layers import H3 as H3
    from h3lm.models import H3ClassificationConfig as H3ClassificationConfig
    from h3lm.models import H3Config as H3Config
    from h3lm.models import H3ForCausalLM as H3ForCausalLM
    from h3lm.models import H3ForSequenceClassification as H3ForSequenceClassification
    from h3lm.models import H3Model as H3Model
    from h3lm.models.convert import convert_official as convert_official

__version__ = "0.1.0"

_PUBLIC = {
    "H3": "h3lm.layers",
    "H3ClassificationConfig": "h3lm.models",
    "H3Config": "h3lm.models",
    "H3ForCausalLM": "h3lm.models",
    "H3ForSequenceClassification": "h3lm.models",
    "H3Model": "h3lm.models",
    "convert_official": "h3lm.models.convert",
}

__all__ = [
    "H3",
    "H3ClassificationConfig",
    "H3Config",
    "H3ForCausalLM",
    "H3ForSequenceClassification",
    "H3Model",
    "convert_official",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'h3lm' has no attribute {name!r}")


register_with_transformers()
