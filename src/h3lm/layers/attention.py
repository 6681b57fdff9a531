"""Causal attention, as the hybrids and the Transformer baseline use it."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from h3lm.layers.step import attend_step, has_kernels
from h3lm.layers.unpad import check_mask

ROTARY_BASE = 10000.0
Rotation = tuple[Tensor, Tensor]  # cosine and sine, (B, 1, L, rotary_dim / 2)


class AttentionState(NamedTuple):
    """Keys and values of everything before a position; it grows with the sequence.

    Attributes:
        keys: (B, heads, S, head_dim), rotated.
        values: (B, heads, S, head_dim).
        valid: (B, S), False where a position was masked.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor


class CausalAttention(nn.Module):
    """Multi-head causal softmax attention, scale 1/sqrt(head_dim).

    Args:
        d_model: Width D.
        num_heads: Number of heads; divides d_model.
        rotary_dim: Features of each head that are rotated, first with second half; even, 0 for
            none.
        dropout: Dropout on the attention weights.
        bias: Whether the projections have a bias.
        device: Where the parameters are made.
        dtype: Their dtype.

    Raises:
        ValueError: if num_heads does not divide d_model, or rotary_dim is odd or exceeds a head.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        rotary_dim: int = 0,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide d_model={d_model}")
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, d_model // num_heads
        if rotary_dim % 2 or not 0 <= rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim={rotary_dim} must be even and at most the head's {self.head_dim}"
            )
        self.rotary_dim, self.dropout = rotary_dim, dropout
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias, device=device, dtype=dtype)
        self.output_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        u: Float[Tensor, "B L D"],
        state: AttentionState | None = None,
        *,
        mask: Bool[Tensor, "B L"] | Integer[Tensor, "B L"] | None = None,
        cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], AttentionState]:
        """Mix positions; arguments as in `H3.forward`.

        Rotary positions count unmasked positions, and start anew in each packed sequence.

        Raises:
            ValueError: if packed sequences come with a state or a mask, or a mask is not (B, L).
        """
        B, L, _ = u.shape
        if mask is not None:
            check_mask(mask.shape, B, L)
        valid = u.new_ones(B, L, dtype=torch.bool) if mask is None else mask.bool()
        bias: Tensor | None = None
        if cu_seqlens is not None:
            if state is not None or mask is not None:
                raise ValueError("attention over packed sequences takes no state and no mask")
            token = torch.arange(L, device=u.device)
            owner = torch.searchsorted(cu_seqlens.to(token.dtype)[1:], token, right=True)
            positions = (token - cu_seqlens[owner])[None]
            bias = ((owner[:, None] == owner) & (token[:, None] >= token))[None, None]
        else:
            seen = 0 if state is None else state.valid.sum(1, keepdim=True)
            positions = (valid.cumsum(1) - 1).clamp(min=0) + seen
        q, k, v = self.project(u, self.rotation(positions))
        if state is not None:
            k = torch.cat([state.keys, k], 2)
            v = torch.cat([state.values, v], 2)
            valid = torch.cat([state.valid, valid], 1)
        if mask is not None or (state is not None and not bool(state.valid.all())):
            S = k.shape[2]
            causal = torch.ones(L, S, dtype=torch.bool, device=u.device).tril(S - L)
            itself = torch.eye(L, S, dtype=torch.bool, device=u.device).roll(S - L, 1)
            bias = (causal & valid[:, None, None, :]) | itself  # a masked query sees itself: no NaN
        return self.attend(q, k, v, bias), AttentionState(k, v, valid)

    def rotation(self, positions: Tensor) -> Rotation | None:
        """What `project` rotates by at positions (B, L); the same for all layers of one shape."""
        return _rotation(positions, self.rotary_dim) if self.rotary_dim else None

    def project(self, u: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, L, head_dim), rotated."""
        q, k, v = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x in self.qkv_proj(u).chunk(3, -1)
        )
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v

    def step(
        self,
        u: Float[Tensor, "B 1 D"],
        keys: Tensor,
        values: Tensor,
        lengths: Integer[Tensor, " B"],
        longest: int,
        rotation: Rotation | None,
    ) -> Float[Tensor, "B 1 D"]:
        """One position of each row against slots of keys and values, which it joins.

        Args:
            u: Input.
            keys, values: (B, heads, capacity, head_dim); changed in place.
            lengths: Positions that each row has seen.
            longest: A bound on `lengths`.
            rotation: Of the position, as `rotation` makes it.
        """
        if has_kernels(u):
            y = attend_step(self.qkv_proj(u)[:, 0], keys, values, lengths, rotation)
            return self.output_proj(y[:, None])
        q, k, v = self.project(u, rotation)
        row = torch.arange(len(u), device=u.device)
        keys[row, :, lengths], values[row, :, lengths] = k[:, :, 0], v[:, :, 0]
        seen = torch.arange(longest + 1, device=u.device) <= lengths[:, None]
        known = keys[:, :, : longest + 1], values[:, :, : longest + 1]
        return self.attend(q, *known, seen[:, None, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention and output projection.

        Args:
            q: (B, heads, L, head_dim); its last position is the last of the keys.
            k, v: (B, heads, S, head_dim), S >= L.
            bias: Mask (B or 1, 1, L, S), True where a key is seen; None for plain causal.

        Returns:
            (B, L, D).
        """
        L, S = q.shape[2], k.shape[2]
        dropout = self.dropout if self.training else 0.0
        if bias is not None or L == 1:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        elif L == S:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:  # is_causal would align the query with the first keys
            # imported here: it brings the compiler, which takes longer to load than torch
            from torch.nn.attention.bias import causal_lower_right

            lower_right = causal_lower_right(L, S)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=lower_right, dropout_p=dropout)
        return self.output_proj(y.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return f"num_heads={self.num_heads}, rotary_dim={self.rotary_dim}, dropout={self.dropout}"


class BidirectionalAttention(CausalAttention):
    """The same layer without its causal mask: every position sees the whole row.

    Arguments as for `CausalAttention`. It takes and returns no state.
    """

    def forward(  # type: ignore[override]  # there is never a state behind a row
        self,
        u: Float[Tensor, "B L D"],
        state: None = None,
        *,
        mask: Bool[Tensor, "B L"] | Integer[Tensor, "B L"] | None = None,
        cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
        lengths: Integer[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], None]:
        """Mix positions; arguments as in `H3.forward`.

        Raises:
            ValueError: if there is a state, or more than one of `mask`, `cu_seqlens`, `lengths`.
        """
        if state is not None:
            raise ValueError("a bidirectional layer sees the whole row at once: it takes no state")
        if sum(x is not None for x in (mask, cu_seqlens, lengths)) > 1:
            raise ValueError("give one of mask, cu_seqlens and lengths")
        token = torch.arange(u.shape[1], device=u.device)
        positions, bias = token[None], None
        if cu_seqlens is not None:
            owner = torch.searchsorted(cu_seqlens.to(token.dtype)[1:], token, right=True)
            positions, bias = (token - cu_seqlens[owner])[None], owner[:, None] == owner
        elif lengths is not None:
            # a row without anything sees its first position: no NaN
            bias = (token < lengths[:, None].clamp(min=1))[:, None, None]
        elif mask is not None:
            positions = (mask.bool().cumsum(1) - 1).clamp(min=0)
            # a row without anything sees itself: no NaN
            bias = (mask.bool() | ~mask.bool().any(1, keepdim=True))[:, None, None]
        q, k, v = self.project(u, self.rotation(positions))
        return self.attend(q, k, v, bias), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention and output projection; `bias` broadcasts to (B, heads, L, L)."""
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.output_proj(y.transpose(1, 2).flatten(2))


def rotate(
    x: Float[Tensor, "B heads L head_dim"], cos: Tensor, sin: Tensor
) -> Float[Tensor, "B heads L head_dim"]:
    """Rotary embedding of the first 2 * cos.shape[-1] features, first half with second half.

        x1' = x1 cos - x2 sin,   x2' = x2 cos + x1 sin

    Source: Su et al. 2021 (RoFormer), in the pairing of GPT-NeoX. Computed in float32.
    """
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([rotated.to(x.dtype), rest], -1)


def _rotation(positions: Tensor, rotary_dim: int) -> Rotation:
    """Cosine and sine of position * base^(-2i/rotary_dim), (B, 1, L, rotary_dim / 2)."""
    # float64 costs nothing here; in bfloat16 not even positions above 256 are exact
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=wide) / rotary_dim
    angle = positions[:, None, :, None].to(wide) * ROTARY_BASE**-exponent
    return angle.cos().float(), angle.sin().float()
