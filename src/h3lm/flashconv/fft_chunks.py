"""Long rows of a state space model as chunks that are convolved, joined by its state.

    y_c = f * w_c + (row A^(t+1) x_c)_t;   x_{c+1} = A^C x_c + sum_u A^(C-1-u) b w_c[u]

with f the filter of one chunk: the paper's Algorithm 2, for any system with a filter and a state,
diagonal or not. What a chunk leaves and what a state adds are made of blocks by `StateBlocks`.

Source: Fu et al. 2023 (arXiv 2212.14052v3), section 4.2 and Algorithm 2.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from h3lm.flashconv import fft_library
from h3lm.flashconv.fft_library import KeptFilter
from h3lm.ssm.dplr import DPLRSystem
from h3lm.ssm.operators import DiagonalSystem
from h3lm.ssm.state_blocks import StateBlocks, advance, as_complex, as_real, states_between

CHUNK_LENGTH = 8192


@dataclass(frozen=True)
class FFTOperators:
    """What this algorithm makes of a system, for chunks of one length.

    They are what the system was when they were made, as `ChunkOperators` are.

    Attributes:
        system: The system.
        chunk_length: C.
        filter: The filter of a chunk, with the skip.
    """

    system: DiagonalSystem | DPLRSystem
    chunk_length: int
    filter: KeptFilter
    # not a cached property: the compiler does not look through its lock
    _kept: dict[str, StateBlocks] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of states as real numbers."""
        return self.system.skip.dtype

    @property
    def blocks(self) -> StateBlocks:
        """From inputs of a chunk to a state, and back."""
        if "blocks" not in self._kept:
            made = StateBlocks.of(self.system.dense(), self.chunk_length, self.dtype)
            self._kept["blocks"] = made
        return self._kept["blocks"]

    def power(self, length: int) -> Tensor:
        """A to a length, float64."""
        return torch.linalg.matrix_power(self.system.dense()[0], length)


def fft_operators(
    system: DiagonalSystem | DPLRSystem, length: int, chunk_length: int = CHUNK_LENGTH
) -> FFTOperators:
    """Make the operators for rows of about `length` positions, in chunks of up to `chunk_length`.

    Longer rows take them too, in more chunks.

    Raises:
        ValueError: if a length is not positive.
    """
    if min(length, chunk_length) < 1:
        raise ValueError(f"length={length} and chunk_length={chunk_length} must be positive")
    chunk_length = min(length, chunk_length)
    with torch.autocast(system.skip.device.type, enabled=False):
        taps = system.filter(chunk_length)
    return FFTOperators(system, chunk_length, KeptFilter(taps, skip=system.skip))


def ssm_conv(
    u: Tensor,
    operators: FFTOperators,
    *,
    backend: str,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    with_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`flashconv.ssm_conv`, left to right, by chunks.

    Args:
        u, pre_gate, post_gate, initial_state: As there.
        operators: Of the system.
        backend: "torch" or "triton": what convolves.
        with_state: Whether the final state is made.
    """
    with torch.autocast(u.device.type, enabled=False):
        rows = _Rows(u, pre_gate, post_gate)
        C, L = operators.chunk_length, u.shape[-1]
        state = None if initial_state is None else as_real(initial_state).to(operators.dtype)
        outputs, done = [], 0
        if L >= 2 * C:
            done = L // C * C
            y, state = _joined(rows.part(0, done).chunks(C), operators, backend, state, done // C)
            outputs.append(y)
        for start in range(done, L, C):
            wanted = with_state or start + C < L
            y, state = _one(rows.part(start, start + C), operators, backend, state, wanted)
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y, as_complex(state) if with_state and state is not None else None


class _Rows(NamedTuple):
    """Inputs (B, H, L) and their gates."""

    u: Tensor
    pre: Tensor | None
    post: Tensor | None

    def part(self, start: int, end: int) -> "_Rows":
        """Positions from `start` to `end`."""
        return self._each(lambda x: x[..., start:end])

    def chunks(self, C: int) -> "_Rows":
        """Chunks as rows, (B count, H, C)."""
        return self._each(lambda x: x.unflatten(-1, (-1, C)).transpose(1, 2).flatten(0, 1))

    def _each(self, cut: Callable[[Tensor], Tensor]) -> "_Rows":
        pre, post = (None if x is None else cut(x) for x in (self.pre, self.post))
        return _Rows(cut(self.u), pre, post)

    def gated(self, dtype: torch.dtype) -> Tensor:
        """What the system sees."""
        u = self.u.to(dtype)
        return u if self.pre is None else u * self.pre.to(dtype)


def _one(
    rows: _Rows, operators: FFTOperators, backend: str, state: Tensor | None, with_state: bool
) -> tuple[Tensor, Tensor | None]:
    """One chunk, or a part of one, behind a state."""
    L = rows.u.shape[-1]
    y = _convolved(rows, operators, backend)
    if state is not None:
        y = _added(y, operators.blocks.response(state, L), rows.post)
    if not with_state:
        return y, None
    end = operators.blocks.end_state(rows.gated(operators.dtype))
    if state is not None:
        end = end + advance(operators.power(L).to(state.dtype), state)
    return y, end


def _joined(
    rows: _Rows, operators: FFTOperators, backend: str, state: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """All full chunks side by side, (B count, H, C); returns (B, H, count C) and the end state."""
    C = rows.u.shape[-1]
    y = _convolved(rows, operators, backend)
    ends = operators.blocks.end_state(rows.gated(operators.dtype)).unflatten(0, (-1, count))
    start = torch.zeros_like(ends[:, 0]) if state is None else state
    states = states_between(start, ends, operators.power(C))
    y = _added(y, operators.blocks.response(states[:, :-1].flatten(0, 1), C), rows.post)
    return y.unflatten(0, (-1, count)).transpose(1, 2).flatten(-2), states[:, -1]


def _convolved(rows: _Rows, operators: FFTOperators, backend: str) -> Tensor:
    return fft_library.fft_conv_kept(
        rows.u, operators.filter, backend=backend, pre_gate=rows.pre, post_gate=rows.post
    )


def _added(y: Tensor, response: Tensor, post: Tensor | None) -> Tensor:
    return (y + (response if post is None else response * post.to(response.dtype))).to(y.dtype)
