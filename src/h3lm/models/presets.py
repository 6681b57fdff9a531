"""The paper's four sizes.

Source: Fu et al. 2023 (arXiv 2212.14052v3), section 5, with the widths of the release; the
number of layers, width and heads of the paper's text for the smallest model are not those of its
checkpoint.
"""

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h3lm.models.configuration_h3 import H3Config

GPT2_VOCAB_SIZE = 50257
GPT2_END_OF_TEXT = 50256
PADDED_GPT2_VOCAB_SIZE = 50264  # the next multiple of 8

PRESETS: dict[str, dict[str, Any]] = {
    "125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "355m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16},
    "2.7b": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 20},
}
HYBRID_ATTENTION_LAYERS = {"2.7b": [10, 21]}
PURE_H3_HEAD_DIM = 8
# The rows of the paper's Table 3 (12 layers on OpenWebText), as words for `mixers`
TABLE_3 = ("s4d", "gss", "gss-hybrid", "h3", "hybrid", "attention")


def preset_fields(
    config_class: type, size: str, mixers: str | list[str], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Fields of a preset's config; see `H3Config.from_preset`."""
    if size not in PRESETS:
        raise ValueError(f"there is no preset {size!r}, only {', '.join(PRESETS)}")
    known = {field.name for field in fields(config_class)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"{config_class.__name__} has no field {', '.join(unknown)}")
    chosen = {
        "vocab_size": PADDED_GPT2_VOCAB_SIZE,
        "tokenizer_vocab_size": GPT2_VOCAB_SIZE,
        "bos_token_id": GPT2_END_OF_TEXT,
        "eos_token_id": GPT2_END_OF_TEXT,
        "mixers": mixers,
        "embedding_dropout": 0.1,
        "attention_dropout": 0.1,
        "gss_mlp": False,
        **PRESETS[size],
    }
    if "vocab_size" in overrides:  # another tokenizer
        for key in ("tokenizer_vocab_size", "bos_token_id", "eos_token_id"):
            del chosen[key]
    if size == "2.7b":
        chosen["initializer_range"] = math.sqrt(2 / (5 * chosen["hidden_size"]))
    if isinstance(mixers, str) and mixers.endswith("hybrid") and size in HYBRID_ATTENTION_LAYERS:
        chosen["attention_layers"] = HYBRID_ATTENTION_LAYERS[size]
    if mixers == "h3":
        chosen["h3_head_dim"] = PURE_H3_HEAD_DIM
    if mixers == "attention":
        chosen["rotary_dim"] = chosen["hidden_size"] // chosen["num_attention_heads"]
    return chosen | overrides


def count_parameters(config: "H3Config") -> int:
    """Parameters of a config's model, a tied head counted once; no memory is taken for them."""
    import torch

    from h3lm.models.modeling_h3 import H3ForCausalLM

    with torch.device("meta"):
        return H3ForCausalLM(config).num_parameters()


def parameter_table() -> str:
    """Parameter counts of every preset with the mixers of the paper's Table 3."""
    from h3lm.models.configuration_h3 import H3Config

    lines = ["".join([f"{'mixers':<12}", *(f"{size:>15}" for size in PRESETS)])]
    for mixers in TABLE_3:
        counts = [count_parameters(H3Config.from_preset(size, mixers)) for size in PRESETS]
        lines.append("".join([f"{mixers:<12}", *(f"{count:>15,}" for count in counts)]))
    return "\n".join(lines)
