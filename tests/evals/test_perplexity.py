import math

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from h3lm import H3Config, H3ForCausalLM
from h3lm.errors import UserError
from h3lm.evals.perplexity import TextScore, score_tokens


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = H3Config(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, d_state=8,
        initializer_range=0.4,
    )  # fmt: skip
    return H3ForCausalLM(config)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 24, 41)


@torch.no_grad()
def log_probability(model, tokens, position, start):
    """Of one token, given those from `start` on."""
    ids = torch.from_numpy(tokens[start:position])[None]
    logits = model.eval()(ids).logits[0, -1].double()
    return float(log_softmax(logits, -1)[tokens[position]])


@pytest.mark.parametrize(
    ("context", "stride", "first"),
    [(8, None, 1), (8, 1, 1), (8, 3, 1), (8, 5, 10), (40, None, 1), (100, 100, 1), (1, 1, 1)],
)
def test_the_score_is_the_sum_over_tokens_predicted_one_by_one(
    model, tokens, context, stride, first
):
    expected, step = 0.0, stride or context
    for i, position in enumerate(range(first, len(tokens))):
        last_of_window = min(first + (i // step + 1) * step, len(tokens)) - 1
        start = max(0, last_of_window - context)
        expected -= log_probability(model, tokens, position, start)
    score = score_tokens(model, tokens, context=context, stride=stride, first=first, batch_size=3)
    assert score.tokens == len(tokens) - first
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected / score.tokens), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_nothing_behind_a_token_is_ever_seen(model, tokens, stride):
    whole = score_tokens(model, tokens, context=8, stride=stride)
    for cut in (2, 9, 20):
        changed = tokens.copy()
        changed[cut:] = (changed[cut:] + 5) % 24
        before = [score_tokens(model, t[:cut], context=8, stride=stride) for t in (tokens, changed)]
        assert before[0].nats == before[1].nats
        assert before[0].tokens == cut - 1
        assert before[0].nats < whole.nats


@pytest.mark.parametrize("stride", [1, 2, 5, 8])
@pytest.mark.parametrize("first", [1, 2, 17])
@pytest.mark.parametrize("length", [18, 33, 41])
def test_each_token_is_predicted_once_with_the_context_that_is_promised(length, first, stride):
    """Told by a model whose logits reveal what it was given."""
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, use_cache, logits_to_keep):
            for row in input_ids:
                seen.append((row.tolist(), logits_to_keep))
            logits = torch.zeros(*input_ids.shape, length)[:, -logits_to_keep:]
            return type("Output", (), {"logits": logits})

    score = score_tokens(
        Spy(), np.arange(length), context=8, stride=stride, first=first, batch_size=2
    )
    predicted = []
    for ids, _ in seen:
        end = ids[-1] + 1
        begin = max(predicted, default=first - 1) + 1
        for position in range(begin, end + 1):
            context = position - ids[0]
            assert context <= 8
            assert context >= min(8 - stride + 1, position)
            predicted.append(position)
    assert predicted == list(range(first, length))
    assert score.tokens == len(predicted)
    assert score.loss == pytest.approx(math.log(length))


def test_logits_of_a_batch_are_bounded(model, tokens, monkeypatch):
    whole = score_tokens(model, tokens, context=8, stride=4, batch_size=5)
    shapes, forward = [], model.forward

    def watched(**inputs):
        output = forward(**inputs)
        shapes.append(tuple(output.logits.shape))
        return output

    monkeypatch.setattr("h3lm.evals.perplexity.BATCH_LOGITS", 2 * 4 * 24 + 1)
    monkeypatch.setattr(model, "forward", watched)
    assert score_tokens(model, tokens, context=8, stride=4, batch_size=5).nats == pytest.approx(
        whole.nats, rel=1e-6
    )
    assert max(shapes) == (2, 4, 24)
    shapes.clear()
    monkeypatch.setattr("h3lm.evals.perplexity.BATCH_LOGITS", 1)  # one window at least
    score_tokens(model, tokens, context=8, batch_size=5)
    assert max(shapes) == (1, 8, 24)


def test_the_model_is_left_as_it_was(model, tokens):
    model.train()
    score_tokens(model, tokens, context=8)
    assert model.training
    model.eval()
    score_tokens(model, tokens, context=8)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_units_are_counted_by_the_whole_sum():
    score = TextScore(nats=10 * math.log(2), tokens=5, context=8, stride=8)
    assert score.bits_per(4) == pytest.approx(2.5)
    assert score.perplexity == pytest.approx(4.0)


def test_progress_counts_every_predicted_token(model, tokens):
    counts = []
    score_tokens(model, tokens, context=8, stride=3, progress=counts.append)
    assert sum(counts) == len(tokens) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 8, "stride": 9}, "stride=9 must be from 1 to the context, 8"),
        ({"context": 8, "stride": 0}, "stride=0"),
        ({"context": 8, "first": 41}, "nothing to predict from 41 on"),
        ({"context": 8, "first": 0}, "nothing to predict from 0 on"),
    ],
)
def test_what_makes_no_sense_is_one_line(model, tokens, arguments, message):
    with pytest.raises(UserError, match=message):
        score_tokens(model, tokens, **arguments)
