"""What lets a model folder be loaded by programs that do not import `h3lm`.

The folder carries one small file that imports the installed package, and its configuration names
that file, so that `from_pretrained(folder, trust_remote_code=True)` finds the classes. Nothing of
our source is copied.
"""

from pathlib import Path

REMOTE_FILE = "h3lm_model.py"
_CLASSES = {
    "H3Config": {"AutoModel": "H3Model", "AutoModelForCausalLM": "H3ForCausalLM"},
    "H3ClassificationConfig": {"AutoModelForSequenceClassification": "H3ForSequenceClassification"},
}
_NAMES = sorted({name for config, found in _CLASSES.items() for name in (config, *found.values())})
REMOTE_CODE = f'''"""Loads this model with the installed package: pip install h3lm."""

from h3lm.models import {", ".join(_NAMES)}

__all__ = {_NAMES}
'''


def auto_map(config_class: type) -> dict[str, str]:
    """Where the Auto classes find a configuration's classes; empty for a class not ours."""
    name = config_class.__name__
    if name not in _CLASSES:
        return {}
    found = {"AutoConfig": name, **_CLASSES[name]}
    module = REMOTE_FILE.removesuffix(".py")
    return {auto_class: f"{module}.{ours}" for auto_class, ours in found.items()}


def write_remote_code(folder: str | Path) -> None:
    """Write the file that `auto_map` names."""
    (Path(folder) / REMOTE_FILE).write_text(REMOTE_CODE, encoding="utf-8")
