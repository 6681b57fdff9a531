"""Our decoding loop against the library's: on the CPU without graphs, on a GPU with them."""

from importlib.util import find_spec

import pytest
import torch
from transformers.generation import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from h3lm.data.tokenizers import character_tokenizer
from h3lm.errors import UserError
from h3lm.models import decoding
from h3lm.models.cache import DecodingCache, SlotLayer
from h3lm.models.sampling import Chooser

from .conftest import FAMILIES, small_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OTHERS = {"s4d-hybrid": {"mixers": "s4d-hybrid"}, "linear": {"mixers": "linear_attention"}}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=FAMILIES | OTHERS)
def model(request, device):
    return small_model(**(FAMILIES | OTHERS)[request.param]).to(device)


@pytest.fixture
def hybrid(device):
    return small_model(rotary_dim=8).to(device)


@pytest.fixture
def ids(device):
    return torch.randint(0, 72, (2, 37)).to(device)


@pytest.fixture
def loops(monkeypatch):
    """How often our loop ran."""
    seen, inner = [], decoding.generate

    def counted(*args, **kwargs):
        seen.append(1)
        return inner(*args, **kwargs)

    monkeypatch.setattr(decoding, "generate", counted)
    return seen


def both(model, ids, loops, seed=None, **options):
    """Tokens by our loop and by the library's."""
    defaults = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    options = defaults | {"attention_mask": torch.ones_like(ids)} | options
    results = []
    for extra in ({}, {"return_dict_in_generate": True}):
        if seed is not None:
            torch.manual_seed(seed)
        before = len(loops)
        out = model.generate(ids, **options, **extra)
        assert len(loops) - before == (0 if extra else 1)
        results.append(out.sequences if extra else out)
    return results


def padded_batch(ids):
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    return torch.where(mask.bool(), ids, 5), mask


@pytest.mark.parametrize("length", [1, 37])
def test_greedy_equals_the_librarys_loop(model, ids, length, loops):
    fast, slow = both(model, ids[:, :length], loops)
    assert torch.equal(fast, slow)
    assert fast.device == ids.device


def test_rows_of_different_length(model, ids, loops):
    batch, mask = padded_batch(ids)
    fast, slow = both(model, batch, loops, attention_mask=mask)
    assert torch.equal(fast, slow)
    alone, _ = both(model, ids[1:, 11:], loops)
    assert torch.equal(fast[1, ids.shape[1] :], alone[0, ids.shape[1] - 11 :])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6, "top_k": 0},
        {"repetition_penalty": 1.7},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
    ids=lambda o: "-".join(o),
)
@pytest.mark.parametrize("sample", [False, True])
def test_sampling_draws_the_same_tokens_for_the_same_seed(hybrid, ids, options, sample, loops):
    if not sample and "repetition_penalty" not in options:
        pytest.skip("sampling options alone")
    options = options if sample else {"repetition_penalty": options["repetition_penalty"]}
    fast, slow = both(hybrid, ids, loops, seed=3, do_sample=sample, **options)
    assert torch.equal(fast, slow)
    other, _ = both(hybrid, ids, loops, seed=4, do_sample=sample, **options)
    assert torch.equal(fast, other) is not sample


def test_the_penalty_sees_no_padding(hybrid, ids, loops):
    batch, mask = padded_batch(ids)
    fast, slow = both(hybrid, batch, loops, attention_mask=mask, repetition_penalty=1.5)
    assert torch.equal(fast, slow)


def test_ids_that_the_tokenizer_lacks_are_never_chosen(device, ids, loops):
    model = small_model(tokenizer_vocab_size=5).to(device)
    for sample in (False, True):
        fast, slow = both(model, ids % 5, loops, seed=1, do_sample=sample, temperature=5.0, top_k=0)
        assert torch.equal(fast, slow)
        assert fast.max() < 5


def test_suppressed_ids_in_the_middle(ids):
    from transformers.generation import SuppressTokensLogitsProcessor

    processor = SuppressTokensLogitsProcessor([3, 71], device=ids.device)
    choose = Chooser([processor], False, 2, 72, ids.device)
    logits = torch.zeros(2, 72, device=ids.device)
    logits[0, 3], logits[1, 71], logits[:, 9] = 5.0, 5.0, 1.0
    assert choose(logits).tolist() == [9, 9]


def test_rows_stop_by_themselves(hybrid, ids, loops):
    free, _ = both(hybrid, ids, loops)
    new = free[:, ids.shape[1] :]
    stop = int(new[0, 4])
    fast, slow = both(hybrid, ids, loops, eos_token_id=stop, pad_token_id=71)
    assert torch.equal(fast, slow)
    several, slow = both(hybrid, ids, loops, eos_token_id=[stop, int(new[1, 9])], pad_token_id=71)
    assert torch.equal(several, slow)
    assert several.shape[1] <= ids.shape[1] + 10


def test_streamer_gets_what_the_librarys_loop_gives_it(hybrid, ids, loops):
    class Collect(BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.clone())

        def end(self):
            self.seen.append("end")

    free, _ = both(hybrid, ids[:1], loops)
    stop = int(free[0, ids.shape[1] + 5])
    got = []
    for extra in ({}, {"return_dict_in_generate": True}):
        collect = Collect()
        hybrid.generate(
            ids[:1], attention_mask=torch.ones_like(ids[:1]), do_sample=False, max_new_tokens=20,
            eos_token_id=stop, pad_token_id=0, streamer=collect, **extra,
        )  # fmt: skip
        assert collect.seen.pop() == "end"
        got.append(torch.cat([x.flatten() for x in collect.seen]))
    assert torch.equal(*got)
    assert got[0][-1] == stop


def test_stop_strings(hybrid, ids, loops):
    tokenizer = character_tokenizer("".join(chr(48 + i) for i in range(72)))
    free, _ = both(hybrid, ids[:1], loops)
    word = tokenizer.decode(free[0, ids.shape[1] + 3 : ids.shape[1] + 6].tolist())
    options = {"stop_strings": [word], "tokenizer": tokenizer}
    fast, slow = both(hybrid, ids[:1], loops, **options)
    assert torch.equal(fast, slow)
    assert fast.shape[1] <= ids.shape[1] + 6
    fast, slow = both(hybrid, ids, loops, **options)  # the other row goes on
    assert torch.equal(fast, slow)


def test_num_return_sequences(hybrid, ids, loops):
    fast, slow = both(hybrid, ids, loops, seed=2, do_sample=True, num_return_sequences=3)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_prompts_in_chunks(model, ids, chunk, loops):
    fast, _ = both(model, ids, loops)
    chunked, slow = both(model, ids, loops, prefill_chunk_size=chunk)
    assert torch.equal(chunked, fast)
    assert torch.equal(slow, fast)


# on a GPU the library compiles the step for a static cache, and torch has much to say of that: of
# complex numbers (decays, until they are pairs), of TensorFloat32, of a graph that is still empty
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.filterwarnings("ignore:Torchinductor does not support:UserWarning")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_what_it_does_not_know_goes_to_the_library(hybrid, ids, loops):
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    class Never(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    expected, _ = both(hybrid, ids, loops)
    mask = torch.ones_like(ids)
    for options in (
        {"logits_processor": [Nothing()]},
        {"stopping_criteria": [Never()]},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"output_scores": True, "return_dict_in_generate": True},
    ):
        before = len(loops)
        out = hybrid.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0, **options
        )
        assert len(loops) == before
        assert torch.equal(out if torch.is_tensor(out) else out.sequences, expected)


def test_the_steps_write_in_place(model, ids):
    cache = decoding.new_cache(model, 2, 60)
    chooser = Chooser([], False, 2, 72, ids.device)
    decoder = decoding.Decoder(model, cache, chooser)
    decoding.prefill(model, cache, decoder, ids)
    decoder.choose()

    def addresses():
        tensors = [cache.lengths, decoder.token]
        for layer in cache.layers:
            if isinstance(layer, SlotLayer):
                tensors += [layer.keys, layer.values]
            else:
                tensors += [*layer.conv_states.values(), *layer.recurrent_states.values()]
        return [x.data_ptr() for x in tensors if x is not None]

    before = addresses()
    for _ in decoder.tokens(5):
        pass
    assert addresses() == before
    assert cache.lengths.tolist() == [41, 41]


def test_a_prompt_longer_than_its_cache():
    model = small_model()
    cache = DecodingCache(model.config, 1, 64)
    with pytest.raises(UserError, match="made for 64 positions, the prompt needs 70"):
        decoding.read_prompt(model, cache, torch.zeros(1, 70, dtype=torch.long))


def test_a_batch_that_does_not_fit(monkeypatch):
    model = small_model()
    row = decoding.bytes_of_row(model, 1024)
    monkeypatch.setattr(decoding, "_free_bytes", lambda device: 10 * row + 1)
    assert decoding.largest_batch(model, 1024) == 10
    with pytest.raises(UserError, match=r"11 rows of 1024 positions .*: a batch of 10 fits"):
        decoding.new_cache(model, 11, 1000)
    monkeypatch.setattr(decoding, "_free_bytes", lambda device: row - 1)
    with pytest.raises(UserError, match="not even one row fits"):
        decoding.new_cache(model, 1, 1000)


@pytest.mark.parametrize("mixers", ["hybrid", "h3", "attention"])
def test_bytes_of_a_row_are_those_of_the_tensors(mixers):
    from h3lm.models.cache import cache_bytes

    model = small_model(mixers=mixers, h3_head_dim=2)
    cache = DecodingCache(model.config, 3, 128)
    decoding.read_prompt(model, cache, torch.zeros(3, 4, dtype=torch.long))
    assert cache_bytes(cache) == 3 * decoding.bytes_of_row(model, 128)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests run the kernels")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # the interpreter
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_by_interpreted_kernels_give_the_same_tokens(family, monkeypatch, loops):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, ids = small_model(**FAMILIES[family]), torch.randint(0, 72, (2, 37))
    advanced = []
    inner = type(model.model)._advance
    monkeypatch.setattr("h3lm.layers.step.has_kernels", lambda x: True)
    monkeypatch.setattr(type(model.model), "_advance", lambda *a: advanced.append(1) or inner(*a))
    fast, slow = both(model, ids, loops, max_new_tokens=6)
    assert len(advanced) == 5
    assert torch.equal(fast, slow)


def test_a_row_is_the_same_to_the_last_bit_whenever_it_joins():
    """Sums over a ring are rounded in the order of its slots: every row starts at the first."""
    model, ids = small_model(), torch.randint(0, 72, (1, 9))
    states = []
    for steps_before in (0, 3):
        cache = DecodingCache(model.config, 2, 64)
        decoder = decoding.Decoder(model, cache, Chooser([], False, 2, 72, ids.device))
        decoder.allocate()
        cache.start_empty()
        for _ in range(steps_before):
            decoder.step()
        own = DecodingCache(model.config, 1, 9)
        decoding.read_prompt(model, own, ids)
        cache.insert(torch.tensor([1]), own, 9)
        decoder.token.fill_(7)
        for _ in range(5):
            decoder.step()
        states.append([x.recurrent_states[0][1] for x in cache.layers if hasattr(x, "ring")])
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)


# On a GPU alone


@pytest.fixture(params=[1, 1000], ids=["lagging", "at once"])
def from_rows(request, monkeypatch):
    """From how many rows diagonal states lag behind."""
    monkeypatch.setattr("h3lm.flashconv.lagging.FROM_ROWS", request.param)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_graph_equals_eager_steps_bit_for_bit(family, padded, from_rows):
    model = small_model(**FAMILIES[family]).cuda().bfloat16()
    ids = torch.randint(0, 72, (3, 50)).cuda()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :20], mask[2, :3] = 0, 0
    runs = []
    for captured in (False, True):
        torch.manual_seed(7)
        cache = decoding.new_cache(model, 3, 100)
        chooser = Chooser([], True, 3, 72, ids.device)
        decoder = decoding.Decoder(model, cache, chooser)
        if captured:
            decoder.capture()
        decoding.prefill(model, cache, decoder, ids, mask)
        decoder.choose()
        tokens = [x.clone() for x in decoder.tokens(40)]
        runs.append((torch.stack(tokens), decoder.token.cpu(), cache))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert torch.equal(runs[0][2].lengths, runs[1][2].lengths)
    for one, other in zip(runs[0][2].layers, runs[1][2].layers, strict=True):
        if not isinstance(one, SlotLayer):
            assert torch.equal(one.recurrent_states[0], other.recurrent_states[0])


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_half_precision_follow_the_numerics_rule(family, from_rows):
    """Logits of steps against the same weights in float32, beside the whole text in bfloat16."""
    wide = small_model(**FAMILIES[family]).bfloat16().float()
    ids = torch.randint(0, 72, (4, 120))
    with torch.no_grad():
        exact = wide(ids).logits[:, 60:].double()
    half = small_model(**FAMILIES[family]).cuda().bfloat16()
    with torch.no_grad():
        plain = half(ids.cuda()).logits[:, 60:]
        cache = decoding.new_cache(half, 4, 120)
        decoding.read_prompt(half, cache, ids[:, :60].cuda())
        cache.start_steps(60)
        steps = []
        for t in range(60, 120):
            out = half(input_ids=ids[:, t : t + 1].cuda(), past_key_values=cache, use_cache=True)
            steps.append(out.logits)
            cache.advance()

    def error(x):
        return float((x.double().cpu() - exact).norm() / exact.norm())

    assert error(torch.cat(steps, 1)) <= 2 * max(error(plain), 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("rotary", [0, 32, 128])
@pytest.mark.parametrize("rows", [1, 40])
def test_attention_kernel_equals_plain_attention(rotary, rows):
    from h3lm.layers import CausalAttention, step

    torch.manual_seed(0)
    layer = CausalAttention(256, 2, rotary_dim=rotary).cuda().eval()
    u = torch.randn(rows, 1, 256, device="cuda")
    keys, values = torch.randn(2, rows, 2, 1088, 128, device="cuda").unbind()
    lengths = torch.randint(0, 1087, (rows,), device="cuda")
    lengths[0] = 0 if rows > 1 else 1087
    rotation = layer.rotation(lengths[:, None])
    results = []
    with torch.no_grad():
        for plain in (True, False):
            slots = keys.clone(), values.clone()
            with pytest.MonkeyPatch.context() as patch:
                if plain:
                    patch.setattr("h3lm.layers.attention.has_kernels", lambda x: False)
                else:
                    assert step.has_kernels(u)
                y = layer.step(u, *slots, lengths, 1087, rotation)
            results.append((y, *slots))
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class QuantisedHead(torch.nn.Module):
    """As PyTorch's own: `weight` is a method."""

    def __init__(self, head):
        super().__init__()
        self.inside, self.out_features = head, head.out_features

    def weight(self):
        return self.inside.weight

    def forward(self, x):
        return self.inside(x)


class PackedHead(QuantisedHead):
    """As other libraries' quantised maps: there is no `weight` at all."""

    weight = property()


@pytest.mark.parametrize("quantised", [QuantisedHead, PackedHead])
def test_a_quantised_head_goes_through_the_librarys_loop(hybrid, ids, quantised):
    expected = hybrid.generate(ids, max_new_tokens=3, do_sample=False)
    head = hybrid.lm_head
    hybrid.lm_head = quantised(head)
    try:
        found = hybrid.generate(ids, max_new_tokens=3, do_sample=False)
    finally:
        hybrid.lm_head = head
    assert torch.equal(found, expected)
