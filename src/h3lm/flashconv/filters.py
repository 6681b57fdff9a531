"""A filter of a long convolution as the op is given it, and the plain pair that it stands for.

Skip, reverse filter and wrap-around are properties of one filter that reaches both ways:

    h_s = f_s (s > 0),  f_0 + f_reverse_0 + skip (s = 0),  f_reverse_{-s} (s < 0)

and in rows of period L, where a lag of s is also one of s - L and s + L, the sum over those three,
for |s| < L. Kernels read h from its parts; what runs in plain PyTorch folds the parts into two
filters, and takes the gradients of those two apart again.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class FilterGradients(NamedTuple):
    """Gradients of the parts of a filter, in their dtypes; None where there is none."""

    f: Tensor
    f_reverse: Tensor | None = None
    skip: Tensor | None = None


class Filter(NamedTuple):
    """A filter.

    Attributes:
        f: (D, Lf).
        f_reverse: (D, Lr), or None.
        skip: (D,), or None.
        period: L of rows that wrap around, else 0.
    """

    f: Tensor
    f_reverse: Tensor | None = None
    skip: Tensor | None = None
    period: int = 0

    @property
    def taps(self) -> int:
        """Lags of h from 0 on."""
        return self.period or self.f.shape[1]

    @property
    def taps_reverse(self) -> int | None:
        """Lags of h from 0 back; None if there is but one, of a filter that only reaches back."""
        if self.period:
            return self.period
        return None if self.f_reverse is None else self.f_reverse.shape[1]

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """What h is from lag 0 on, and back from 0 with a tap to be added; float32 at least."""
        wide = torch.promote_types(self.f.dtype, torch.float32)
        f = self.f.to(wide)
        back = None if self.f_reverse is None else self.f_reverse.to(wide)
        if self.skip is not None:
            f = torch.cat([f[:, :1] + self.skip.to(wide)[:, None], f[:, 1:]], 1)
        if not self.period:
            return f, back
        ring = F.pad(f, (0, self.period - f.shape[1]))
        if back is not None:
            ring = ring + F.pad(back, (0, self.period - back.shape[1])).flip(1).roll(1, 1)
        return ring, F.pad(ring[:, 1:].flip(1), (1, 0))  # lag -s is lag L - s

    def gradients(self, df: Tensor, dback: Tensor | None) -> FilterGradients:
        """Gradients of the parts from those of what `folded` returns; its transpose."""
        if self.period:
            assert dback is not None
            df = torch.cat([df[:, :1], df[:, 1:] + dback[:, 1:].flip(1)], 1)
            dback = torch.cat([df[:, :1], df[:, 1:].flip(1)], 1)
        back, skip = None, None
        if self.f_reverse is not None:
            assert dback is not None
            back = dback[:, : self.f_reverse.shape[1]].to(self.f_reverse.dtype).contiguous()
        if self.skip is not None:
            skip = df[:, 0].to(self.skip.dtype, copy=True)
        df = df[:, : self.f.shape[1]].to(self.f.dtype).contiguous()
        return FilterGradients(df, back, skip)

    def empty_gradients(self) -> FilterGradients:
        """Gradients to be written by a kernel."""
        return FilterGradients(
            *(None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
              for x in (self.f, self.f_reverse, self.skip))  # type: ignore[arg-type]
        )  # fmt: skip
