"""Learning rate over a run."""

import math

from h3lm.train.recipe import Recipe


def learning_rate_factor(recipe: Recipe, progress: float) -> float:
    """The learning rate at a point of the run, as a part of the peak.

    Warm-up, t < w:   (s + (1 - s) t / w)                      s = warmup_start / learning_rate
    then, cosine:     floor + (1 - floor) (1 + cos(pi t / d)) / 2 for t < d, floor behind it
          linear:     from 1 at w to floor at d
          constant:   1

    Source: the release's scheduler (paper, appendix E): the cosine's phase counts from step 0,
    warm-up included.

    Args:
        recipe: w = warmup_fraction, d = decay_fraction.
        progress: t, from 0 at the first step to 1 at the end.
    """
    warmup, decay, floor = recipe.warmup_fraction, recipe.decay_fraction, recipe.floor_fraction
    if progress < warmup:
        start = recipe.warmup_start / recipe.learning_rate
        return start + (1 - start) * progress / warmup
    if recipe.schedule == "constant":
        return 1.0
    if progress >= decay:
        return floor
    if recipe.schedule == "linear":
        return 1 - (1 - floor) * (progress - warmup) / (decay - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress / decay))
