"""Decays and weights of diagonal SSMs as pairs of real tensors.

What `discretize` says in complex numbers, for programs that are compiled: PyTorch's compiler makes
no kernels of complex numbers, so that each operation on them, forward and backward, would be one of
its own. Uncompiled, complex numbers take a third of the operations, and `system()` keeps to them.
"""

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # real and imaginary part


def split(pairs: Tensor) -> Pair:
    """Both parts of (..., 2)."""
    return pairs[..., 0], pairs[..., 1]


def times(x: Pair, y: Pair) -> Pair:
    """Product."""
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def over(x: Pair, y: Pair) -> Pair:
    """Quotient."""
    size = y[0].square() + y[1].square()
    return times(x, (y[0] / size, -y[1] / size))


def hold(z: Pair) -> tuple[Pair, Pair]:
    """exp(z) and exp(z) - 1, the latter without cancellation near 0."""
    grown, (cos, sin) = torch.expm1(z[0]), (torch.cos(z[1]), torch.sin(z[1]))
    im = (grown + 1) * sin
    return ((grown + 1) * cos, im), (grown * cos - 2 * torch.sin(z[1] / 2).square(), im)


def discretize(A: Pair, dt: Tensor, rule: str) -> tuple[Pair, Pair]:
    """`diagonal.discretize` for B = 1.

    Args:
        A: (H, N/2) or (N/2,).
        dt: (H,).
        rule: "bilinear" or "zoh".

    Returns:
        a and b, (H, N/2).
    """
    dt = dt[:, None]
    z = dt * A[0], dt * A[1]
    if rule == "bilinear":
        below = 1 - z[0] / 2, -z[1] / 2
        return over((1 + z[0] / 2, z[1] / 2), below), over((dt, torch.zeros_like(dt)), below)
    a, grown = hold(z)
    return a, over(grown, A)
