"""Linear attention, in the forms that are one function: sums, chunks, recurrence, SSM.

Inside, a one is appended to every value: the last column of the result is then the denominator,
and numerator and denominator are one and the same state space model, S_t = S_{t-1} + k_t v_t^T,
o_t = S_t^T q_t.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from h3lm.layers.unpad import check_mask

EPSILON = 1e-6
CHUNK_LENGTH = 64
Form = Literal["chunks", "sums", "recurrence"]
FORMS: tuple[Form, ...] = ("chunks", "sums", "recurrence")


class LinearAttentionState(NamedTuple):
    """What linear attention remembers of everything before a position.

    Attributes:
        memory: Sums of k v^T and, as the last column, of k: (B, heads, d_k, d_v + 1), float32
            (float64 in float64); (S, ...) with `cu_seqlens`.
    """

    memory: Tensor


class LinearAttention(nn.Module):
    """Causal attention with the similarity phi(q)^T phi(k) in place of its exponential.

        y_t = phi(q_t)^T sum_s phi(k_s) v_s^T / (phi(q_t)^T sum_s phi(k_s) + 1e-6),  s <= t
        phi(x) = elu(x) + 1

    Source: Katharopoulos et al. 2020. No scale: it would cancel. Sums are float32 for half
    inputs.

    Args:
        d_model: Width D.
        num_heads: Number of heads; divides d_model.
        bias: Whether the projections have a bias.

    Raises:
        ValueError: if num_heads does not divide d_model.
    """

    def __init__(self, d_model: int, num_heads: int = 1, *, bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide d_model={d_model}")
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, d_model // num_heads
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.output_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        u: Float[Tensor, "B L D"],
        state: LinearAttentionState | None = None,
        *,
        mask: Bool[Tensor, "B L"] | Integer[Tensor, "B L"] | None = None,
        cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], LinearAttentionState]:
        """Mix positions; arguments as in `H3.forward`.

        Raises:
            ValueError: if both `mask` and `cu_seqlens` are given, or a mask is not (B, L).
        """
        if mask is not None and cu_seqlens is not None:
            raise ValueError("give mask or cu_seqlens, not both")
        if mask is not None:
            check_mask(mask.shape, *u.shape[:2])
        with torch.autocast(u.device.type, enabled=False):
            q, k, v = (
                x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
                for x in self.qkv_proj(u.to(self.qkv_proj.weight.dtype)).chunk(3, -1)
            )
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k, v = feature_map(q.to(wide)), feature_map(k.to(wide)), v.to(wide)
            if mask is not None:  # no state decays: a key of zero is a position that is not there
                k = k * mask.to(wide)[:, None, :, None]
            start = None if state is None else state.memory
            if cu_seqlens is None:
                y, end = linear_attention(q, k, v, initial_state=start)
            else:
                y, end = _packed(q, k, v, start, cu_seqlens)
        y = y.transpose(1, 2).flatten(2).to(u.dtype)
        return self.output_proj(y), LinearAttentionState(end)

    @staticmethod
    def pack_state(state: LinearAttentionState) -> tuple[None, Tensor]:
        """State as the two tensors that a cache stores; there is no shift part."""
        return None, state.memory

    @staticmethod
    def unpack_state(conv: Tensor | None, recurrent: Tensor) -> LinearAttentionState:
        """Inverse of `pack_state`."""
        return LinearAttentionState(recurrent)

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return f"num_heads={self.num_heads}"


def feature_map(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """elu(x) + 1: x + 1 above zero, exp(x) below, with a finite gradient everywhere."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def linear_attention(
    q: Float[Tensor, "B H L d_k"],
    k: Float[Tensor, "B H L d_k"],
    v: Float[Tensor, "B H L d_v"],
    *,
    initial_state: Float[Tensor, "B H d_k d_v_plus_1"] | None = None,
    form: Form = "chunks",
    chunk_length: int = CHUNK_LENGTH,
) -> tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "B H d_k d_v_plus_1"]]:
    """Normalised linear attention over features.

    Args:
        q: Features of the queries, not raw ones; non-negative where the result is to be a mean.
        k: Features of the keys.
        v: Values.
        initial_state: Sums before position 0; zero if None.
        form: "chunks", "sums" or "recurrence": the same function.
        chunk_length: Length of a chunk.

    Returns:
        The output and the sums after the last position.

    Raises:
        ValueError: if the form is unknown.
    """
    extended = F.pad(v, (0, 1), value=1.0)
    both, state = accumulate(
        q, k, extended, initial_state=initial_state, form=form, chunk_length=chunk_length
    )
    return both[..., :-1] / (both[..., -1:] + EPSILON), state


def accumulate(
    q: Float[Tensor, "B H L d_k"],
    k: Float[Tensor, "B H L d_k"],
    v: Float[Tensor, "B H L d_v"],
    *,
    initial_state: Float[Tensor, "B H d_k d_v"] | None = None,
    form: Form = "chunks",
    chunk_length: int = CHUNK_LENGTH,
) -> tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "B H d_k d_v"]]:
    """The linear part, S_t = S_{t-1} + k_t v_t^T and o_t = S_t^T q_t, without normalisation.

    Source: Katharopoulos et al. 2020, section 3.3; Fu et al. 2023, Appendix B.

    Raises:
        ValueError: if the form is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not one of {', '.join(FORMS)}")
    state = initial_state
    if state is None:
        state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    if form == "sums":
        sums = state[:, :, None] + (k[..., :, None] * v[..., None, :]).cumsum(2)
        return (q[..., None, :] @ sums)[..., 0, :], torch.cat([state[:, :, None], sums], 2)[
            :, :, -1
        ]
    if form == "recurrence":
        outputs = []
        for t in range(q.shape[2]):
            state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
            outputs.append((q[:, :, t, None] @ state)[..., 0, :])
        return torch.stack(outputs, 2) if outputs else v, state
    return _chunks(q, k, v, state, chunk_length)


def time_varying_ssm(
    q: Float[Tensor, "L d_k"], k: Float[Tensor, "L d_k"], d_v: int
) -> tuple[Float[Tensor, "L N N"], Float[Tensor, "L N d_v"], Float[Tensor, "L d_v N"]]:
    """`accumulate` as a linear time-varying state space model, written out.

        x_t = A_t x_{t-1} + B_t v_t;   o_t = C_t x_t;   x = vec(S), N = d_k d_v
        A_t = I;   B_t = k_t (x) I;   C_t = q_t^T (x) I                      (Kronecker products)

    H3 makes it time-invariant: a learned diagonal A in place of I, a filter on k in place of the
    feature map, and k and q as gates around the system instead of inside B and C.
    Source: Fu et al. 2023 (arXiv 2212.14052v3), Appendix B.

    Args:
        q: Features of the queries of one head of one row.
        k: Features of the keys.
        d_v: Width of the values.

    Returns:
        A, B and C at each position.
    """
    L, d_k = k.shape
    identity = torch.eye(d_v, dtype=k.dtype, device=k.device)
    A = torch.eye(d_k * d_v, dtype=k.dtype, device=k.device).expand(L, -1, -1)
    B = torch.einsum("ti,jm->tijm", k, identity).reshape(L, d_k * d_v, d_v)
    C = torch.einsum("ti,jm->tjim", q, identity).reshape(L, d_v, d_k * d_v)
    return A, B, C


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, chunk_length: int
) -> tuple[Tensor, Tensor]:
    """All chunks side by side: within by a masked product, before by a sum over chunks."""
    L = q.shape[2]
    T = min(chunk_length, max(L, 1))
    count = -(-L // T)
    if count * T > L:  # a padded key is zero: it adds nothing
        q, k, v = (F.pad(x, (0, 0, 0, count * T - L)) for x in (q, k, v))
    q, k, v = (x.unflatten(2, (count, T)) for x in (q, k, v))
    sums = (k.mT @ v).cumsum(2) + state[:, :, None]
    before = torch.cat([state[:, :, None], sums], 2)
    y = (q @ k.mT).tril() @ v + q @ before[:, :, :-1]
    return y.flatten(2, 3)[:, :, :L], before[:, :, -1]


def _packed(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Sequences of one row laid under each other, short ones padded with keys of zero."""
    lengths = cu_seqlens.diff()
    column = torch.arange(int(lengths.max()), device=q.device)
    valid = column < lengths[:, None]
    source = torch.where(valid, cu_seqlens[:-1, None] + column, 0)
    q, k, v = (x[0][:, source].transpose(0, 1) for x in (q, k, v))
    k = k * valid[:, None, :, None]
    y, end = linear_attention(q, k, v, initial_state=state)
    return y.transpose(0, 1)[:, valid][None], end
