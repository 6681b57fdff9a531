import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from h3lm import H3ClassificationConfig, H3Config, H3ForCausalLM, H3ForSequenceClassification
from h3lm.layers import MIXERS
from h3lm.layers.batch_norm import BatchNorm
from h3lm.models.modeling_classification import H3Encoder

SMALL = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "d_state": 8, "filter_length": 9, "num_labels": 3,
}  # fmt: skip
LENGTH = 11


def make(**fields):
    torch.manual_seed(1)
    model = H3ForSequenceClassification(H3ClassificationConfig(**(SMALL | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_ssm" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


ONE_WAY = [{"mixers": name} for name in MIXERS]
BOTH_WAYS = [
    {"mixers": name, "bidirectional": True}
    for name, kind in MIXERS.items()
    if kind.can_be_bidirectional
]
SHAPES = [
    {"mixers": "h3", "h3_head_dim": 4, "bidirectional": True, "pooling": "mean"},
    {"mixers": "s4", "bidirectional": True, "norm": "batch", "intermediate_size": 0},
    {"mixers": "s4d", "norm": "batch", "norm_position": "post", "pooling": "mean"},
    {"mixers": "hybrid", "norm_position": "post", "num_learned_positions": 30, "rotary_dim": 2},
    {"mixers": "attention", "bidirectional": True, "rotary_dim": 4, "pooling": "mean"},
]
CASES = ONE_WAY + BOTH_WAYS + SHAPES


def name_of(case):
    return "-".join(str(v) if k in ("mixers", "norm", "pooling") else k for k, v in case.items())


@pytest.fixture(params=CASES, ids=name_of)
def case(request):
    return request.param


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_padding_comes_through(case, side, training):
    """Perturbed padding moves no logit; and a padded row is the row alone."""
    model = make(**case, num_channels=2).train(training)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    hidden = {"left": slice(0, 4), "right": slice(6, None), "inside": slice(3, 6)}[side]
    mask[1, hidden] = 0
    values = torch.randn(3, LENGTH, 2, dtype=torch.float64)
    other = values.clone()
    other[1, hidden] = 100.0
    first, second = (model(input_values=x, attention_mask=mask).logits for x in (values, other))
    assert torch.allclose(first, second, rtol=1e-9, atol=1e-11)
    if not training:  # the statistics of a batch are of all its rows
        alone = model(input_values=values[1:2, mask[1].bool()]).logits
        assert torch.allclose(first[1:2], alone, rtol=1e-9, atol=1e-11)
    values.requires_grad_()
    (grad,) = torch.autograd.grad(
        model(input_values=values, attention_mask=mask).logits.sum(), values
    )
    assert not grad[1, hidden].any()


def test_save_load_and_auto_classes(case, tmp_path):
    model = make(**case).float()
    ids = torch.randint(0, 20, (2, LENGTH))
    model.train()(ids)  # batch norm has seen something
    model.eval().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "h3_classification"
    assert type(AutoConfig.from_pretrained(tmp_path)) is H3ClassificationConfig
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(other) is H3ForSequenceClassification
    assert torch.equal(model(ids).logits, other(ids).logits)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is H3Encoder
    whole = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(encoder(ids).last_hidden_state, whole[-1])
    assert len(whole) == 3


def test_every_parameter_gets_a_gradient(case):
    # of the last position, which a backward filter adds nothing to, the last layer would have none
    model = make(**(case | {"pooling": "mean"}))
    model(torch.randint(0, 20, (4, LENGTH)), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_pairs_go_through_one_encoder():
    model = make(mixers="s4d", bidirectional=True, two_documents=True, pooling="mean")
    ids = torch.randint(0, 20, (2, 2, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, 0, 5:] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.shape == (2, 3)
    other = ids.clone()
    other[1, 0, 5:] = 0
    assert torch.allclose(model(other, attention_mask=mask).logits, logits, atol=1e-12)
    swapped = model(ids.flip(1), attention_mask=mask.flip(1)).logits
    assert (swapped - logits).abs().max() > 1e-6  # which is first matters
    with pytest.raises(ValueError, match="pairs"):
        model(ids[:, 0])
    with pytest.raises(ValueError, match="single rows"):
        make()(ids)


@pytest.mark.parametrize("mixers", ["hybrid", "h3", "attention", "s4d"])
def test_the_encoder_of_a_language_model_is_taken_over(mixers, tmp_path):
    config = H3Config(**{k: v for k, v in SMALL.items() if k not in ("filter_length",)},
                      mixers=mixers, num_learned_positions=16)  # fmt: skip
    language_model = H3ForCausalLM(config).eval()
    language_model.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5).eval()
    assert type(model) is H3ForSequenceClassification
    assert model.config.num_labels == 5
    ids = torch.randint(0, 20, (2, LENGTH))
    expected = language_model.model(ids).last_hidden_state
    assert torch.allclose(model.model(ids).last_hidden_state, expected, atol=1e-5)
    pooled = model.classifier(expected[:, -1])
    assert torch.allclose(model(ids).logits, pooled, atol=1e-5)
    model.save_pretrained(tmp_path / "tuned")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_batch_norm_is_torchs_on_what_counts():
    ours, theirs = BatchNorm(4).double(), torch.nn.BatchNorm1d(4).double()
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    lengths = torch.tensor([7, 2, 5])
    valid = torch.arange(7) < lengths[:, None]
    for _ in range(2):
        expected = theirs(x[valid])
        assert torch.allclose(ours(x, lengths)[valid], expected, atol=1e-12)
    for name, buffer in ours.named_buffers():
        assert torch.allclose(buffer, dict(theirs.named_buffers())[name])
    assert torch.allclose(ours.eval()(x, lengths)[valid], theirs.eval()(x[valid]), atol=1e-12)
    whole = ours.train()(x).flatten(0, 1)
    assert torch.allclose(whole, theirs.train()(x.flatten(0, 1)), atol=1e-12)
    for name, buffer in ours.named_buffers():
        assert torch.allclose(buffer, dict(theirs.named_buffers())[name])


def test_rows_are_padded_to_lengths_that_kernels_like():
    model = make(mixers="s4d", bidirectional=True, num_learned_positions=130)
    ids = torch.randint(0, 20, (2, 200))
    mask = torch.arange(200) < torch.tensor([[100], [70]])
    assert model.model(ids, attention_mask=mask).last_hidden_state.shape[1] == 128
    mask = torch.arange(200) < torch.tensor([[129], [70]])  # 192 would be too much
    assert model.model(ids, attention_mask=mask).last_hidden_state.shape[1] == 130
    alone = model(ids[1:, :70]).logits
    assert torch.allclose(model(ids, attention_mask=mask).logits[1:], alone, atol=1e-11)


def test_lengths_are_a_mask_whose_padding_stands_behind(case):
    model = make(**case, two_documents=True)
    ids = torch.randint(0, 20, (2, 2, LENGTH))
    lengths = torch.tensor([[LENGTH, 4], [7, 1]])
    mask = torch.arange(LENGTH) < lengths[..., None]
    expected = model(ids, attention_mask=mask).logits
    for training in (False, True):
        model.train(training)
        expected = model(ids, attention_mask=mask).logits
        assert torch.allclose(model(ids, lengths=lengths).logits, expected, atol=1e-11)
    with pytest.raises(ValueError, match="in place of an attention_mask"):
        model(ids, attention_mask=mask, lengths=lengths)
    with pytest.raises(ValueError, match=r"lengths \(B,\)"):
        model.model(ids[:, 0], lengths=lengths[:1, 0])
    with pytest.raises(ValueError, match=f"lengths go from 1 to {LENGTH + 1}, rows have {LENGTH}"):
        model.model(ids[:, 0], lengths=torch.tensor([1, LENGTH + 1]))
    with pytest.raises(ValueError, match="rows without positions"):
        model.model(ids[:, 0, :0])


def test_a_row_of_length_0_is_no_nan_and_changes_no_other(case):
    for pooling in ("mean", "last"):
        model = make(**case | {"pooling": pooling})
        ids, labels = torch.randint(0, 20, (3, LENGTH)), torch.tensor([0, 1, 2])
        lengths = torch.tensor([0, LENGTH, 4])
        for training in (False, True):
            model.train(training)
            found = model(ids, lengths=lengths, labels=labels)
            rest = model(ids[1:], lengths=lengths[1:]).logits
            assert torch.allclose(found.logits[1:], rest, atol=1e-11)
            assert torch.allclose(found.logits[0], model.classifier.output_proj.bias)
        found.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_gates_of_h3_may_start_open():
    for bias in (0.0, 1.0):
        model = H3ForSequenceClassification(
            H3ClassificationConfig(**SMALL, mixers=["h3", "attention"], h3_gate_bias=bias)
        )
        q, k, v = model.model.layers[0].mixer.qkv_proj.bias.chunk(3)
        assert (q == bias).all()
        assert (v == bias).all()
        assert not k.any()
        assert not model.model.layers[1].mixer.qkv_proj.bias.any()


def test_half_precision_keeps_the_state_space_parameters_whole(tmp_path):
    make(mixers="s4d", bidirectional=True).float().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert any("diagonal_ssm" in n for n in kept)
    assert any("backward_readout" in n for n in kept)
    assert model.classifier.output_proj.weight.dtype == torch.bfloat16
    assert torch.isfinite(model(torch.randint(0, 20, (2, LENGTH))).logits).all()


@pytest.mark.parametrize("mixers", ["s4d", "s4", "h3", "long_conv"])
def test_under_autocast_mixers_work_in_half_and_the_residual_stream_does_not(mixers):
    model = make(mixers=mixers, bidirectional=True, num_channels=1, norm="batch").float()
    seen = []
    layer = model.model.layers[1]
    layer.mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    values = torch.randn(2, LENGTH, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(input_values=values, output_hidden_states=True)
    assert seen == [torch.bfloat16]
    assert found.hidden_states[1].dtype == torch.float32
    expected = model(input_values=values).logits
    assert (found.logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"norm": "group"}, "norm='group' is not one of layer, batch"),
        ({"norm_position": "mid"}, "not one of pre, post"),
        ({"pooling": "max"}, "not one of last, mean"),
        ({"mixers": "gss", "bidirectional": True}, "'gss' has no bidirectional form"),
        ({"num_channels": 0}, "num_channels=0 must be at least 1"),
        ({"filter_length": 0}, "filter_length=0 must be at least 1"),
    ],
)
def test_mistakes_in_the_configuration(fields, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        H3ClassificationConfig(**(SMALL | fields))


def test_mistakes_in_the_input():
    ids, values = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 4).double()
    with pytest.raises(ValueError, match="one of input_ids"):
        make()()
    with pytest.raises(ValueError, match="takes input_ids"):
        make()(input_values=values)
    with pytest.raises(ValueError, match="2 channels, not input_ids"):
        make(num_channels=2)(ids)
    with pytest.raises(ValueError, match="4 channels, the model 2"):
        make(num_channels=2)(input_values=values)
    with pytest.raises(ValueError, match="hides everything"):
        make()(ids, attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 4\)"):
        make()(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="ids 0 to 19"):
        make()(ids + 20)
    with pytest.raises(ValueError, match="exceeds the model's 2 learned"):
        make(num_learned_positions=2)(ids)


def test_lora_reaches_every_targeted_module():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make(mixers=list(MIXERS), num_hidden_layers=len(MIXERS)).float(),
        peft.LoraConfig(
            task_type="SEQ_CLS", target_modules=r".*layers.*_proj", r=2, init_lora_weights=False
        ),
    )
    ids = torch.randint(0, 20, (4, LENGTH))
    model(input_ids=ids, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    targets = {name.partition(".lora_")[0].rpartition(".")[2] for name in lora}
    assert {"qkv_proj", "output_proj", "up_proj", "down_proj", "gate_proj"} <= targets
    assert all(p.grad is not None and p.grad.any() for p in lora.values())
    head = [p for n, p in model.named_parameters() if "classifier" in n and p.requires_grad]
    assert head
    assert all(p.grad is not None for p in head)


def test_the_librarys_trainer_trains_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.set_num_threads(1)
    model = make(mixers="s4d", bidirectional=True).float()
    rows = torch.randint(0, 20, (32, LENGTH))
    labels = (rows == 3).any(1).long()
    data = [{"input_ids": ids, "labels": label} for ids, label in zip(rows, labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=32, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    before = F.cross_entropy(model.eval()(rows).logits, labels).item()
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


def test_gradient_checkpointing_changes_nothing():
    ids, labels = torch.randint(0, 20, (2, LENGTH)), torch.tensor([0, 2])
    gradients = []
    for checkpointing in (False, True):
        model = make(mixers="h3", bidirectional=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=labels).loss.backward()
        gradients.append(model.model.layers[0].mixer.qkv_proj.weight.grad)
    assert torch.allclose(*gradients, atol=1e-12)
