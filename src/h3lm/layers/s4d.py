"""The S4D layer."""

from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from h3lm.flashconv import KeptFilter
from h3lm.layers import border
from h3lm.layers.both_ways import BackwardReadout, convolve_both_ways, refuse_state
from h3lm.layers.projection import dtype_of_products, project_channel_last
from h3lm.layers.recurrence import Recurrence, RecurrentState
from h3lm.ssm import ChunkOperators, DiagonalSSM
from h3lm.ssm.shared_modes import TiedDiagonalSSM

OUTPUTS = ("linear", "glu")


class ChannelSystems(Recurrence):
    """A system for each channel, GELU, and an output map: what S4D and S4 share.

    Attributes:
        output: "linear" or "glu".
        backward_readout: A second C for what comes after a position; None if nothing is seen of it.
        output_proj: The output map.
    """

    reads_positions_last = True  # of its input: no copy where they are contiguous
    output: str
    backward_readout: BackwardReadout | None
    output_proj: nn.Linear

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
            kept=self._kept_both_ways(),
        )  # fmt: skip
        return finish(self.output_proj, y, self.output, residual), None

    def _kept_both_ways(self) -> dict[int, KeptFilter] | None:
        """Where to keep filters of both directions, by their length; None for nowhere."""
        return None


class S4D(ChannelSystems):
    """One diagonal SSM for each channel, GELU, and a linear map or a gated one.

        y = W gelu(diagonal_ssm(u)) + b                       output="linear"
        y = a * sigmoid(g),  (a, g) = W gelu(diagonal_ssm(u)) + b       output="glu"

    No gate before the SSM: what is added to the state does not depend on another position.
    Source: Gu et al. 2022 (S4D); "linear", `tied`, "inv" and "zoh" are the baseline of Fu et al.
    2023 (arXiv 2212.14052v3), Table 2. GELU in its exact form.

    A bidirectional layer has a second C for what comes after a position; its filter starts at
    the next position, so that the present is counted once. It has no recurrent form: it takes
    and returns no state.

    Args:
        d_model: Width D.
        d_state: State size N, even.
        output: "linear" or "glu".
        tied: Whether all channels share one A and have no B of their own.
        bidirectional: Whether a position sees what comes after it.
        init: Start of A: "lin", "inv" or "legs".
        discretization: "bilinear" or "zoh".
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
        output: str = "linear",
        tied: bool = False,
        bidirectional: bool = False,
        init: str = "inv",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_output(output)
        self.d_model, self.d_state = d_model, d_state
        self.output = output
        make = TiedDiagonalSSM if tied else DiagonalSSM
        self.diagonal_ssm = make(
            d_model,
            d_state,
            init=init,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
        )
        self.backward_readout = BackwardReadout(d_model, d_state // 2) if bidirectional else None
        self.output_proj = nn.Linear(d_model, d_model * (1 + (output == "glu")), bias=bias)

    def system(self) -> ChunkOperators:
        """The discrete system and its chunk operators."""
        return self.diagonal_ssm.system().chunk_operators(chunk_length=self.chunk_length)


def finish(projection: nn.Module, y: Tensor, output: str, residual: Tensor | None = None) -> Tensor:
    """GELU and the output map, (B, D, L) to (B, L, D), plus a residual if there is one."""
    y = F.gelu(y)
    if output == "glu" and border.can_gate(projection, y):
        return border.project_gated(projection, y, residual)
    h = project_channel_last(projection, y)
    h = h if output == "linear" else F.glu(h, dim=-1)
    return h if residual is None else residual + h


def check_output(output: str) -> None:
    """Refuse an unknown output map.

    Raises:
        ValueError: if `output` is not in `OUTPUTS`.
    """
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r} is not one of {', '.join(OUTPUTS)}")
