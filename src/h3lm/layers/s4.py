"""The S4 layer."""

from torch import nn

from h3lm.flashconv import KeptFilter
from h3lm.layers.both_ways import BackwardReadout
from h3lm.layers.prepared import Prepared
from h3lm.layers.s4d import ChannelSystems, check_output
from h3lm.ssm.dplr import DPLRSSM, DPLRSystem


class S4(ChannelSystems):
    """One diagonal-plus-low-rank SSM for each channel, GELU, and a gated or linear map.

    As `S4D`, with a system that starts at HiPPO-LegS itself instead of its diagonal part.
    Rows are convolved with a filter of their length by FFT, in chunks of up to 8192 that the state
    joins; single positions take the structured step. In eval mode, with gradients off, filters and
    their spectra are kept.
    Source: Gu et al. 2022 (S4). GELU in its exact form.

    Args:
        d_model: Width D.
        d_state: State size N, even.
        output: "glu" (the published block) or "linear".
        bidirectional: Whether a position sees what comes after it, by a second C; see `S4D`.
        dt_min, dt_max: Range of the step sizes at the start.
        bias: Whether the output map has a bias.

    Raises:
        ValueError: if `output` is unknown or d_state is odd.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        output: str = "glu",
        bidirectional: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_output(output)
        self.d_model, self.d_state = d_model, d_state
        self.output = output
        self.dplr_ssm = DPLRSSM(d_model, d_state, dt_min=dt_min, dt_max=dt_max)
        self.backward_readout = BackwardReadout(d_model, d_state // 2) if bidirectional else None
        self.output_proj = nn.Linear(d_model, d_model * (1 + (output == "glu")), bias=bias)
        self._prepared_both_ways: Prepared[dict[int, KeptFilter]] = Prepared()

    def system(self) -> DPLRSystem:
        """The system that the parameters stand for."""
        return self.dplr_ssm.system()

    def _kept_both_ways(self) -> dict[int, KeptFilter]:
        return self._prepared_both_ways.get(self, dict)
