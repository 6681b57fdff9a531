import pytest
import torch

from h3lm.errors import UserError
from h3lm.synthetics.constructions import (
    NOT_SEEN,
    key_bit_channels,
    one_hot_channels,
    outer_product_head,
    parity_channels,
)

EXACT = {"a": outer_product_head, "b": one_hot_channels, "b-parities": parity_channels}
SIZES = [(4, 4), (9, 9), (16, 16), (32, 8)]
LONGEST = 512


def sequences(num_keys, num_values, count, longest=LONGEST, seed=0):
    """Rows k v k v ... q of even lengths 2 .. longest plus the query, as equal rows.

    Shorter rows end in separators. Returns the tokens, the answer at each key position (NOT_SEEN
    if the row does not hold the key yet), where keys are, and where each row's query is.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    separator = num_keys + num_values
    pairs = longest // 2
    keys, values = draw(num_keys, count, pairs), draw(num_values, count, num_keys)
    used = 1 + draw(pairs, count)
    tokens = torch.full((count, longest + 1), separator)
    tokens[:, 0:longest:2] = keys
    tokens[:, 1:longest:2] = num_keys + values.gather(1, keys)
    rows = torch.arange(count)
    query = keys[rows, (torch.rand(count, generator=generator) * used).long()]  # a seen key
    tokens[torch.arange(longest + 1) >= 2 * used[:, None]] = separator
    tokens[rows, 2 * used] = query
    is_key = tokens < num_keys
    seen = torch.nn.functional.one_hot(tokens.clamp(max=separator), separator + 1).cumsum(1)
    known = (seen.gather(2, tokens[..., None])[..., 0] > 1) & is_key
    answers = torch.where(known, values.gather(1, tokens.clamp(max=num_keys - 1)), NOT_SEEN)
    return tokens, answers, is_key, 2 * used


def errors(construction, count=1000, longest=LONGEST, batch=250):
    """Wrong final queries, and wrong key positions of all kinds, in float32, at once."""
    tokens, answers, is_key, query = sequences(
        construction.num_keys, construction.num_values, count, longest
    )
    wrong = []
    with torch.no_grad():
        for rows in tokens.split(batch):
            y, _ = construction.layer(construction.embed(rows))
            assert y.dtype == torch.float32
            wrong.append(construction.decide(y))
    bad = torch.cat(wrong) != answers
    return int(bad.gather(1, query[:, None]).sum()), int((bad & is_key).sum())


@pytest.mark.parametrize(
    ("name", "size"),
    [*(("b", size) for size in SIZES), ("b-parities", (4, 4)), ("b-parities", (9, 9))],
)
def test_no_error_in_1000_sequences_in_parallel(name, size):
    assert errors(EXACT[name](*size)) == (0, 0)


def test_no_error_in_1000_sequences_in_parallel_by_one_outer_product_head():
    assert errors(outer_product_head(4, 4), batch=50) == (0, 0)


def test_outer_product_head_of_a_larger_vocabulary():
    # 2 * 18^2 integrators over a whole row each: fewer and shorter rows are enough here
    assert errors(outer_product_head(9, 9), count=100, longest=128, batch=20) == (0, 0)


@pytest.mark.parametrize(
    ("name", "size"), [("a", (4, 4)), ("b", (4, 4)), ("b", (9, 9)), ("b-parities", (4, 4))]
)
def test_no_error_in_1000_sequences_by_recurrent_decoding(name, size):
    construction = EXACT[name](*size)
    tokens, answers, is_key, _ = sequences(*size, 1000)
    state, wrong = None, 0
    with torch.no_grad():
        embedded = construction.embed(tokens)
        for t in range(tokens.shape[1]):
            y, state = construction.layer(embedded[:, t : t + 1], state)
            here = is_key[:, t]
            wrong += int((construction.decide(y[:, 0]) != answers[:, t])[here].sum())
    assert wrong == 0


@pytest.mark.parametrize(
    ("size", "published"), [((4, 4), 330), ((16, 16), 679), ((9, 9), 523), ((32, 8), 655)]
)
def test_one_channel_for_each_bit_of_the_key_fails(size, published):
    construction = key_bit_channels(*size)
    tokens, answers, _, query = sequences(*size, 1000)
    with torch.no_grad():
        y, _ = construction.layer(construction.embed(tokens))
    # bit by bit, as the published count was made; its sample of 1000 rows was another one, which
    # leaves 4 standard deviations of sqrt(2) 16
    bits = (size[1] - 1).bit_length()
    value = ((y[..., :bits] > 0) << torch.arange(bits)).sum(-1)
    wrong = int((value != answers).gather(1, query[:, None]).sum())
    assert wrong == pytest.approx(published, abs=90)
    at_once = construction.decide(y) != answers  # as `errors` decides for those that do not fail
    assert at_once.gather(1, query[:, None]).sum() > 300


@pytest.mark.parametrize(
    ("make", "size", "channels"),
    [
        (outer_product_head, (4, 4), 8),
        (one_hot_channels, (16, 16), 64),
        (one_hot_channels, (9, 9), 36),
        (parity_channels, (9, 9), 64),
        (one_hot_channels, (4, 2), 6),
        (one_hot_channels, (1, 1), 2),
    ],
)
def test_widths_are_the_stated_ones(make, size, channels):
    assert make(*size).layer.d_model == channels


def test_integrator_is_perfect_and_the_shift_is_one_step():
    layer = one_hot_channels(4, 4).layer
    system = layer.diagonal_ssm.system()
    assert (system.a == 1).all()
    assert (system.b == 1).all()
    taps = layer.shift_ssm.taps()
    assert torch.equal(taps, torch.tensor([0.0, 1.0]).expand_as(taps))


def test_a_key_with_two_values_gives_the_majority_not_the_last():
    construction = outer_product_head(2, 3)
    tokens = torch.tensor([[0, 2, 0, 2, 0, 3, 0]])
    y, _ = construction.layer(construction.embed(tokens))
    assert construction.decide(y)[0, -1] == 0


def test_nothing_to_recall_is_refused():
    for make in EXACT.values():
        with pytest.raises(UserError, match="at least one key and one value"):
            make(0, 4)
