import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from h3lm import H3Config, H3ForCausalLM
from h3lm.evals.lengths import draw, score_lengths
from h3lm.evals.scorer import Limits

SMALL = Limits(64, 64, 8, 2**20, 2**20, 1)


def model_of(mixers, **fields):
    torch.manual_seed(0)
    config = H3Config(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, d_state=8,
        initializer_range=0.4, mixers=mixers, **fields,
    )  # fmt: skip
    return H3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 24, 203)


@pytest.mark.parametrize(
    ("mixers", "fields"),
    [("h3", {}), ("hybrid", {}), ("attention", {"rotary_dim": 8}),
     ("hybrid", {"num_learned_positions": 64}), ("s4d", {})],
)  # fmt: skip
def test_chunks_that_hand_on_their_state_are_whole_windows(mixers, fields, tokens):
    model = model_of(mixers, **fields)
    found = score_lengths(model, tokens, [5, 50], limits=SMALL)
    for point in found.by_length:
        length, count = point.end, 202 // point.end
        nats = []
        for w in range(count):
            ids = torch.from_numpy(tokens[w * length : (w + 1) * length + 1])
            with torch.no_grad():
                logits = model(ids[None, :-1], use_cache=False).logits[0]
            nats.append(cross_entropy(logits.double(), ids[1:], reduction="none").numpy())
        assert point.tokens == count * length
        assert np.log(point.perplexity) == pytest.approx(np.mean(nats), rel=1e-5)
    every = np.array(nats)
    assert [(p.begin, p.end) for p in found.by_position] == [(0, 16), (16, 32), (32, 50)]
    for point in found.by_position:
        here = every[:, point.begin : point.end]
        assert np.log(point.perplexity) == pytest.approx(here.mean(), rel=1e-5)
        spread = here.mean(1).std(ddof=1) / 2  # of 4 windows
        assert point.stderr == pytest.approx(point.perplexity * spread, rel=1e-5)


def test_no_call_is_longer_than_a_chunk_and_no_state_grows(tokens):
    model = model_of("h3")
    seen, states = [], []

    def spy(module, arguments, options):
        seen.append(options["input_ids"].numel())
        cache = options["past_key_values"]
        kept = [x for layer in cache.layers for x in layer.recurrent_states.values()]
        states.append(sum(x.nbytes for x in kept if x is not None))

    hook = model.register_forward_pre_hook(spy, with_kwargs=True)
    score_lengths(model, tokens, [200], limits=SMALL)
    hook.remove()
    assert max(seen) <= SMALL.batch_tokens
    assert len(seen) > 25
    assert len(set(states[2:])) == 1


def test_the_picture_is_drawn(tokens, tmp_path):
    found = score_lengths(model_of("h3"), tokens, [20, 100], limits=SMALL)
    draw(found, "title", tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "100" in found.lines()
