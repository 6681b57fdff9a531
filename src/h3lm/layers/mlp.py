"""The feed-forward half of a block."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Module):
    """Two linear maps with GELU in its tanh approximation between them.

    Args:
        d_model: Width D.
        d_inner: Width in between; 4 D in the paper.
        bias: Whether the maps have a bias.
        device: Where the parameters are made.
        dtype: Their dtype.
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_inner, bias=bias, device=device, dtype=dtype)
        self.activation = nn.GELU(approximate="tanh")
        self.down_proj = nn.Linear(d_inner, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, u: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """Map each position, (..., D) to (..., D)."""
        return self.down_proj(self.activation(self.up_proj(u)))
