"""Batch norm over the positions that count."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from h3lm.layers import border


class BatchNorm(nn.BatchNorm1d):
    """Normalise each channel by its mean and variance over all positions of all rows.

    Padding is left out of both, in the batch and in the running averages that evaluation uses.
    Computed in float32; in training on an NVIDIA GPU with Triton in two passes over memory.
    """

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        lengths: Integer[Tensor, " B"] | None = None,
        *,
        dtype: torch.dtype | None = None,
        positions_last: bool = False,
    ) -> Float[Tensor, "B L D"]:
        """Normalise.

        Args:
            x: (B, L, D).
            lengths: Positions of each row that count, (B,), from its beginning; all if None.
            dtype: Of the result; that of `x` if None.
            positions_last: Whether whoever reads the result wants positions contiguous in memory.
                They may not be: it saves time where it can be had.

        Returns:
            (B, L, D); at padding it means nothing.
        """
        return self.beside(x, lengths, dtype=dtype, positions_last=positions_last)[0]

    def beside(
        self,
        x: Float[Tensor, "B L D"],
        lengths: Integer[Tensor, " B"] | None = None,
        *,
        dtype: torch.dtype | None = None,
        positions_last: bool = False,
    ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B L D"]]:
        """`forward`, and x for a residual sum, whose gradient then costs no pass over memory."""
        dtype = dtype or x.dtype
        with torch.autocast(x.device.type, enabled=False):
            if self.training and dtype in border.DTYPES and border.can_normalise(x, self.weight):
                y, statistics, x = border.batch_norm(
                    x, self.weight, self.bias, lengths, self.eps, dtype, positions_last
                )
                self._follow(statistics[0], statistics[2])
                return y, x
            return self.plain(x, lengths).to(dtype), x

    def plain(
        self, x: Float[Tensor, "B L D"], lengths: Integer[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """`forward` by modules of torch."""
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        if lengths is None or not self.training:
            return self._normalise_all(wide.flatten(0, 1)).view_as(x).to(x.dtype)
        valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        count = lengths.sum().clamp(min=1)
        mean = wide.masked_fill(~valid[..., None], 0).sum((0, 1)) / count
        centred = wide - mean
        variance = centred.masked_fill(~valid[..., None], 0).square().sum((0, 1)) / count
        self._follow(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        y = centred * (variance + self.eps).rsqrt() * self.weight + self.bias
        return y.to(x.dtype)

    def _normalise_all(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        # without cuDNN, which gives each channel of (N, D) a single thread for all N positions
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var,
            self.training, self.momentum, self.eps, False,
        )  # fmt: skip

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
