import math

import pytest

from h3lm.train.recipe import make_recipe
from h3lm.train.schedule import learning_rate_factor

PAPER = {
    "steps": 800_000, "learning_rate": 6e-4, "warmup_fraction": 0.01, "decay_fraction": 0.75,
}  # fmt: skip


def test_cosine_is_the_papers():
    recipe = make_recipe(PAPER)
    peak, floor, warm, cosine = 6e-4, 6e-5, 8_000, 600_000
    for step in (0, 1, 4_000, 7_999, 8_000, 8_001, 300_000, 599_999, 600_000, 700_000, 800_000):
        if step < warm:
            expected = 1e-6 + step * (peak - 1e-6) / warm
        elif step < cosine:
            expected = floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * step / cosine))
        else:
            expected = floor
        rate = peak * learning_rate_factor(recipe, step / 800_000)
        assert rate == pytest.approx(expected, rel=1e-9), step


def test_linear_goes_from_the_peak_to_the_floor():
    recipe = make_recipe(PAPER | {"schedule": "linear", "decay_fraction": 1.0})
    assert learning_rate_factor(recipe, 0.01) == 1.0
    assert learning_rate_factor(recipe, 0.505) == pytest.approx(0.55)
    assert learning_rate_factor(recipe, 1.0) == recipe.floor_fraction


def test_constant_stays_at_the_peak_and_no_warm_up_starts_there():
    recipe = make_recipe(PAPER | {"schedule": "constant", "warmup_fraction": 0.0})
    assert {learning_rate_factor(recipe, t) for t in (0.0, 0.3, 1.0)} == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_only_falls_after_the_warm_up(schedule):
    recipe = make_recipe(PAPER | {"schedule": schedule})
    factors = [learning_rate_factor(recipe, t / 200) for t in range(201)]
    top = factors.index(max(factors))
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
