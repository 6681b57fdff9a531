"""From inputs to a state and from a state to outputs, over many positions at once."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64  # inputs that one matrix carries into the state

Dense = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class StateBlocks:
    """The matrices that a dense system x_t = A x_{t-1} + b u_t, y_t = row x_t needs for that.

        into[:, u] = A^(T-1-u) b        out[t] = row A^(t+1)        powers[j] = A^(T 2^j)

    Blocks of T inputs become states by one product, and neighbours are joined pairwise; a state
    spreads the same way backwards. Powers start at 1 in `out`: its state stands before its first
    position. All are made in float64 by repeated squaring, then rounded.
    Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 2.

    Attributes:
        into: (H, N, T).
        out: (H, T, N).
        powers: (H, N, N) each; of as many positions as the longest row needs.
    """

    into: Tensor
    out: Tensor
    powers: tuple[Tensor, ...]

    @classmethod
    def of(cls, dense: Dense, length: int, dtype: torch.dtype) -> "StateBlocks":
        """Make them for rows of up to `length` positions.

        Args:
            dense: A (H, N, N), b (H, N) and row (H, N), as `DPLRSystem.dense` gives them.
            length: Positions, at least 1.
            dtype: What they are rounded to.
        """
        power, b, row = dense
        into, out = b[..., None], (row[:, None] @ power)
        while into.shape[-1] < min(BLOCK, length):
            into = torch.cat([power @ into, into], -1)
            out = torch.cat([out, out @ power], 1)
            power = power @ power
        powers = [power]
        while into.shape[-1] << len(powers) < length:
            powers.append(powers[-1] @ powers[-1])
        return cls(into.to(dtype), out.to(dtype), tuple(x.to(dtype) for x in powers))

    def end_state(self, u: Float[Tensor, "B H L"]) -> Float[Tensor, "B H N"]:
        """The state after the inputs, from a state of zero."""
        levels = self._levels(u.shape[-1])
        T = self.into.shape[-1]
        rows = u.transpose(0, 1).to(self.into.dtype)
        padded = F.pad(rows, ((T << levels) - u.shape[-1], 0))
        partial = per_head(padded.unflatten(-1, (1 << levels, T)), self.into)  # [H, B, blocks, N]
        for power in self.powers[:levels]:
            partial = per_head(partial[..., ::2, :], power) + partial[..., 1::2, :]
        return partial[..., 0, :].transpose(0, 1)

    def response(self, state: Float[Tensor, "B H N"], length: int) -> Float[Tensor, "B H L"]:
        """What a state before the first of `length` positions adds to their outputs."""
        spread = state.transpose(0, 1).to(self.out.dtype)[..., None, :]  # [H, B, blocks, N]
        for power in reversed(self.powers[: self._levels(length)]):
            spread = torch.stack([spread, per_head(spread, power)], -2).flatten(-3, -2)
        return per_head(spread, self.out).flatten(-2)[..., :length].transpose(0, 1)

    def _levels(self, length: int) -> int:
        blocks = -(-length // self.into.shape[-1])
        return max(0, blocks - 1).bit_length()


def advance(
    power: Float[Tensor, "H N N"], state: Float[Tensor, "*B H N"]
) -> Float[Tensor, "*B H N"]:
    """A power of A times states."""
    return per_head(state.movedim(-2, 0)[:, None], power)[:, 0].movedim(0, -2)


def per_head(
    x: Float[Tensor, "H *rows in_"], matrix: Float[Tensor, "H out in_"]
) -> Float[Tensor, "H *rows out"]:
    """A matrix for each system applied to the last axis of all its rows.

    One product for each system: with rows outside, a batched product would copy the matrices once
    for each row.
    """
    return (x.flatten(1, -2) @ matrix.mT).unflatten(1, x.shape[1:-1])


def states_between(
    start: Float[Tensor, "B H N"], ends: Float[Tensor, "B count H N"], power: Float[Tensor, "H N N"]
) -> Float[Tensor, "B more H N"]:
    """States before each chunk and behind the last, from what each chunk leaves by itself.

        x_0 = start;   x_{c+1} = power x_c + ends_c

    Source: the same, line 7; in log2(count) steps of doubling reach instead of one after another.

    Args:
        start: State before the first chunk, (B, H, N).
        ends: Of each chunk, (B, count, H, N).
        power: A to the length of a chunk, (H, N, N), float64 for many chunks.
    """
    states = torch.cat([start[:, None], ends], 1)
    reach = 1
    while reach < states.shape[1]:
        moved = advance(power.to(states.dtype), states[:, :-reach])
        states = states + F.pad(moved, (0, 0, 0, 0, reach, 0))
        power, reach = power @ power, 2 * reach
    return states


def as_real(state: Tensor) -> Tensor:
    """(..., N/2) complex -> (..., N): real parts, then imaginary ones."""
    return torch.cat([state.real, state.imag], -1)


def as_complex(state: Tensor) -> Tensor:
    """The inverse of `as_real`."""
    return torch.complex(*state.chunk(2, -1))
