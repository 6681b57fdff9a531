"""Systems that run over a row in both directions: a position sees what comes after it too.

    y_t = sum_{s<=t} K[t-s] u_s + sum_{s>t} Kb[s-t-1] u_s + skip u_t

K and Kb come from one A, B and dt, each with a C of its own. The backward filter starts at the
next position, so that the present is counted once. There is no recurrent form, and no state.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from h3lm import flashconv
from h3lm.flashconv import KeptFilter
from h3lm.layers.recurrence import System, filter_length, spans_of
from h3lm.layers.unpad import Unpadded
from h3lm.ssm import ChunkOperators
from h3lm.ssm.dplr import DPLRSystem
from h3lm.ssm.hints import SSMModule


class BackwardReadout(SSMModule):
    """The second C of a bidirectional system, (H, N/2, 2); complex normal, E|C|^2 = 1."""

    def __init__(self, num_systems: int, num_modes: int) -> None:
        super().__init__()
        self.C = nn.Parameter(torch.empty(num_systems, num_modes, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw anew, from torch's generator."""
        nn.init.normal_(self.C, std=0.5**0.5)


class NoState(NamedTuple):
    """What a layer without a recurrent form leaves behind."""


def convolve_both_ways(
    u: Tensor,
    system: System,
    readout: BackwardReadout,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
    kept: dict[int, KeptFilter] | None = None,
) -> Tensor:
    """Run a system over (B, H, L) in both directions.

    Diagonal systems pass states along the row and back; a diagonal-plus-low-rank one is a
    convolution with a filter for each direction.

    Args:
        u: Input, (B, H, L).
        system: The system; its own C reads forward.
        readout: The C that reads backward.
        mask, cu_seqlens: As in `H3.forward`.
        lengths: Positions of each row that count, (B,), from its beginning; what stands behind
            them is padding. Cheaper than a mask.
        backend: Implementation, see `flashconv.ssm_conv` and `flashconv.fft_conv`.
        kept: Filters by their length, of this system and readout; where a filter is needed, it
            is taken from here, or left here.

    Returns:
        (B, H, L); at padding it means nothing.
    """
    c = torch.view_as_complex(readout.C.contiguous())

    def run(x: Tensor, cu: Tensor | None) -> Tensor:
        if isinstance(system, DPLRSystem):
            return _dplr_both_ways(x, system, c, cu, backend, {} if kept is None else kept)
        return _diagonal_both_ways(x, system, c, cu, backend)

    if mask is not None:
        packed = Unpadded(mask)
        return packed.run(lambda state, cu, x: (run(x, cu), state), NoState(), (u,))[0]
    return run(hide_padding(u, lengths), cu_seqlens)


def hide_padding(u: Tensor, lengths: Tensor | None) -> Tensor:
    """Zero (B, D, L) behind the first `lengths` positions of each row.

    Enough for a convolution without a bias: zeros add nothing on either side.
    """
    if lengths is None:
        return u
    padding = torch.arange(u.shape[-1], device=u.device) >= lengths[:, None]
    return u.masked_fill(padding[:, None], 0)


def refuse_state(state: object) -> None:
    """Refuse to continue a bidirectional layer.

    Raises:
        ValueError: if there is a state.
    """
    if state is not None:
        raise ValueError("a bidirectional layer sees the whole row at once: it takes no state")


def _diagonal_both_ways(
    x: Tensor, operators: ChunkOperators, c: Tensor, cu_seqlens: Tensor | None, backend: str
) -> Tensor:
    system = operators.system
    back = replace(system, c=c, skip=torch.zeros_like(system.skip))
    ahead, _ = flashconv.ssm_conv(x, operators, cu_seqlens=cu_seqlens, backend=backend)
    behind, _ = flashconv.ssm_conv(x, back, cu_seqlens=cu_seqlens, reverse=True, backend=backend)
    behind = F.pad(behind[..., 1:], (0, 1))
    if cu_seqlens is not None:  # the last of a sequence has nothing after it
        behind = behind.index_fill(-1, cu_seqlens[1:].long() - 1, 0.0)
    return ahead + behind


def _dplr_both_ways(
    x: Tensor,
    system: DPLRSystem,
    c: Tensor,
    cu_seqlens: Tensor | None,
    backend: str,
    kept: dict[int, KeptFilter],
) -> Tensor:
    spans = spans_of(cu_seqlens, x.shape[-1])
    length = filter_length(spans)
    if length not in kept:
        kept.clear()
        with torch.autocast(x.device.type, enabled=False):
            back, ahead = system.both_ways(c, length)
            kept[length] = KeptFilter(back, f_reverse=ahead)
    outputs = [flashconv.fft_conv(x[..., span], kept[length], backend=backend) for span in spans]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
