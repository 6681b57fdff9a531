import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h3lm.data.order import WINDOW, Order, Permutation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**32))
def test_a_permutation_takes_everything_once(size, seed):
    assert sorted(Permutation(size, seed)(np.arange(size))) == list(range(size))


def test_small_permutations_are_uniform():
    size, draws = 6, 6000
    counts = np.zeros((size, size))
    for seed in range(draws):
        counts[np.arange(size), Permutation(size, seed)(np.arange(size))] += 1
    expected = draws / size
    # chi-square of 25 degrees of freedom: above 52.6 once in a thousand
    assert ((counts - expected) ** 2 / expected).sum() < 52.6
    neighbours = Permutation(1 << 40, 1)(np.arange(10000))
    assert abs(np.corrcoef(neighbours[1:], neighbours[:-1])[0, 1]) < 0.05


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 900), min_size=1, max_size=4),
    weighted=st.booleans(),
    first=st.integers(0, 6000),
    length=st.integers(0, 3000),
    data=st.data(),
)
def test_any_stretch_is_that_of_the_whole(sizes, weighted, first, length, data):
    weights = [data.draw(st.floats(0.01, 9)) for _ in sizes] if weighted else None
    whole = Order(sizes, 3, weights).blocks(0, 9000)
    assert np.array_equal(Order(sizes, 3, weights).blocks(first, first + length),
                          whole[first : first + length])  # fmt: skip
    assert whole.min() >= 0
    assert whole.max() < sum(sizes)
    order = Order(sizes, 3, weights)  # also backwards
    parts = [order.blocks(at, at + 1000) for at in range(8000, -1, -1000)]
    assert np.array_equal(np.concatenate(parts[::-1]), whole)


def test_without_weights_every_block_comes_once_before_any_twice():
    order = Order([3, 10, 2], 1)
    found = order.blocks(0, 45).reshape(3, 15)
    assert all(sorted(one) == list(range(15)) for one in found)
    assert not np.array_equal(found[0], found[1])


def test_sources_get_their_shares_in_every_window_and_go_through_all_their_blocks():
    sizes, weights = [7, 500, 40], [1, 6, 2.5]
    found = Order(sizes, 9, weights).blocks(0, 40 * WINDOW)
    source = np.searchsorted(np.cumsum(sizes), found, side="right")
    for window in source.reshape(40, WINDOW):
        shares = np.bincount(window, minlength=3) / WINDOW
        assert np.abs(shares - np.array(weights) / 9.5).max() <= 1 / WINDOW
    assert np.abs(np.bincount(source) / len(source) - np.array(weights) / 9.5).max() < 2e-4
    # each source in passes of its own; a window mixes only its places
    for number, size in enumerate(sizes):
        counts = np.bincount(found[source == number] - sum(sizes[:number]), minlength=size)
        assert counts.max() - counts.min() <= 1 + WINDOW // size
    # and no source comes in runs
    assert (np.diff(source) != 0).mean() > 0.4


def test_a_source_too_rare_for_a_window_still_gets_its_share():
    found = Order([1000, 1], 2, [1e5, 1]).blocks(0, 4000 * WINDOW)
    assert (found == 1000).sum() == pytest.approx(4000 * WINDOW / 1e5, rel=0.5)


def test_orders_differ_by_seed_alone():
    one, same = (Order([50, 9], 1, weights).blocks(0, 99) for weights in ([1, 1], [2, 2]))
    assert np.array_equal(one, same)
    assert not np.array_equal(Order([50], 1).blocks(0, 50), Order([50], 2).blocks(0, 50))


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="size=0"):
        Permutation(0)
    with pytest.raises(ValueError, match="must be positive"):
        Order([3, 0], 1)
    with pytest.raises(ValueError, match="must be positive"):
        Order([3, 3], 1, [1, 0])
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        Order([3, 3], 1, [1])
