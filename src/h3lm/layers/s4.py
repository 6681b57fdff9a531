"""The S4 layer."""

from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from h3lm.flashconv import KeptFilter
from h3lm.layers.both_ways import BackwardReadout, convolve_both_ways, refuse_state
from h3lm.layers.prepared import Prepared
from h3lm.layers.projection import dtype_of_products
from h3lm.layers.recurrence import Recurrence, RecurrentState
from h3lm.layers.s4d import check_output, finish
from h3lm.ssm.dplr import DPLRSSM, DPLRSystem


class S4(Recurrence):
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

    reads_positions_last = True  # of its input: no copy where they are contiguous

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
        self.output: str = output
        self.dplr_ssm = DPLRSSM(d_model, d_state, dt_min=dt_min, dt_max=dt_max)
        self.backward_readout = BackwardReadout(d_model, d_state // 2) if bidirectional else None
        self.output_proj = nn.Linear(d_model, d_model * (1 + (output == "glu")), bias=bias)
        self._prepared_both_ways: Prepared[dict[int, KeptFilter]] = Prepared()

    def system(self) -> DPLRSystem:
        """The system that the parameters stand for."""
        return self.dplr_ssm.system()

    def forward(
        self,
        u: Float[Tensor, "B L D"],
        state: RecurrentState | None = None,
        *,
        mask: Bool[Tensor, "B L"] | Integer[Tensor, "B L"] | None = None,
        cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
        lengths: Integer[Tensor, " B"] | None = None,
        residual: Float[Tensor, "B L D"] | None = None,
        with_state: bool = True,
    ) -> tuple[Float[Tensor, "B L D"], RecurrentState | None]:
        """Mix positions; arguments as in `H3.forward`, and a residual that the output is added to.

        Raises:
            ValueError: if a bidirectional layer is given a state.
        """
        x = u.to(dtype_of_products(u)).transpose(1, 2)
        if self.backward_readout is None:
            y, end = self.mix(x, state, mask, cu_seqlens, with_state)
            return finish(self.output_proj, y, self.output, residual), end
        refuse_state(state)
        y = convolve_both_ways(
            x, self.prepared_system(), self.backward_readout,
            mask=mask, cu_seqlens=cu_seqlens, lengths=lengths, backend=self.backend,
            kept=self._prepared_both_ways.get(self, dict),
        )  # fmt: skip
        return finish(self.output_proj, y, self.output, residual), None
