"""When a loss or a gradient stopped being a number."""

from typing import Any

import torch

from h3lm.train.processes import largest


class FiniteWatch:
    """Keeps the first step with a number that is not finite.

    The numbers stay where they are until someone asks: each look would stall a GPU.

    Args:
        device: Where the numbers are.
    """

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)

    def see(self, number: Any, step: int) -> None:
        """Take a number (a tensor, or a float) of a step, counted from 1."""
        bad = ~torch.isfinite(torch.as_tensor(number).detach().to(self._first_bad.device))
        new = bad & (self._first_bad == 0)
        self._first_bad = torch.where(new, torch.full_like(self._first_bad, step), self._first_bad)

    def first_bad_step(self) -> int:
        """The first such step of any process, 0 if there was none; all must ask."""
        return largest(int(self._first_bad))
