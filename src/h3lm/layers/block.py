"""The pre-norm residual block."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from h3lm.layers.mixers import MixerSizes, mixer
from h3lm.layers.mlp import MLP
from h3lm.layers.step import Stream, add_norm, product, product_in_parts


class Block(nn.Module):
    """A mixer and perhaps an MLP, each behind a LayerNorm, each added to the residual stream.

        r = r + dropout(mixer(norm1(r)));   r = r + dropout(mlp(norm2(r)))

    Source: Fu et al. 2023 (arXiv 2212.14052v3), section 3; the release applies the same dropout
    to a sublayer's output just before it is added.

    Args:
        mixer_name: A name of `MIXERS`.
        sizes: Sizes of the mixer.
        d_inner: Inner width of the MLP; None for a block that is its mixer alone.
        dropout: Dropout on both sublayers' outputs.
        norm_eps: Epsilon of the norms.
    """

    def __init__(
        self,
        mixer_name: str,
        sizes: MixerSizes,
        d_inner: int | None,
        *,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.mixer_name = mixer_name
        self.norm1 = nn.LayerNorm(sizes.d_model, eps=norm_eps)
        self.mixer: Any = mixer(mixer_name).build(sizes)
        self.mlp = None
        if d_inner is not None:
            self.norm2 = nn.LayerNorm(sizes.d_model, eps=norm_eps)
            self.mlp = MLP(sizes.d_model, d_inner)
        self.dropout = nn.Dropout(dropout)

    def forward(self, r: Tensor, state: Any = None, **where: Any) -> tuple[Tensor, Any]:
        """Advance the residual stream (B, L, D).

        Args:
            r: Residual stream.
            state: The mixer's state in front of it.
            where: `mask` or `cu_seqlens`, for the mixer.

        Returns:
            The new residual stream and the mixer's state behind it.
        """
        mixed, state = self.mixer(self.norm1(r), state, **where)
        return self.finish(r, mixed), state

    def finish(self, r: Tensor, mixed: Tensor) -> Tensor:
        """Everything behind the mixer."""
        if self.mlp is None:
            return r + self.dropout(mixed)
        r = r + self.dropout(mixed)
        return r + self.dropout(self.mlp(self.norm2(r)))

    def advance(self, stream: Stream, core: Callable[[Tensor], Tensor]) -> Stream:
        """`forward` for one position of each row, by kernels; only where `step.can_advance`.

        Args:
            stream: Residual stream.
            core: What the mixer does between its projections, (rows, 3 D) to (rows, D).
        """
        r, u = add_norm(stream, self.norm1)
        mixed = core(product(self.mixer.qkv_proj, u))
        stream = Stream(r, *product_in_parts(self.mixer.output_proj, mixed))
        if self.mlp is None:
            return stream
        r, u = add_norm(stream, self.norm2)
        hidden = product(self.mlp.up_proj, u, gelu=True)
        return Stream(r, *product_in_parts(self.mlp.down_proj, hidden))
