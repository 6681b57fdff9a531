import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from h3lm import H3ForCausalLM, convert_official
from h3lm.data.tokenizers import character_tokenizer
from h3lm.errors import UserError
from h3lm.layers import CausalAttention
from h3lm.layers.attention import rotate
from h3lm.models.convert import convert_checkpoint

HERE = ["pure_hd4", "pure_hd4_oldkeys", "pure_hd4_lightning", "hybrid_rotary_hd8"]
SHARED = ["hybrid_hd1", "hybrid_hd1_oldkeys", "hybrid_rotary_hd8_oldkeys"]


@pytest.fixture(params=[*HERE, *SHARED])
def golden(request, data_dir):
    if request.param in HERE:
        return data_dir / "release" / request.param
    return request.getfixturevalue("shared") / "golden" / request.param


def expectations(folder):
    config = json.loads((folder / "config.json").read_text())
    return config, load_file((folder / config["expected"]).resolve())


def test_logits_and_greedy_ids_are_the_releases(golden):
    config, expected = expectations(golden)
    model = convert_official(golden / "model.pt", num_attention_heads=config["num_heads"])
    assert model.config.h3_head_dim == config["head_dim"]
    assert model.config.rotary_dim == config["rotary_emb_dim"]
    assert model.config.attention_layers == (config["attn_layer_idx"] or [])
    with torch.no_grad():
        for suffix in ("", "_short"):
            logits = model(expected[f"input_ids{suffix}"]).logits
            assert (logits - expected[f"logits{suffix}"]).abs().max() < 1e-4
    for length in config["prompt_lengths"]:
        ids = expected[f"prompt{length}_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert torch.equal(out[:, length:], expected[f"prompt{length}_greedy_ids"])
    with torch.no_grad():
        wide = model.double()(expected["input_ids"]).logits
    # with rotary the release's frequencies are float32 values
    tolerance = 1e-5 if config["rotary_emb_dim"] else 1e-9
    assert (wide - expected["logits_f64"]).abs().max() < tolerance


def test_folder_round_trip_with_tokenizer(data_dir, tmp_path):
    checkpoint = data_dir / "release" / "pure_hd4" / "model.pt"
    _, expected = expectations(checkpoint.parent)
    with pytest.raises(UserError, match="the tokenizer has 257 ids, the model only 64"):
        convert_checkpoint(checkpoint, tmp_path / "bad", tokenizer="bytes")
    characters = "".join(map(chr, range(33, 94)))  # 61, as in the checkpoint
    character_tokenizer(characters).save_pretrained(tmp_path / "tokenizer")
    convert_checkpoint(checkpoint, tmp_path / "model", tokenizer=str(tmp_path / "tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("!]").input_ids == [0, 60]
    loaded = H3ForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert loaded.config.tokenizer_vocab_size == 61
    with torch.no_grad():
        assert (loaded(expected["input_ids"]).logits - expected["logits"]).abs().max() < 1e-4


def test_fused_channel_order_is_ours(data_dir):
    path = data_dir / "release" / "pure_hd4" / "model.pt"
    plain = convert_official(path)
    fused = convert_official(path, channel_order="fused")
    a, b = (m.model.layers[0].mixer.output_proj.weight for m in (plain, fused))
    permutation = torch.arange(32).view(4, 8).T.flatten()
    assert torch.equal(a, b[:, permutation])


@pytest.fixture
def weights(data_dir):
    return torch.load(data_dir / "release" / "hybrid_rotary_hd8" / "model.pt", weights_only=True)


def convert(tmp_path, contents, **options):
    path = tmp_path / "model.pt"
    torch.save(contents, path)
    return convert_official(path, **({"num_attention_heads": 4} | options))


def test_shared_modes_are_tiled_over_heads(tmp_path, weights):
    prefix = "backbone.layers.0.mixer.kernel.kernel."
    for name in ("B", "inv_A_real", "A_imag"):
        weights[prefix + name] = weights[prefix + name][:2].clone()
    ssm = convert(tmp_path, weights).model.layers[0].mixer.diagonal_ssm
    assert torch.equal(ssm.A_imag[0], ssm.A_imag[2])
    assert torch.equal(ssm.A_imag[1], weights[prefix + "A_imag"][1])


def test_a_mistake_lists_the_keys(tmp_path, weights):
    missing = dict(weights)
    del missing["backbone.ln_f.bias"]
    with pytest.raises(UserError, match=r"missing: model\.norm\.bias"):
        convert(tmp_path, missing)
    with pytest.raises(UserError, match=r"unexpected keys .*backbone\.layers\.0\.mixer\.extra"):
        convert(tmp_path, weights | {"backbone.layers.0.mixer.extra": torch.zeros(1)})
    name = "backbone.layers.1.mlp.fc2.bias"
    with pytest.raises(UserError, match=r"misshapen: .*down_proj\.bias is \(3,\) instead of"):
        convert(tmp_path, weights | {name: torch.zeros(3)})
    head = {"lm_head.weight": torch.zeros_like(weights["lm_head.weight"])}
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        convert(tmp_path, weights | head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": None}, r"layers \[1, 3\] are attention.*--num-attention-heads"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide the width 64"),
        ({"rotary_dim": 4}, "rotary_dim=4 contradicts the checkpoint, whose tensors say 8"),
        ({"h3_head_dim": 1}, "h3_head_dim=1 contradicts"),
        ({"channel_order": "odd"}, "channel_order='odd' is not one of plain, fused"),
    ],
)
def test_contradictions_are_named(tmp_path, weights, options, message):
    with pytest.raises(UserError, match=message):
        convert(tmp_path, weights, **options)


class Exploit:
    def __reduce__(self):
        return (open, ("/tmp/h3lm-should-not-exist", "w"))


def test_files_that_are_no_checkpoint(tmp_path, data_dir):
    path = tmp_path / "model.pt"
    with pytest.raises(UserError, match="no such checkpoint file"):
        convert_official(path)
    whole = (data_dir / "release" / "pure_hd4" / "model.pt").read_bytes()
    for contents in (b"", b"not a checkpoint", b"a", b"0", b"R.", whole[: len(whole) // 2]):
        path.write_bytes(contents)
        with pytest.raises(UserError, match="not a PyTorch checkpoint, or a damaged one"):
            convert_official(path)
    torch.save({"weight": Exploit()}, path)
    with pytest.raises(UserError, match="could run code; not loaded"):
        convert_official(path)
    path.write_bytes(pickle.dumps(Exploit(), protocol=2))
    with pytest.raises(UserError):
        convert_official(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds a list, not a state dict"):
        convert_official(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a checkpoint of the H3 release"):
        convert_official(path)


def test_golden_attention(data_dir):
    g = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(
        data_dir / "mixers" / "attention.npz").items()}  # fmt: skip
    x = g["x"] if "x" in g else g["u"]
    layer = CausalAttention(12, 2, rotary_dim=4).double()
    with torch.no_grad():
        layer.qkv_proj.weight.copy_(g["W_qkv"].reshape(36, 12))
        layer.qkv_proj.bias.copy_(g["b_qkv"].reshape(36))
        layer.output_proj.weight.copy_(g["W_o"])
        layer.output_proj.bias.copy_(g["b_o"])
        y, state = layer(x)
    assert (y - g["y_rotary"]).abs().max() < 1e-6  # cosine and sine are rounded to float32
    cache = torch.stack([state.keys, state.values], 0).permute(1, 3, 0, 2, 4)
    assert (cache - g["kv_cache_final"]).abs().max() < 1e-6
    plain = CausalAttention(12, 2).double()
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        y, _ = plain(x + g["pos_table"][: x.shape[1]])
    assert (y - g["y_learned_pos"]).abs().max() < 1e-9


def test_rotation_leaves_the_rest_alone():
    x = torch.randn(1, 2, 3, 8)
    cos, sin = torch.zeros(1, 1, 3, 2), torch.ones(1, 1, 3, 2)
    y = rotate(x, cos, sin)
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert torch.equal(y[..., :2], -x[..., 2:4])
    assert torch.equal(y[..., 2:4], x[..., :2])
