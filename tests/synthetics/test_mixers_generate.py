"""Each mixer of the lab as a language model: generation by its state, saving, narrow loading."""

import pytest
import torch

from h3lm.layers import MIXERS
from h3lm.models.configuration_h3 import H3Config
from h3lm.models.modeling_h3 import H3ForCausalLM
from h3lm.ssm import SSMModule

NAMES = [*MIXERS, "gss-hybrid", "s4d-hybrid"]
ALONE = ["gss alone", "gss-hybrid alone"]  # GSS layers as in the presets, without an MLP


@pytest.fixture(params=[*NAMES, *ALONE])
def model(request):
    torch.manual_seed(0)
    config = H3Config(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mixers=request.param.removesuffix(" alone"),
        gss_mlp=request.param not in ALONE,
        d_state=8,
        initializer_range=0.2,
    )
    return H3ForCausalLM(config).eval()


def test_trains_with_a_gradient_for_every_parameter(model):
    ids = torch.randint(0, 40, (2, 11))
    optimiser = torch.optim.AdamW(model.train().parameters(), 1e-2)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_generates_through_the_cache_what_full_passes_give(model):
    ids = torch.randint(0, 40, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for _ in range(6):
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    assert torch.equal(found, ids)


def test_beams_reorder_the_state(model):
    ids = torch.randint(0, 40, (1, 5))
    beams = model.generate(ids, max_new_tokens=5, num_beams=3, num_return_sequences=3)

    def score(row):
        with torch.no_grad():
            logits = model(row[None], use_cache=False).logits[0, 4:-1]
        return logits.log_softmax(-1).gather(-1, row[5:, None]).sum().item()

    scores = [score(row) for row in beams]
    assert scores == sorted(scores, reverse=True)


def test_saves_and_loads_and_keeps_its_ssm_in_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 40, (2, 9))
    again = H3ForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    narrow = H3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for one, other in zip(model.modules(), narrow.modules(), strict=True):
        if isinstance(one, SSMModule):
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                assert b.dtype == torch.float32
                assert torch.equal(a, b)
