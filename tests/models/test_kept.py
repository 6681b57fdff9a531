"""Decoders that are kept between calls of `generate`; on the CPU with a stand-in for the graph."""

import copy
import gc
import weakref

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from h3lm.models import decoding, kept

from .conftest import FAMILIES, small_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Replay:
    """Replays a step as a graph does: over the memory of its decoder, with no model in sight."""

    def __init__(self, decoder):
        self.model, self.decoder = weakref.ref(decoder.model), weakref.ref(decoder)

    def replay(self):
        decoder = self.decoder()
        before, decoder.model = decoder.model, self.model()
        decoder._advance()
        decoder.model = before


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(decoding, "GRAPH_DEVICES", {"cpu"})
        monkeypatch.setattr(decoding.Decoder, "record", lambda decoder: Replay(decoder))
    kept.forget()
    yield request.param
    kept.forget()


@pytest.fixture
def captures(monkeypatch):
    seen, inner = [], decoding.Decoder.capture
    monkeypatch.setattr(decoding.Decoder, "capture", lambda self: seen.append(1) or inner(self))
    return seen


@pytest.fixture
def hybrid(device):
    return small_model(rotary_dim=8).to(device)


def draw(device, length=37, rows=2):
    return torch.randint(0, 72, (rows, length)).to(device)


def run(model, ids, **options):
    defaults = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    options = defaults | {"attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **options)


def slow(model, ids, **options):
    return run(model, ids, return_dict_in_generate=True, **options).sequences


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_of_one_shape_capture_once(family, device, captures):
    model = small_model(**FAMILIES[family]).to(device)
    for length in (37, 37, 30):  # one capacity
        ids = draw(device, length)
        assert torch.equal(run(model, ids, max_new_tokens=20), slow(model, ids))
    assert len(captures) == 1


def test_rows_of_different_length_by_a_kept_decoder(hybrid, device, captures):
    run(hybrid, draw(device))
    ids = draw(device)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    options = {"attention_mask": mask}
    assert torch.equal(run(hybrid, ids, **options), slow(hybrid, ids, **options))
    assert len(captures) == 1


def test_samples_depend_on_the_seed_alone(hybrid, device, captures):
    ids, results = draw(device), []
    options = {"do_sample": True, "temperature": 0.8, "repetition_penalty": 1.3}
    for seed in (3, 4, 3):
        torch.manual_seed(seed)
        results.append(run(hybrid, ids, **options))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    assert len(captures) == 1


@pytest.mark.parametrize(
    ("other", "rows", "length"),
    [
        ({"do_sample": True, "temperature": 0.7}, 2, 37),
        ({"repetition_penalty": 1.5}, 2, 37),
        ({}, 3, 37),
        ({}, 2, 90),
    ],
)
def test_another_call_gets_a_decoder_of_its_own(hybrid, device, captures, other, rows, length):
    run(hybrid, draw(device))
    ids = draw(device, length, rows)
    if other.get("do_sample"):
        torch.manual_seed(1)
    fast = run(hybrid, ids, **other)
    if other.get("do_sample"):
        torch.manual_seed(1)
    assert torch.equal(fast, slow(hybrid, ids, **other))
    assert len(captures) == 2


def test_weights_and_ssm_parameters_changed_in_place_count(hybrid, device, captures):
    ids = draw(device)
    before = run(hybrid, ids)
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if "_ssm" in name or "qkv" in name:
                parameter.mul_(1.5)
    after = run(hybrid, ids)
    assert torch.equal(after, slow(hybrid, ids))
    assert not torch.equal(after, before)
    assert len(captures) == 1


def test_weights_elsewhere_and_wrapped_modules_are_another_model(hybrid, device, captures):
    ids = draw(device)
    run(hybrid, ids)
    hybrid.lm_head.weight = torch.nn.Parameter(hybrid.lm_head.weight.flip(0))
    assert torch.equal(run(hybrid, ids), slow(hybrid, ids))
    assert len(captures) == 2
    hook = hybrid.model.norm.register_forward_hook(lambda module, inputs, output: -output)
    for calls in (3, 4):  # not kept
        assert torch.equal(run(hybrid, ids), slow(hybrid, ids))
        assert len(captures) == calls
    hook.remove()
    assert torch.equal(run(hybrid, ids), slow(hybrid, ids))
    assert len(captures) == 5


def test_a_call_that_fails_keeps_nothing(hybrid, device, captures):
    class Broken(BaseStreamer):
        def put(self, value):
            raise InterruptedError

        def end(self):
            pass

    run(hybrid, draw(device))
    with pytest.raises(InterruptedError):
        run(hybrid, draw(device), streamer=Broken())
    ids = draw(device)
    assert torch.equal(run(hybrid, ids), slow(hybrid, ids))


def test_memory_is_freed_with_the_model_by_training_and_where_others_need_it(hybrid, device):
    other = small_model(mixers="h3").to(device)
    ids = draw(device)
    run(hybrid, ids)
    assert len(kept._kept) == 1
    run(other, ids)  # a new cache may need the memory
    assert list(kept._kept) == [other]
    other.eval()
    assert list(kept._kept) == [other]
    copy.deepcopy(other)
    for drop in (other.train, other.double):
        other.eval()
        run(other, ids)
        assert list(kept._kept) == [other]
        drop()
        assert not kept._kept


def test_a_kept_decoder_does_not_keep_its_model(device):
    model = small_model(mixers="h3").to(device)
    run(model, draw(device))
    assert len(kept._kept) == 1
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert not kept._kept


def test_a_large_cache_is_not_kept(hybrid, device, monkeypatch):
    monkeypatch.setattr(kept, "_may_take", lambda size, device: size < 1000)
    run(hybrid, draw(device))
    assert not kept._kept
