"""Few channels, long rows: each row is cut into segments that are worked on side by side.

    1. what each segment adds to the state, from zero           reads k and v
    2. the state before each segment                            a scan over segments
    3. the kernel, each segment from its state

Backwards the same with q and do, from right to left: what a segment adds to the gradient of the
state before it is P^T dy, decayed by the conjugate of decay. The short filter reads across the
border; what it leaves there in the gradient of k is added afterwards.

Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 2, with two levels of chunks.
"""

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from h3lm.flashconv.kernels import chunk_triton, heads_triton
from h3lm.flashconv.kernels.launch import CHUNK_LENGTH, Gradients, Operators, segment_length


def forward(
    kernels: ModuleType,
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    operators: Operators,
    carry: Tensor | None,
    start: Tensor | None,
    *,
    segments: int,
    with_output: bool,
    with_end: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` of the kernels, in segments; the saved states are those of segments."""
    _, ends, _ = kernels.forward(
        None, k, v, operators, carry, None,
        with_output=False, with_end=True, save_states=False, segments=segments,
    )  # fmt: skip
    added = ends.unflatten(0, (-1, segments))
    first = torch.zeros_like(added[:, :1]) if start is None else start[:, None]
    chunks = segment_length(k.shape[-1], segments) // CHUNK_LENGTH
    starts = _scan(torch.cat([first, added[:, :-1]], 1), operators.decay, chunks)
    if not with_output and not save_states:  # what is wanted is there
        end = added[:, -1] + _through_last(starts[:, -1], operators.decay, k.shape[-1], segments)
        return k.new_empty(0), end, ends.new_empty(0)
    o, ends, states = kernels.forward(
        q, k, v, operators, carry, starts.flatten(0, 1),
        with_output=with_output, with_end=with_end, save_states=save_states, segments=segments,
    )  # fmt: skip
    return o, ends[segments - 1 :: segments].clone() if with_end else ends, states


def backward(
    kernels: ModuleType,
    do: Tensor,
    dend: Tensor | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    operators: Operators,
    carry: Tensor | None,
    start: Tensor | None,
    states: Tensor,
    *,
    segments: int,
) -> Gradients:
    """`backward` of the kernels, in segments."""
    dends = _gradients_behind(do, dend, q, operators, segments)
    grads = kernels.backward(do, dends, q, k, v, operators, carry, start, states, segments=segments)
    dk, dcarry = grads.k, grads.carry
    if operators.F is not None and kernels is not heads_triton:  # those filter whole rows
        dk = _add_across_borders(dk, dcarry, operators.F, segments)
        dcarry = None if carry is None else dcarry[::segments].clone()
    return replace(
        grads,
        k=dk,
        carry=dcarry,
        start=None if start is None else grads.start[::segments].clone(),
    )


def _gradients_behind(
    do: Tensor,
    dend: Tensor | None,
    q: Tensor | None,
    operators: Operators,
    segments: int,
) -> Tensor:
    """Gradient of the state behind each segment, (B segments, D, N/2, 2)."""
    conjugate = operators.decay * operators.decay.new_tensor([1.0, -1.0])
    backwards = operators._replace(F=None, K=operators.P.mT.contiguous(), decay=conjugate)
    gate, gated = (do, None) if q is None else (q, do)
    kernels = chunk_triton if len(operators.M) == do.shape[1] else heads_triton
    _, added, _ = kernels.forward(
        None, gate, gated, backwards, None, None, with_output=False,
        with_end=True, save_states=False, segments=segments, leftwards=True,
    )  # fmt: skip
    added = added.unflatten(0, (-1, segments))
    length = segment_length(do.shape[-1], segments)
    last = torch.zeros_like(added[:, -1]) if dend is None else dend
    through = _through_last(last, conjugate, do.shape[-1], segments)
    from_right = torch.cat([(added[:, -1] + through)[:, None], added[:, 1:-1].flip(1)], 1)
    behind = _scan(from_right, conjugate, length // CHUNK_LENGTH).flip(1)
    return torch.cat([behind, last[:, None]], 1).flatten(0, 1)


def _through_last(state: Tensor, decay: Tensor, total: int, segments: int) -> Tensor:
    """A state decayed over the full chunks of the last segment."""
    length = total - (segments - 1) * segment_length(total, segments)
    both = torch.stack([state, torch.zeros_like(state)], 1)
    return _scan(both, decay, length // CHUNK_LENGTH)[:, 1]


def _scan(added: Tensor, decay: Tensor, chunks: int) -> Tensor:
    """y_g = sum_{j <= g} decay^(chunks (g - j)) added_j for (B, G, pairs, N/2, 2).

    Powers are made in float64, as those of `DiagonalSystem`; the sums are taken in one order.
    """
    G = added.shape[1]
    lag = torch.arange(G, device=added.device)
    lag = lag[:, None] - lag[None, :]
    wide = torch.view_as_complex(decay.double())
    zero = wide == 0
    log = torch.log(torch.where(zero, 1.0, wide))
    steps = lag.clamp(min=0) * chunks
    powers = torch.exp(log[:, :, None, None] * steps)  # [systems, N/2, G, G]
    counts = (lag >= 0) & ~(zero[:, :, None, None] & (steps > 0))
    powers = torch.where(counts, powers, 0.0).to(torch.complex64).permute(2, 3, 0, 1)
    x = torch.view_as_complex(added.contiguous())
    x = x.unflatten(2, (decay.shape[0], -1))  # [B, G, systems, pairs of one, N/2]
    y = (powers[None, :, :, :, None] * x[:, None]).sum(2)
    return torch.view_as_real(y.flatten(2, 3))


def _add_across_borders(dk: Tensor, ds: Tensor, F: Tensor, segments: int) -> Tensor:
    """Add F_m^T ds to the last chunks of each segment, with ds of the first ones of the next."""
    length = segment_length(dk.shape[-1], segments)
    reach = F.shape[1] - 1
    ds = ds.unflatten(0, (-1, segments))[:, 1:]
    ds = ds.permute(2, 0, 1, 3).unflatten(-1, (reach, -1))  # [D, B, borders, reach, T]
    wide = F.to(ds.dtype)
    back = []
    for ago in reversed(range(reach)):
        terms = [ds[:, :, :, m - 1 - ago] @ wide[:, None, m] for m in range(ago + 1, reach + 1)]
        back.append(torch.stack(terms).sum(0))
    added = torch.cat(back, -1).permute(1, 0, 2, 3)  # [B, D, borders, reach T]
    borders = length * torch.arange(1, segments, device=dk.device)[:, None]
    at = borders + torch.arange(-reach * CHUNK_LENGTH, 0, device=dk.device)
    at = at.flatten()
    dk[..., at] = (dk[..., at] + added.flatten(2)).to(dk.dtype)
    return dk
