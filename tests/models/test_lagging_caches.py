"""Decoding caches whose diagonal states lag behind: in plain PyTorch, and by kernels on a GPU."""

import pytest
import torch

from h3lm.models import decoding
from h3lm.models.cache import DecodingCache, cache_bytes, lags
from h3lm.models.sampling import Chooser
from h3lm.models.serving import Request, Slots

from .conftest import small_model


@pytest.fixture(autouse=True, params=[1, 2], ids="from {} rows".format)
def lagging_everywhere(request, monkeypatch):
    """From one row on, or, as on a GPU, not the caches of one row that others take rows from."""
    for module in ("cache", "decoding"):
        monkeypatch.setattr(
            f"h3lm.models.{module}.lags", lambda config, device, rows: rows >= request.param
        )


@pytest.fixture(params=["h3", "hybrid"])
def model(request):
    return small_model(mixers=request.param, hidden_size=256)


on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def a_decoder(model, rows):
    cache = DecodingCache(model.config, rows, 64)
    decoder = decoding.Decoder(model, cache, Chooser([], False, rows, 72, torch.device("cpu")))
    decoder.allocate()
    return decoder


def rings(cache):
    return [layer for layer in cache.layers if hasattr(layer, "ring")]


@on_both
@pytest.mark.parametrize("padded", [False, True])
def test_both_loops_give_the_same_tokens(model, padded, device):
    model, ids = model.to(device), torch.randint(0, 72, (3, 37)).to(device)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :11], mask[2, :1] = 0, 0
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0, "attention_mask": mask}
    fast = model.generate(ids, **options)
    slow = model.generate(ids, **options, return_dict_in_generate=True)
    assert torch.equal(fast, slow.sequences)


@on_both
def test_requests_get_what_they_get_alone(model, device):
    model = model.to(device)
    wanted = [(torch.randint(0, 72, (n,)).tolist(), 5 + n, 0, n) for n in (3, 17, 1, 9, 4)]
    alone, together = (
        {request.number: request.tokens for request in slots.run(Request(*x) for x in wanted)}
        for slots in (Slots(model, 1, 64), Slots(model, 3, 64))
    )
    assert together == alone


@torch.no_grad()
def test_a_state_that_is_read_has_caught_up(model):
    ids = torch.randint(0, 72, (2, 60))
    decoder, whole = a_decoder(model, 2), DecodingCache(model.config, 2, 64)
    decoder.cache.restart()
    decoding.read_prompt(model, decoder.cache, ids[:, :41])
    decoder.cache.start_steps(41)
    for t in range(41, 60):
        model(input_ids=ids[:, t : t + 1], past_key_values=decoder.cache, use_cache=True)
        decoder.cache.advance()
    decoding.read_prompt(model, whole, ids)
    for mine, right in zip(rings(decoder.cache), rings(whole), strict=True):
        assert not torch.allclose(mine.recurrent_states[0], right.recurrent_states[0], atol=1e-4)
        for found, expected in zip(mine.read(), right.read(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"under torch\.no_grad\(\) alone"):
            mine.write(right.read(), 1)


def test_a_step_with_gradients_is_refused(model):
    decoder = a_decoder(model, 2)
    decoder.cache.restart()
    with torch.no_grad():
        decoding.read_prompt(model, decoder.cache, torch.zeros(2, 5, dtype=torch.long))
    decoder.cache.start_steps(5)
    token = torch.zeros(2, 1, dtype=torch.long)
    for operators in (True, False):
        if not operators:
            for layer in rings(decoder.cache):
                layer.operators = None
        with pytest.raises(ValueError, match=r"under torch\.no_grad\(\) alone"):
            model(token, past_key_values=decoder.cache, use_cache=True)


@torch.no_grad()
def test_rows_change_places_with_all_that_is_behind():
    model = small_model(mixers="h3", hidden_size=256)
    ids, order = torch.randint(0, 72, (3, 20)), torch.tensor([2, 0, 0])
    logits = []
    for early in (True, False):
        decoder = a_decoder(model, 3)
        decoder.cache.restart()
        decoding.read_prompt(model, decoder.cache, ids[order] if early else ids)
        decoder.cache.start_steps(20)
        for t in range(11):
            if t == 5 and not early:
                decoder.cache.reorder_cache(order)
            tokens = ids[order, t] if early or t >= 5 else ids[:, t]
            out = model(tokens[:, None], past_key_values=decoder.cache, use_cache=True)
            decoder.cache.advance()
        logits.append(out.logits)
    torch.testing.assert_close(*logits)


def test_bytes_of_a_row_are_those_of_the_tensors(model):
    cache = DecodingCache(model.config, 3, 128)
    decoding.read_prompt(model, cache, torch.zeros(3, 4, dtype=torch.long))
    assert cache_bytes(cache) == 3 * decoding.bytes_of_row(model, 128)


def test_on_a_cpu_nothing_lags():
    assert not lags(small_model().config, torch.device("cpu"), 64)
