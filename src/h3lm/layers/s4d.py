"""The S4D layer."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from h3lm import flashconv
from h3lm.layers.projection import project_channel_last
from h3lm.layers.recurrence import BackwardReadout, Recurrence, RecurrentState, zero_state
from h3lm.layers.unpad import Unpadded
from h3lm.ssm import ChunkOperators, DiagonalSSM
from h3lm.ssm.shared_modes import TiedDiagonalSSM

OUTPUTS = ("linear", "glu")


class S4D(Recurrence):
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
        self.output: str = output
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

    def forward(
        self,
        u: Float[Tensor, "B L D"],
        state: RecurrentState | None = None,
        *,
        mask: Bool[Tensor, "B L"] | Integer[Tensor, "B L"] | None = None,
        cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], RecurrentState | None]:
        """Mix positions; arguments as in `H3.forward`.

        Raises:
            ValueError: if a bidirectional layer is given a state.
        """
        x = u.transpose(1, 2)
        if self.backward_readout is None:
            y, end = self.mix(x, state, mask, cu_seqlens)
            return self._finish(y), end
        refuse_state(state)
        return self._finish(self._both_ways(x, mask, cu_seqlens)), None

    def _finish(self, y: Tensor) -> Tensor:
        return finish(self.output_proj, y, self.output)

    def _both_ways(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        operators = self.system()
        if mask is None:
            return self._run_both(x, operators, cu_seqlens)
        state = zero_state(x, operators)
        run = Unpadded(mask).run
        return run(lambda s, cu, p: (self._run_both(p, operators, cu), s), state, (x,))[0]

    def _run_both(self, x: Tensor, operators: ChunkOperators, cu_seqlens: Tensor | None) -> Tensor:
        assert self.backward_readout is not None
        system = operators.system
        C = torch.view_as_complex(self.backward_readout.C.contiguous())
        back = replace(system, c=C, skip=torch.zeros_like(system.skip))
        ahead, _ = flashconv.ssm_conv(x, operators, cu_seqlens=cu_seqlens)
        behind, _ = flashconv.ssm_conv(x, back, cu_seqlens=cu_seqlens, reverse=True)
        behind = F.pad(behind[..., 1:], (0, 1))
        if cu_seqlens is not None:  # the last of a sequence has nothing after it
            behind = behind.index_fill(-1, cu_seqlens[1:].long() - 1, 0.0)
        return ahead + behind


def finish(projection: nn.Module, y: Tensor, output: str) -> Tensor:
    """GELU and the output map, (B, D, L) to (B, L, D)."""
    h = project_channel_last(projection, F.gelu(y))
    return h if output == "linear" else F.glu(h, dim=-1)


def check_output(output: str) -> None:
    """Refuse an unknown output map.

    Raises:
        ValueError: if `output` is not in `OUTPUTS`.
    """
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r} is not one of {', '.join(OUTPUTS)}")


def refuse_state(state: RecurrentState | None) -> None:
    """Refuse to continue a bidirectional layer.

    Raises:
        ValueError: if there is a state.
    """
    if state is not None:
        raise ValueError("a bidirectional layer sees the whole row at once: it takes no state")
