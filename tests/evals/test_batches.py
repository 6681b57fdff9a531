from itertools import combinations

import numpy as np
import pytest

from h3lm.evals.batches import like_widths, padded


def cost(groups, widths, call_tokens):
    return sum(len(g) * int(widths[g].max()) + call_tokens for g in groups)


def cheapest(widths, call_tokens):
    """Every way to cut the sorted rows."""
    ordered = np.argsort(widths, kind="stable")
    return min(
        cost(np.split(ordered, list(cuts)), widths, call_tokens)
        for count in range(len(widths))
        for cuts in combinations(range(1, len(widths)), count)
    )


@pytest.mark.parametrize("call_tokens", [0, 3, 20, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_groups_are_the_cheapest(seed, call_tokens):
    widths = np.random.default_rng(seed).integers(1, 30, 9)
    groups = like_widths(widths, call_tokens)
    assert sorted(np.concatenate(groups).tolist()) == list(range(9))
    assert cost(groups, widths, call_tokens) == cheapest(widths, call_tokens)


def test_lengths_are_rounded_up():
    assert padded(np.array([1, 16, 17, 32]), 16).tolist() == [16, 16, 32, 32]
    assert padded(np.array([3, 5]), 1).tolist() == [3, 5]
