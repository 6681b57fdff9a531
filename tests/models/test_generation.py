import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from h3lm.errors import UserError
from h3lm.models.cache import cache_bytes, prepare_cache

from .conftest import small_model

GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}


def generate(model, ids, **options):
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **(GREEDY | options))


@pytest.mark.parametrize("length", [1, 2, 16, 37])  # d_state is 16
def test_recurrent_decoding_equals_recomputation(model, length, ids):
    prompt = ids[:, :length]
    expected = generate(model, prompt, use_cache=False)
    assert torch.equal(generate(model, prompt), expected)
    assert torch.equal(generate(model, prompt, cache_implementation="static"), expected)
    assert torch.equal(generate(model, prompt, prefill_chunk_size=5), expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_left_padding_changes_nothing(model, ids, rows):
    ids = ids[:rows]
    expected = generate(model, ids)[:, ids.shape[1] :]
    padded, mask = pad(ids, (6, 0), value=5), pad(torch.ones_like(ids), (6, 0))
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 9}):
        actual = generate(model, padded, attention_mask=mask, **options)
        assert torch.equal(actual[:, padded.shape[1] :], expected)


def test_prompts_of_different_length_in_one_batch(model, ids):
    long, short = ids[:1], ids[1:, :11]
    alone = [generate(model, prompt)[0, prompt.shape[1] :] for prompt in (long, short)]
    missing = long.shape[1] - short.shape[1]
    batch = torch.cat([long, pad(short, (missing, 0))])
    mask = torch.cat([torch.ones_like(long), pad(torch.ones_like(short), (missing, 0))])
    together = generate(model, batch, attention_mask=mask)[:, long.shape[1] :]
    assert torch.equal(together, torch.stack(alone))


def test_beam_search_equals_recomputation(model, ids):
    expected = generate(model, ids, num_beams=3, use_cache=False)
    assert torch.equal(generate(model, ids, num_beams=3), expected)
    static = generate(model, ids, num_beams=3, cache_implementation="static")
    assert torch.equal(static, expected)


def test_several_returns(model, ids):
    out = generate(model, ids, num_beams=4, num_return_sequences=3)
    assert out.shape[0] == 6
    torch.manual_seed(1)
    first = generate(model, ids, do_sample=True, num_return_sequences=2)
    torch.manual_seed(1)
    again = generate(model, ids, do_sample=True, num_return_sequences=2, use_cache=False)
    assert torch.equal(first, again)


def test_continuing_a_returned_cache(model, ids):
    expected = generate(model, ids)
    first = generate(model, ids, max_new_tokens=5, return_dict_in_generate=True)
    second = generate(
        model, first.sequences, max_new_tokens=3, past_key_values=first.past_key_values
    )
    assert torch.equal(second, expected)


def test_forward_by_hand_with_a_cache(model, ids):
    expected = model(ids).logits
    output = model(ids[:, :20], use_cache=True)
    parts, cache = [output.logits], output.past_key_values
    assert cache.get_seq_length() == 20
    for start, end in ((20, 21), (21, 30), (30, 37)):
        output = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=2e-5)
    assert cache.get_seq_length() == 37


def test_caches_of_the_library_are_accepted(model, ids):
    expected = generate(model, ids)
    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=64),
        DynamicCache(),
    ):
        assert torch.equal(generate(model, ids, past_key_values=cache), expected)
        cache.reset()
        if not isinstance(cache, DynamicCache):
            assert torch.equal(generate(model, ids, past_key_values=cache), expected)


def test_a_cache_of_another_model_is_refused(ids):
    cache = DynamicCache(config=small_model(mixers="attention").config)
    with pytest.raises(ValueError, match="layer 0 of the cache is a DynamicLayer"):
        small_model(mixers="h3")(ids, past_key_values=cache)
    short = DynamicCache(config=small_model(num_hidden_layers=2).config)
    with pytest.raises(ValueError, match="the cache has 2 layers, the model 4"):
        small_model()(ids, past_key_values=short)


def test_rows_are_reordered_in_place_and_repeated(ids):
    model = small_model(mixers="h3")
    cache = model(ids, use_cache=True).past_key_values
    stored = cache.layers[0].recurrent_states[0]
    address, before = stored.data_ptr(), stored.clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert stored.data_ptr() == address
    assert torch.equal(stored, before.flip(0))
    cache.batch_repeat_interleave(3)
    assert cache.layers[0].conv_states[0].shape[0] == 6
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(cache.layers[0].recurrent_states[0], before.flip(0))


def test_memory_of_a_pure_model_does_not_grow():
    model = small_model(mixers="h3")
    sizes = set()
    for length in (1, 50, 400):
        cache = model(torch.zeros(1, length, dtype=torch.long), use_cache=True).past_key_values
        sizes.add(cache_bytes(cache))
    assert len(sizes) == 1
    # four layers of float32: 16 shift inputs and 8 complex modes for each of 32 channels
    assert sizes == {4 * 4 * 32 * (16 + 2 * 8)}


def test_ids_that_the_tokenizer_lacks_are_never_emitted(ids):
    model = small_model(tokenizer_vocab_size=5)
    prompt = ids[:, :4] % 5
    own = GenerationConfig(do_sample=True, max_new_tokens=40, top_k=0, pad_token_id=0)
    for options in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 0, "temperature": 5.0},
        {"num_beams": 2},
        {"generation_config": own},
    ):
        mask = torch.ones_like(prompt)
        merged = options if "generation_config" in options else GREEDY | options
        assert model.generate(prompt, attention_mask=mask, **merged).max() < 5


def test_stop_token_and_streamer(model, ids):
    class Collect(BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value)

        def end(self):
            self.ended = True

    expected = generate(model, ids[:1])
    stop = int(expected[0, ids.shape[1] + 3])
    collect = Collect()
    out = generate(model, ids[:1], eos_token_id=stop, streamer=collect)
    assert out.shape[1] <= ids.shape[1] + 4
    assert out[0, -1] == stop
    assert collect.ended
    assert torch.equal(torch.cat([x.flatten() for x in collect.seen]), out[0])


def test_a_static_cache_that_is_too_small_is_named(model, ids):
    def static(length):
        return StaticCache(config=model.config, max_cache_len=length)

    if "attention" not in model.config.mixers:
        pytest.skip("nothing of it grows")
    with pytest.raises(UserError, match="made for 16 positions, prompt and new tokens need 37"):
        model(ids, past_key_values=static(16))
    with pytest.raises(UserError, match="made for 39 positions, prompt and new tokens need 41"):
        generate(model, ids, max_new_tokens=5, past_key_values=static(39))
    expected = generate(model, ids, max_new_tokens=5)
    out = generate(model, ids, max_new_tokens=5, past_key_values=static(41))
    assert torch.equal(out, expected)


def test_assisted_generation_is_refused_in_one_sentence(model, ids):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        generate(model, ids[:1], prompt_lookup_num_tokens=3)


def test_prepare_cache_is_idempotent(model):
    cache = prepare_cache(None, model.config)
    layers = list(cache.layers)
    assert prepare_cache(cache, model.config) is cache
    assert all(a is b for a, b in zip(layers, cache.layers, strict=True))


def test_a_row_without_a_prompt_is_named(model, ids):
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(UserError, match="row 1 has no prompt"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(UserError, match="a batch without rows"):
        model.generate(ids[:0], attention_mask=mask[:0], max_new_tokens=2)
    with pytest.raises(UserError, match="the prompt is empty"):
        model.generate(ids[:, :0], attention_mask=mask[:, :0], max_new_tokens=2)
