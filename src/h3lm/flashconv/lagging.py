"""Steps of the H3 core whose diagonal states lag behind: they are moved once in eight steps.

A step that moves every state reads and writes 512 bytes of it for each channel, to add one number.
Here the state stays as it was when a block of `BLOCK` steps began, and a step takes from it what
it would answer by itself, made for the whole block in one go, and adds what the block's own inputs
answer, which is a short convolution:

    x_{p+m+1} = a^{m+1} x_p + sum_{j<=m} a^{m-j} b w_{p+j}
    y_{p+m} = 2 Re(c a^{m+1} x_p) + sum_{j<=m} h_{m-j} w_{p+j},   h_j = 2 Re(c a^j b) + skip [j=0]

The same holds for the shift SSM and the values of k in front of the block. Blocks of an eighth of
the channels begin one step after those of the eighth before it, so that every step moves as many
states. This module is the definition in plain PyTorch; `kernels.step_lagging` is the kernel.

Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 1, as a recurrence; the split of a
convolution by the age of its inputs is that of Oncescu et al. 2024 (arXiv 2410.12982).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from h3lm.flashconv.state import as_real_pairs, from_real_pairs
from h3lm.ssm.operators import DiagonalSystem

if TYPE_CHECKING:
    from h3lm.flashconv.step import RingState, StepOperators

BLOCK = 8  # steps between two moves of a state
GROUP = 32  # channels of which an eighth of them is made
FROM_ROWS = 2  # rows from which it pays: the states of one are little beside the weights


def response(system: DiagonalSystem) -> Tensor:
    """What an input answers in the steps of a block, h_j, (BLOCK, H), float32."""
    a, b, c = (z.to(torch.complex128) for z in (system.a, system.b, system.c))
    rows, now = [], c * b
    for _ in range(BLOCK):
        rows.append(2 * now.sum(-1).real)
        now = now * a
    rows[0] = rows[0] + system.skip
    return torch.stack(rows).to(system.skip.dtype)


def innermost(x: Tensor, channels: int) -> Tensor:
    """The same values, in memory that has dimension `channels` innermost."""
    return x.movedim(channels, -1).contiguous().movedim(-1, channels)


def takes(head_dim: int, channels: int, n_taps: int) -> bool:
    """Whether states may lag behind."""
    return head_dim == 1 and channels % GROUP == 0 and n_taps >= BLOCK


def new_recent(rows: int, channels: int, like: Tensor) -> Tensor:
    """Room for `RingState.recent`; what is in it does not matter at position 0."""
    return like.new_zeros(rows, 2, BLOCK, channels)


def slots(position: Tensor, channels: int) -> Tensor:
    """Which step of its block each channel is at, (B, D)."""
    group = torch.arange(channels, device=position.device) // GROUP
    return (position[:, None] + group * BLOCK // (channels // GROUP)) % BLOCK


def caught_up(state: "RingState", operators: "StepOperators") -> Tensor:
    """The diagonal state behind all steps so far, (B, D, N/2), complex; `state` stays as it is."""
    assert state.recent is not None
    position = state.position[:, None]
    slot = slots(state.position, state.recent.shape[3])
    end = torch.where(slot == 0, BLOCK, slot)
    first = end - position.clamp(max=end)
    a, b = (from_real_pairs(z) for z in (operators.a, operators.b))
    x = from_real_pairs(state.diagonal)
    for j in range(BLOCK):
        use = (first <= j) & (j < end)
        x = torch.where(use[..., None], a * x + b * state.recent[:, 1, j, :, None], x)
    return x


def h3_step(
    q: Tensor, k: Tensor, v: Tensor, operators: "StepOperators", state: "RingState"
) -> Tensor:
    """`flashconv.h3_step_in_place` in plain PyTorch for a state with `recent`; heads of one."""
    assert state.recent is not None
    assert operators.response is not None
    wide, n_taps = operators.taps.dtype, state.ring.shape[2]
    position, free = state.position[:, None], state.recent
    slot = slots(state.position, k.shape[1])
    renew = (slot == 0) | (position == 0)
    a, c = (from_real_pairs(z) for z in (operators.a, operators.c))
    x = caught_up(state, operators)
    state.diagonal.copy_(torch.where(renew[..., None, None], as_real_pairs(x), state.diagonal))

    ages = torch.arange(1, n_taps, device=k.device)
    old = state.ring.gather(2, _ring_slots(state, ages)).to(wide)  # the newest first
    for m in range(BLOCK):
        x = a * x
        shifted = (old[..., : n_taps - 1 - m] * operators.taps[:, 1 + m :]).sum(-1)
        answers = torch.stack([shifted, 2 * (c * x).sum(-1).real], 1)
        at = (slot + m).clamp(max=BLOCK - 1)[:, None, None].expand(-1, 2, -1, -1)
        kept = torch.where(
            (renew & (slot + m < BLOCK))[:, None], answers, free.gather(2, at)[:, :, 0]
        )
        free.scatter_(2, at, kept[:, :, None])

    here = slot[:, None]
    s, y = free[:, 0].gather(1, here)[:, 0], free[:, 1].gather(1, here)[:, 0]
    seen = position.clamp(max=slot)  # steps of the block so far
    s = s + operators.taps[:, 0] * k.to(wide)
    for j in range(1, BLOCK):
        before = (here - j).clamp(min=0)
        s = s + torch.where(j <= seen, operators.taps[:, j] * old[..., j - 1], 0)
        y = y + torch.where(
            j <= seen, operators.response[j] * free[:, 1].gather(1, before)[:, 0], 0
        )
    w = s * v.to(wide)
    y = y + operators.response[0] * w
    free[:, 1].scatter_(1, here, w[:, None].to(free.dtype))
    newest = _ring_slots(state, torch.zeros_like(ages[:1]))
    state.ring.scatter_(2, newest, k[..., None].to(state.ring.dtype))
    return (q.to(wide) * y).to(q.dtype)


def _ring_slots(state: "RingState", ages: Tensor) -> Tensor:
    """Where a ring has the values of so many steps ago, (B, D, ages)."""
    at = (state.position[:, None] - ages) % state.ring.shape[2]
    return at[:, None].expand(-1, state.ring.shape[1], -1)
