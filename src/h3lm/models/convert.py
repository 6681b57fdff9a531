"""Checkpoints of the authors' release, as our models.

The release stored its models in two layouts of keys, plain or inside a PyTorch Lightning
checkpoint. The older layout normalised behind each sublayer: its norms are the same ones, named
one place later.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from h3lm.data.tokenizers import load_tokenizer
from h3lm.errors import UserError
from h3lm.models.configuration_h3 import H3Config
from h3lm.models.folders import save_model
from h3lm.models.modeling_h3 import H3ForCausalLM
from h3lm.models.presets import GPT2_END_OF_TEXT, GPT2_VOCAB_SIZE, PADDED_GPT2_VOCAB_SIZE

Tensors = dict[str, Tensor]
CHANNEL_ORDERS = ("plain", "fused")


def convert_official(
    path: str | Path,
    *,
    num_attention_heads: int | None = None,
    rotary_dim: int | None = None,
    h3_head_dim: int | None = None,
    channel_order: str = "plain",
) -> H3ForCausalLM:
    """Read a checkpoint of the authors' release.

    Widths, layers, mixers, state size, rotary width and head width are read off the tensors; an
    argument that contradicts them is an error. The number of attention heads leaves no trace in
    a checkpoint and has to be given where a layer is attention.

    Args:
        path: The release's `model.pt`; nothing in it is executed.
        num_attention_heads: Heads of the attention layers (125M 12, 355M 16, 1.3B 16, 2.7B 20).
        rotary_dim: Rotated features of an attention head, to check.
        h3_head_dim: Channels of an H3 head, to check.
        channel_order: How the training code ordered channels behind the H3 core where heads have
            several: "plain" (its PyTorch path: member, then head) or "fused" (its CUDA path and
            ours: head, then member).

    Returns:
        A float32 model in eval mode.

    Raises:
        UserError: if the file is missing, damaged, in another format or contains code; if keys
            are missing, unexpected or misshapen (all are named); if an argument contradicts the
            tensors or is needed and not given.
    """
    if channel_order not in CHANNEL_ORDERS:
        raise UserError(
            f"channel_order={channel_order!r} is not one of {', '.join(CHANNEL_ORDERS)}"
        )
    tensors = _current_layout(_unwrap_lightning(_read(Path(path))))
    config = _infer_config(tensors, num_attention_heads)
    _contradiction("rotary_dim", rotary_dim, config.rotary_dim)
    _contradiction("h3_head_dim", h3_head_dim, config.h3_head_dim)
    with torch.device("meta"):
        model = H3ForCausalLM(config)
    weights = _rename(tensors, config, channel_order)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    _check_shapes(weights, expected)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.float().eval()


def _read(path: Path) -> object:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch names what it refused to build; garbage is refused at its first byte
        if "Unsupported global" in str(error) or "not an allowed global" in str(error):
            raise UserError(
                f"{path}: holds objects other than tensors, which could run code; not loaded"
            ) from None
        raise UserError(f"{path}: not a PyTorch checkpoint, or a damaged one") from None
    except MemoryError:
        raise
    except Exception:  # what is no pickle is read as one, and fails in any way
        raise UserError(f"{path}: not a PyTorch checkpoint, or a damaged one") from None


def _unwrap_lightning(loaded: object) -> Tensors:
    if not isinstance(loaded, Mapping):
        raise UserError(f"the checkpoint holds a {type(loaded).__name__}, not a state dict")
    if "pytorch-lightning_version" in loaded or "state_dict" in loaded:
        loaded = loaded.get("state_dict")
        if not isinstance(loaded, Mapping):
            raise UserError("the Lightning checkpoint has no state_dict")
        loaded = {
            str(key).removeprefix("model."): value
            for key, value in loaded.items()
            if str(key).startswith("model.")  # metrics have entries of their own
        }
    wrong = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if wrong or not loaded:
        what = f"{wrong[0]} is no tensor" if wrong else "it is empty"
        raise UserError(f"the checkpoint is not a state dict of tensors: {what}")
    return {str(key): value for key, value in loaded.items()}


def _current_layout(tensors: Tensors) -> Tensors:
    """Rename the older layout's keys, as the release's own loader does."""
    renamed: Tensors = {}
    for key, value in tensors.items():
        key = key.replace("s4seq.encoder.", "backbone.")
        key = re.sub(r"^embedding\.", "backbone.embeddings.word_embeddings.", key)
        renamed[re.sub(r"^backbone\.norm\.", "backbone.ln_0.", key)] = value
    if "backbone.ln_0.weight" not in renamed:
        return renamed
    last = max(_layers(renamed), default=-1)

    def earlier(match: re.Match[str]) -> str:
        layer, norm = int(match[1]), match[2]
        if norm == "1":
            return f"backbone.layers.{layer}.norm2."
        if layer == last:
            return "backbone.ln_f."
        return f"backbone.layers.{layer + 1}.norm1."

    moved: Tensors = {}
    for key, value in renamed.items():
        if key.startswith("backbone.ln_0."):
            moved[key.replace("backbone.ln_0.", "backbone.layers.0.norm1.")] = value
        else:
            moved[re.sub(r"^backbone\.layers\.(\d+)\.norm([12])\.", earlier, key)] = value
    return moved


def _layers(tensors: Tensors) -> set[int]:
    found = (re.match(r"backbone\.layers\.(\d+)\.", key) for key in tensors)
    return {int(match[1]) for match in found if match}


def _infer_config(tensors: Tensors, num_attention_heads: int | None) -> H3Config:
    def shape(key: str) -> torch.Size:
        if key not in tensors:
            raise UserError(f"not a checkpoint of the H3 release: {key} is missing")
        return tensors[key].shape

    vocab_size, hidden_size = shape("backbone.embeddings.word_embeddings.weight")
    layers = sorted(_layers(tensors))
    if layers != list(range(len(layers))) or not layers:
        raise UserError(f"the checkpoint has layers {layers}, not 0 to {len(layers) - 1}")
    prefix = "backbone.layers.{}.mixer."
    attention = [i for i in layers if prefix.format(i) + "Wqkv.weight" in tensors]
    h3 = [i for i in layers if i not in attention]
    known: dict[str, int] = {}
    if h3:
        mixer = prefix.format(h3[0])
        known["d_state"] = shape(mixer + "ssm_k_kernel.kernel.B")[-1]
        heads = shape(mixer + "D")[0]
        if hidden_size % heads:
            raise UserError(f"{mixer}D has {heads} heads for a width of {hidden_size}")
        known["h3_head_dim"] = hidden_size // heads
    if attention:
        if num_attention_heads is None:
            raise UserError(
                f"layers {attention} are attention, and a checkpoint does not tell their number "
                "of heads: give it (--num-attention-heads; 125M 12, 355M 16, 1.3B 16, 2.7B 20)"
            )
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise UserError(
                f"num_attention_heads={num_attention_heads} does not divide the width {hidden_size}"
            )
        known["num_attention_heads"] = num_attention_heads
        rotary = tensors.get(prefix.format(attention[0]) + "rotary_emb.inv_freq")
        known["rotary_dim"] = 0 if rotary is None else 2 * len(rotary)
    else:
        known["num_attention_heads"] = num_attention_heads or 1
    positions = tensors.get("backbone.embeddings.position_embeddings.weight")
    if positions is not None:
        known["num_learned_positions"] = positions.shape[0]
    if vocab_size == PADDED_GPT2_VOCAB_SIZE:
        known |= {"tokenizer_vocab_size": GPT2_VOCAB_SIZE}
        known |= {"bos_token_id": GPT2_END_OF_TEXT, "eos_token_id": GPT2_END_OF_TEXT}
    try:
        return H3Config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=shape("backbone.layers.0.mlp.fc1.weight")[0],
            num_hidden_layers=len(layers),
            mixers=["attention" if i in attention else "h3" for i in layers],
            **known,
        )
    except ValueError as error:
        raise UserError(f"the checkpoint's shapes make no model: {error}") from None


def _contradiction(name: str, given: int | None, found: int) -> None:
    if given is not None and given != found:
        raise UserError(f"{name}={given} contradicts the checkpoint, whose tensors say {found}")


_PLAIN = {
    "backbone.embeddings.word_embeddings.weight": "model.embed_tokens.weight",
    "backbone.embeddings.position_embeddings.weight": "model.embed_positions.weight",
    "backbone.ln_f.weight": "model.norm.weight",
    "backbone.ln_f.bias": "model.norm.bias",
    "lm_head.weight": "lm_head.weight",
}
_IN_LAYER = {
    **{f"norm{n}.{part}": f"norm{n}.{part}" for n in (1, 2) for part in ("weight", "bias")},
    **{f"mlp.fc1.{part}": f"mlp.up_proj.{part}" for part in ("weight", "bias")},
    **{f"mlp.fc2.{part}": f"mlp.down_proj.{part}" for part in ("weight", "bias")},
    **{f"mixer.Wqkv.{part}": f"mixer.qkv_proj.{part}" for part in ("weight", "bias")},
    **{f"mixer.out_proj.{part}": f"mixer.output_proj.{part}" for part in ("weight", "bias")},
    **{f"mixer.output_linear.{part}": f"mixer.output_proj.{part}" for part in ("weight", "bias")},
    "mixer.ssm_k_kernel.kernel.B": "mixer.shift_ssm.B",
    "mixer.ssm_k_kernel.kernel.C": "mixer.shift_ssm.C",
    "mixer.ssm_k_D": "mixer.shift_ssm.D",
    "mixer.kernel.kernel.log_dt": "mixer.diagonal_ssm.log_dt",
    "mixer.kernel.kernel.inv_A_real": "mixer.diagonal_ssm.log_neg_A_real",
    "mixer.kernel.kernel.A_imag": "mixer.diagonal_ssm.A_imag",
    "mixer.kernel.kernel.B": "mixer.diagonal_ssm.B",
    "mixer.kernel.kernel.C": "mixer.diagonal_ssm.C",
    "mixer.D": "mixer.diagonal_ssm.D",
}
# One copy may serve several heads: head h has row h mod copies
_SHARED = {"mixer.diagonal_ssm.log_neg_A_real", "mixer.diagonal_ssm.A_imag", "mixer.diagonal_ssm.B"}


def _rename(tensors: Tensors, config: H3Config, channel_order: str) -> Tensors:
    """The release's tensors under our names; lists keys that have none."""
    ours: Tensors = {}
    parts: dict[str, Tensors] = {}
    unexpected: list[str] = []
    for key, value in tensors.items():
        value = value.to(torch.float32)
        match = re.match(r"backbone\.layers\.(\d+)\.(.*)", key)
        prefix, tail = (f"model.layers.{match[1]}.", match[2]) if match else ("", key)
        projection = re.fullmatch(r"mixer\.([qkv])_proj\.(weight|bias)", tail)
        if projection:
            parts.setdefault(f"{prefix}mixer.qkv_proj.{projection[2]}", {})[projection[1]] = value
        elif tail == "mixer.rotary_emb.inv_freq":
            _check_frequencies(key, value)
        elif (name := _IN_LAYER.get(tail) if match else _PLAIN.get(key)) is not None:
            if tail == "mixer.output_linear.weight" and channel_order == "plain":
                value = _head_first(value, config)
            ours[prefix + name] = _reshape(name, value, config)
        else:
            unexpected.append(key)
    if unexpected:
        raise UserError(f"unexpected keys in the checkpoint: {', '.join(sorted(unexpected))}")
    for name, three in parts.items():
        if set(three) == {"q", "k", "v"}:
            ours[name] = torch.cat([three[x] for x in "qkv"])
    head = ours.get("lm_head.weight")
    if head is not None and not torch.equal(head, ours["model.embed_tokens.weight"]):
        raise UserError("lm_head.weight differs from the embedding; the release ties them")
    return ours


def _head_first(weight: Tensor, config: H3Config) -> Tensor:
    """Columns in the order (member, head) into the order (head, member)."""
    if weight.dim() != 2 or weight.shape[1] != config.hidden_size:
        return weight  # reported with the other misshapen ones
    return weight.unflatten(1, (config.h3_head_dim, -1)).transpose(1, 2).flatten(1)


def _reshape(name: str, value: Tensor, config: H3Config) -> Tensor:
    heads = config.hidden_size // config.h3_head_dim
    if name.endswith("_ssm.C") and value.dim() and value.shape[0] == 1:
        return value[0]  # the release's axis for output channels, always one
    if name in _SHARED and value.dim() and 0 < value.shape[0] < heads:
        return value[torch.arange(heads) % value.shape[0]]
    return value


def _check_frequencies(key: str, value: Tensor) -> None:
    exponent = torch.arange(len(value), dtype=torch.float64) / len(value)
    if not torch.allclose(value.double(), 10000.0**-exponent, rtol=1e-5, atol=0):
        raise UserError(f"{key} are not the frequencies of base 10000, the only ones supported")


def _check_shapes(weights: Tensors, expected: dict[str, tuple[int, ...]]) -> None:
    missing = sorted(set(expected) - set(weights))
    unexpected = sorted(set(weights) - set(expected))
    wrong = [
        f"{name} is {tuple(weights[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    complaints = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", wrong))
        if names
    ]
    if complaints:
        raise UserError(f"the checkpoint does not fit the model: {'; '.join(complaints)}")


def convert_checkpoint(
    path: str | Path,
    out_dir: str | Path,
    *,
    tokenizer: str | None = None,
    num_attention_heads: int | None = None,
    rotary_dim: int | None = None,
    h3_head_dim: int | None = None,
    channel_order: str = "plain",
) -> H3ForCausalLM:
    """`convert_official`, and a folder that `from_pretrained` loads.

    Args:
        path: The release's checkpoint.
        out_dir: Folder to write.
        tokenizer: Folder or name of the tokenizer to put beside the model; it must fit.
        num_attention_heads, rotary_dim, h3_head_dim, channel_order: As in `convert_official`.

    Raises:
        UserError: as there, and if the tokenizer does not fit or the folder cannot be written.
    """
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    model = convert_official(
        path,
        num_attention_heads=num_attention_heads,
        rotary_dim=rotary_dim,
        h3_head_dim=h3_head_dim,
        channel_order=channel_order,
    )
    save_model(model, out_dir, loaded)
    return model
