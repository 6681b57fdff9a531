"""What mixers around a linear time-invariant system share: state, masks, packing, single steps."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from h3lm import flashconv
from h3lm.flashconv import FFTOperators
from h3lm.flashconv.fft_chunks import CHUNK_LENGTH
from h3lm.flashconv.state import as_real_pairs, from_real_pairs
from h3lm.layers.prepared import Prepared, PreparingModule
from h3lm.layers.unpad import Unpadded
from h3lm.ssm import ChunkOperators
from h3lm.ssm.dplr import DPLRSystem
from h3lm.ssm.operators import DEFAULT_CHUNK_LENGTH

System = ChunkOperators | DPLRSystem
MAX_WHOLE_LENGTH = 1 << 16  # of a filter: making one takes many float64 numbers for each tap


class RecurrentState(NamedTuple):
    """What a system remembers of everything before a position.

    Attributes:
        modes: (B, H, modes), complex64 (complex128 in float64); (S, ...) with `cu_seqlens`.
    """

    modes: Tensor


class Recurrence(PreparingModule):
    """Base of mixers that run one state space model for each channel.

    A subclass has its projections and calls `mix` between them.

    Attributes:
        chunk_length: Inputs of a chunk of state passing; rows that are always shorter run faster
            with a shorter one.
        backend: Implementation of the convolution, see `flashconv.ssm_conv`.
    """

    chunk_length: int = DEFAULT_CHUNK_LENGTH
    backend: str = "auto"

    def __init__(self) -> None:
        super().__init__()
        self._prepared: Prepared[System] = Prepared()
        self._prepared_filters: Prepared[dict[tuple[int, int], FFTOperators]] = Prepared()

    def system(self) -> System:
        """What `mix` runs; a subclass makes it from its parameters, in float32."""
        raise NotImplementedError

    def mix(
        self,
        u: Tensor,
        state: RecurrentState | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        with_state: bool = True,
    ) -> tuple[Tensor, RecurrentState | None]:
        """Run the system over (B, H, L); arguments as in `H3.forward`.

        Raises:
            ValueError: if both `mask` and `cu_seqlens` are given.
        """
        system = self.prepared_system()
        if mask is not None and cu_seqlens is not None:
            raise ValueError("give mask or cu_seqlens, not both")
        if u.shape[-1] == 1 and cu_seqlens is None:
            return _step(u, system, state, mask)
        if mask is None:
            whole = state is None and not with_state
            operators = self._operators(u, cu_seqlens, whole)
            return convolve(u, operators, state, cu_seqlens, self.backend, with_state)
        if state is None:
            state = zero_state(u, system)

        def run(s: RecurrentState, cu: Tensor, packed: Tensor) -> tuple[Tensor, RecurrentState]:
            y, end = convolve(packed, self._operators(packed, cu), s, cu, self.backend)
            assert end is not None
            return y, end

        y, end = Unpadded(mask).run(run, state, (u,))
        return y, end if with_state else None

    def prepared_system(self) -> System:
        """The system, reused in eval mode."""
        return self._prepared.get(self, self._make_system)

    def _operators(
        self, u: Tensor, cu_seqlens: Tensor | None, whole: bool = False
    ) -> System | FFTOperators:
        """What the op takes: a system without a scan also needs a filter as long as the rows.

        Where no state comes in or goes out, one of the whole rows: chunks would be joined by
        states, which cost more than the transforms.
        """
        system = self.prepared_system()
        if not isinstance(system, DPLRSystem) or u.shape[-1] == 0:
            return system
        length = filter_length(spans_of(cu_seqlens, u.shape[-1]))
        chunk = length if whole and length <= MAX_WHOLE_LENGTH else CHUNK_LENGTH
        kept = self._prepared_filters.get(self, dict)
        if (length, chunk) not in kept:
            kept.clear()
            kept[length, chunk] = flashconv.fft_operators(system, length, chunk)
        return kept[length, chunk]

    def _make_system(self) -> System:
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self.system()

    @staticmethod
    def pack_state(state: RecurrentState) -> tuple[None, Tensor]:
        """State as the two tensors that a cache stores; there is no shift part."""
        return None, as_real_pairs(state.modes)

    @staticmethod
    def unpack_state(conv: Tensor | None, recurrent: Tensor) -> RecurrentState:
        """Inverse of `pack_state`."""
        return RecurrentState(from_real_pairs(recurrent))


def convolve(
    u: Tensor,
    system: System | FFTOperators,
    state: RecurrentState | None,
    cu_seqlens: Tensor | None,
    backend: str = "auto",
    with_state: bool = True,
) -> tuple[Tensor, RecurrentState | None]:
    """All positions of (B, H, L) at once, left to right, and the state behind them if wanted."""
    start = None if state is None else state.modes
    y, end = flashconv.ssm_conv(
        u, system,
        initial_state=start, return_final_state=with_state, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip
    return y, None if end is None else RecurrentState(end)


def zero_state(u: Tensor, system: System) -> RecurrentState:
    """The state before anything was seen, for inputs like `u`."""
    modes = system.eigenvalues if isinstance(system, DPLRSystem) else system.system.a
    return RecurrentState(modes.new_zeros(u.shape[0], *modes.shape))


def spans_of(cu_seqlens: Tensor | None, length: int) -> list[slice]:
    """The positions of each packed sequence; the whole row if there are none."""
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    return [slice(start, end) for start, end in pairwise(bounds)]


def filter_length(spans: list[slice]) -> int:
    """Length of a filter for these positions; without gradients one that more rows share."""
    longest = max(1, *(span.stop - span.start for span in spans))
    return longest if torch.is_grad_enabled() else 1 << (longest - 1).bit_length()


def _step(
    u: Tensor, system: System, state: RecurrentState | None, mask: Tensor | None
) -> tuple[Tensor, RecurrentState]:
    if state is None:
        state = zero_state(u, system)
    step = system.step if isinstance(system, DPLRSystem) else system.system.step
    with torch.autocast(u.device.type, enabled=False):
        y, new = step(u[..., 0], state.modes)
    if mask is not None:
        new = torch.where(mask.bool()[:, :, None], new, state.modes)
    return y[..., None], RecurrentState(new)
