import math

import pytest
import torch
from torch.nn.functional import cross_entropy, pad
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from h3lm import H3Config, H3ForCausalLM, H3Model

from .conftest import FAMILIES, small_config, small_model


def test_initialisation_is_the_releases():
    torch.manual_seed(0)
    config = H3Config(vocab_size=512, hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
    model = H3ForCausalLM(config)
    scaled = 0.02 / math.sqrt(8)
    for layer in model.model.layers:
        assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.mlp.down_proj.weight.std().item() == pytest.approx(scaled, rel=0.05)
        expected = scaled if layer.mixer_name == "attention" else 0.02
        assert layer.mixer.output_proj.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert not layer.mixer.qkv_proj.bias.any()
    h3 = model.model.layers[0].mixer
    assert torch.equal(h3.shift_ssm.B[:, 0], torch.ones(256))
    assert h3.diagonal_ssm.D.std().item() == pytest.approx(1.0, rel=0.2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config.scale_h3_output = True
    scaled_model = H3ForCausalLM(config)
    output = scaled_model.model.layers[0].mixer.output_proj
    assert output.weight.std().item() == pytest.approx(scaled, rel=0.05)


def test_loss_is_that_of_the_next_token(model, ids):
    output = model(ids, labels=ids)
    expected = cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(output.loss, expected, atol=1e-6)
    shifted = model(ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:].contiguous())
    assert torch.allclose(shifted.loss, expected, atol=1e-5)


def test_logits_to_keep_and_hidden_states(model, ids):
    full = model(ids, output_hidden_states=True)
    assert torch.allclose(model(ids, logits_to_keep=3).logits, full.logits[:, -3:], atol=1e-6)
    assert len(full.hidden_states) == 5
    assert torch.equal(model.lm_head(full.hidden_states[-1]), full.logits)
    assert isinstance(model(ids, return_dict=False), tuple)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("rows", [1, 2])
def test_padding_changes_nothing(model, ids, side, rows):
    ids = ids[:rows]
    expected = model(ids).logits
    if side == "inside":
        junk = torch.randint(0, 72, (rows, 4))
        padded = torch.cat([ids[:, :10], junk, ids[:, 10:]], 1)
        mask = torch.ones_like(padded)
        mask[:, 10:14] = 0
    else:
        size = (6, 0) if side == "left" else (0, 6)
        padded, mask = pad(ids, size, value=3), pad(torch.ones_like(ids), size)
    actual = model(padded, attention_mask=mask).logits
    assert torch.allclose(actual[mask.bool()].view_as(expected), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(2, 36)}, r"is \(2, 36\), these inputs need \(2, 37\)"),
        ({"attention_mask": torch.ones(1, 37)}, r"is \(1, 37\), these inputs need \(2, 37\)"),
        ({"attention_mask": torch.ones(37)}, r"attention_mask is \(37,\): give \(B, S\)"),
        ({"position_ids": torch.arange(36)[None]}, r"position_ids is \(1, 36\) .* of 37 positions"),
        ({"position_ids": torch.arange(37)}, r"position_ids is \(37,\) for 2 rows"),
        ({"position_ids": torch.arange(37).expand(3, 37)}, r"\(3, 37\) for 2 rows"),
        ({"attention_mask": [[1] * 37] * 2}, "attention_mask must be a tensor, not list"),
    ],
)
def test_masks_and_positions_of_other_shapes_are_refused(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        model(ids, **options)


def test_a_mask_counts_what_the_cache_has_seen(model, ids):
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"is \(2, 3\), these inputs need \(2, 40\)"):
        model(ids[:, :3], past_key_values=cache, attention_mask=torch.ones(2, 3))


def test_only_attention_takes_a_mask_of_pairs(model, ids):
    pairs = torch.ones(37, 37).tril().bool().expand(2, 1, 37, 37)
    if set(model.config.mixers) == {"attention"}:
        actual = model(ids, attention_mask=pairs).logits
        assert torch.allclose(actual, model(ids).logits, atol=2e-5)
    else:
        with pytest.raises(ValueError, match="is attention's alone"):
            model(ids, attention_mask=pairs)


def test_packed_documents_do_not_see_each_other(model, ids):
    lengths = (5, 20, 12)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions.expand(2, -1)).logits
    start = 0
    for n in lengths:
        alone = model(ids[:, start : start + n]).logits
        assert torch.allclose(packed[:, start : start + n], alone, atol=2e-5)
        start += n


def test_flattened_documents_as_the_librarys_collator_gives_them(model, ids):
    from transformers import DataCollatorWithFlattening

    documents = [ids[0, :9].tolist(), ids[0, 9:10].tolist(), ids[1, :20].tolist()]
    collate = DataCollatorWithFlattening(
        return_position_ids=False, return_flash_attn_kwargs=True, return_seq_idx=False
    )
    batch = collate([{"input_ids": document} for document in documents])
    logits = model(batch["input_ids"], cu_seq_lens_q=batch["cu_seq_lens_q"]).logits
    start = 0
    for document in documents:
        alone = model(torch.tensor([document])).logits
        assert torch.allclose(logits[:, start : start + len(document)], alone, atol=2e-5)
        start += len(document)


def test_save_and_load_bit_exact(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is H3ForCausalLM
    for (name, a), (other, b) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded.eval()(ids).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), H3Config)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is H3Model
    assert body.config.mixers == model.config.mixers


def test_ssm_parameters_stay_float32(tmp_path):
    model = small_model(mixers="hybrid")
    exact = {n: p.detach().clone() for n, p in model.named_parameters() if "_ssm." in n}
    assert exact

    def check(candidate, dtype):
        for name, parameter in candidate.named_parameters():
            if "_ssm." in name:
                assert parameter.dtype == torch.float32, name
                assert torch.equal(parameter, exact[name]), name
            else:
                assert parameter.dtype == dtype, name

    model.save_pretrained(tmp_path / "wide")
    loaded = H3ForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    check(loaded, torch.bfloat16)
    loaded.save_pretrained(tmp_path / "narrow")
    check(H3ForCausalLM.from_pretrained(tmp_path / "narrow"), torch.bfloat16)
    check(loaded.half(), torch.float16)
    check(model.to(torch.bfloat16), torch.bfloat16)


def test_resizing_the_vocabulary(tmp_path, ids):
    model = small_model(tokenizer_vocab_size=70)
    model.resize_token_embeddings(75, mean_resizing=False)
    assert model.config.vocab_size == 75
    assert model.config.tokenizer_vocab_size == 75
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = H3ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_gradient_checkpointing_gives_the_same_gradients(ids):
    grads = []
    for checkpointing in (False, True):
        model = small_model(mixers="hybrid").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name


def test_every_lora_adapter_gets_a_gradient(ids):
    peft = pytest.importorskip("peft")
    model = small_model(mixers="hybrid")
    plain = model(ids).logits
    targets = ["qkv_proj", "output_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    assert (adapted(ids).logits - plain).abs().max() > 1e-3
    adapted(ids, labels=ids).loss.backward()
    adapters = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    assert len(adapters) == 2 * len(targets) * 4
    for name, parameter in adapters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_training_keeps_no_cache(ids):
    model = small_model().train()
    assert model(ids).past_key_values is None
    assert model.eval()(ids).past_key_values is not None


def test_operators_are_reused_in_eval_and_never_stale(ids):
    model = small_model(mixers="h3")
    layer = model.model.layers[0].mixer
    with torch.no_grad():
        first = layer.operators()
        assert layer.operators() is first
        before = model(ids).logits
        for p in layer.parameters():
            p.data.mul_(1.01)  # `.data` hides the change from the version counter
        model.train().eval()
        assert layer.operators() is not first
        after = model(ids).logits
        assert not torch.allclose(before, after)
        layer.diagonal_ssm.log_dt.add_(0.1)
        assert not torch.allclose(model(ids).logits, after)
    assert layer.operators() is not layer.operators()  # gradients on: always anew


@pytest.mark.parametrize("family", FAMILIES)
def test_full_graph_compiles_and_agrees(family, ids):
    torch.compiler.reset()
    model = small_model(**FAMILIES[family])
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model.model(ids, use_cache=False).last_hidden_state
        actual = compiled(ids, use_cache=False).last_hidden_state
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of them"),
        ({"input_ids": torch.tensor([[1, 72]])}, "from 1 to 72, the model has ids 0 to 71"),
        ({"input_ids": torch.tensor([[-1, 3]])}, "from -1 to 3"),
    ],
)
def test_mistakes_are_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_model()(**arguments)


def test_learned_positions_have_an_end():
    model = H3ForCausalLM(small_config(num_learned_positions=8)).eval()
    with pytest.raises(ValueError, match="position 8 exceeds the model's 8 learned positions"):
        model(torch.zeros(1, 9, dtype=torch.long))
