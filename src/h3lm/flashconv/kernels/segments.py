"""Few channels, long rows: each row is cut into segments that are worked on side by side.

    1. what each segment adds to the state, from zero           reads k and v
    2. the state before each segment                            a scan over segments, one launch
    3. the kernel, each segment from its state

Backwards the same with q and do, from right to left: what a segment adds to the gradient of the
state before it is P^T dy, decayed by the conjugate of decay. The short filter reads across the
border; what it leaves there in the gradient of k is added afterwards.

Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 2, with two levels of chunks.
"""

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
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
    starts, end = _scan(ends, start, operators.decay, k.shape[-1], segments)
    if not with_output and not save_states:  # what is wanted is there
        return k.new_empty(0), end, ends.new_empty(0)
    o, ends, states = kernels.forward(
        q, k, v, operators, carry, starts,
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
    **options: Any,
) -> Gradients:
    """`backward` of the kernels, with their options, in segments."""
    dends = _gradients_behind(do, dend, q, operators, segments)
    grads = kernels.backward(
        do, dends, q, k, v, operators, carry, start, states, segments=segments, **options
    )
    dk, dcarry = grads.k, grads.carry
    heads = len(operators.M) != do.shape[1]  # their kernels filter whole rows
    if operators.F is not None and not heads:
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
    re, im = operators.decay.unbind(-1)
    conjugate = torch.stack([re, -im], -1)
    backwards = operators._replace(F=None, K=operators.P.mT.contiguous(), decay=conjugate)
    gate, gated = (do, None) if q is None else (q, do)
    kernels = chunk_triton if len(operators.M) == do.shape[1] else heads_triton
    _, added, _ = kernels.forward(
        None, gate, gated, backwards, None, None, with_output=False,
        with_end=True, save_states=False, segments=segments, leftwards=True,
    )  # fmt: skip
    return _scan(added, dend, conjugate, do.shape[-1], segments, leftwards=True)[0]


@triton.jit
def power(re, im, exponent):
    """Complex numbers to a power below 2^24, in float64, by the bits of the exponent."""
    out_re = re * 0.0 + 1.0
    out_im = im * 0.0
    for bit in tl.static_range(24):
        odd = (exponent >> bit) % 2 == 1
        next_re = out_re * re - out_im * im
        out_im = tl.where(odd, out_re * im + out_im * re, out_im)
        out_re = tl.where(odd, next_re, out_re)
        re, im = re * re - im * im, 2.0 * re * im
    return out_re.to(tl.float32), out_im.to(tl.float32)


@triton.jit(do_not_specialize=["segments", "chunks", "last_chunks"])
def scan_kernel(
    added, first, states, end, decay, pairs, of_system, segments, chunks, last_chunks,
    MODES: tl.constexpr, LEFTWARDS: tl.constexpr,
):  # fmt: skip
    """The state before each segment of a pair of channels, and behind all of them."""
    row = tl.program_id(0) // pairs
    pair = tl.program_id(0) % pairs
    part = 2 * tl.arange(0, MODES)
    decay_at = decay + pair // of_system * (2 * MODES) + part
    decay_re = tl.load(decay_at).to(tl.float64)
    decay_im = tl.load(decay_at + 1).to(tl.float64)
    through_re, through_im = power(decay_re, decay_im, chunks)
    last_re, last_im = power(decay_re, decay_im, last_chunks)
    end_at = (row * pairs + pair).to(tl.int64) * (2 * MODES) + part
    if first is not None:
        re = tl.load(first + end_at)
        im = tl.load(first + end_at + 1)
    else:
        re = tl.zeros([MODES], tl.float32)
        im = tl.zeros([MODES], tl.float32)
    for step in range(0, segments):
        segment = segments - 1 - step if LEFTWARDS else step
        at = ((row * segments + segment) * pairs + pair).to(tl.int64) * (2 * MODES) + part
        tl.store(states + at, re)
        tl.store(states + at + 1, im)
        over_re = tl.where(segment == segments - 1, last_re, through_re)
        over_im = tl.where(segment == segments - 1, last_im, through_im)
        next_re = over_re * re - over_im * im + tl.load(added + at)
        im = over_re * im + over_im * re + tl.load(added + at + 1)
        re = next_re
    tl.store(end + end_at, re)
    tl.store(end + end_at + 1, im)


def _scan(
    added: Tensor,
    first: Tensor | None,
    decay: Tensor,
    total: int,
    segments: int,
    leftwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """States before segments, from what each adds from zero; behind them, if leftwards.

    Args:
        added: (B segments, pairs, N/2, 2).
        first: The state where the walk begins, (B, pairs, N/2, 2); zero if None.
        decay: Over a chunk, (systems, N/2, 2). Its powers are made in float64.
        total: Length of a row, whose last segment may be shorter.

    Returns:
        The states, as `added`, and the one where the walk ends, as `first`.
    """
    rows, pairs, modes, _ = added.shape
    states, end = torch.empty_like(added), added.new_empty(rows // segments, pairs, modes, 2)
    length = segment_length(total, segments)
    last = total - (segments - 1) * length
    scan_kernel[(rows // segments * pairs,)](
        added, first, states, end, decay, pairs, pairs // decay.shape[0], segments,
        length // CHUNK_LENGTH, last // CHUNK_LENGTH, MODES=modes, LEFTWARDS=leftwards,
        num_warps=1,
    )  # fmt: skip
    return states, end


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
