"""The gated state space layer."""

from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from h3lm.layers.projection import dtype_of_products, project_channel_last
from h3lm.layers.recurrence import Recurrence, RecurrentState
from h3lm.ssm import ChunkOperators
from h3lm.ssm.shared_modes import SharedModesSSM


class GSS(Recurrence):
    """Gated state space: a narrow SSM branch, multiplied by a wide gate.

        g = gelu(u W_gate);   x = norm(gelu(u W_in))
        y = (ssm(x) W_up * g) W_o

    The gate multiplies behind the SSM only: what enters the state is not compared with anything.
    Source: Mehta et al. 2022 (GSS), without its outer norm and residual, which belong to the
    block. GELU in its exact form; the sizes in the H3 paper's tables are not known, the defaults
    are the published ratios.

    Args:
        d_model: Width D.
        d_ssm: Channels of the SSM; D/4 if None.
        d_gate: Width of the gate; 4 D if None.
        num_modes: Complex modes, shared by all channels.
        bias: Whether the projections have a bias.
        norm_eps: Epsilon of the norm in front of the SSM.

    Raises:
        ValueError: if d_model is too small for the default d_ssm.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_ssm: int | None = None,
        d_gate: int | None = None,
        num_modes: int = 64,
        bias: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        d_ssm = d_model // 4 if d_ssm is None else d_ssm
        d_gate = 4 * d_model if d_gate is None else d_gate
        if d_ssm < 1:
            raise ValueError(f"d_model={d_model} leaves no channel for the SSM: give d_ssm")
        self.d_model, self.d_ssm, self.d_gate = d_model, d_ssm, d_gate
        self.gate_proj = nn.Linear(d_model, d_gate, bias=bias)
        self.input_proj = nn.Linear(d_model, d_ssm, bias=bias)
        self.norm = nn.LayerNorm(d_ssm, eps=norm_eps)
        self.diagonal_ssm = SharedModesSSM(d_ssm, num_modes)
        self.up_proj = nn.Linear(d_ssm, d_gate, bias=bias)
        self.output_proj = nn.Linear(d_gate, d_model, bias=bias)

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
        with_state: bool = True,
    ) -> tuple[Float[Tensor, "B L D"], RecurrentState | None]:
        """Mix positions; arguments as in `H3.forward`."""
        x = self.norm(F.gelu(self.input_proj(u)))
        x = x.to(dtype_of_products(u))  # autocast norms are float32
        y, end = self.mix(x.transpose(1, 2), state, mask, cu_seqlens, with_state)
        gate = F.gelu(self.gate_proj(u))
        return self.output_proj(project_channel_last(self.up_proj, y) * gate), end

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return f"d_model={self.d_model}, d_ssm={self.d_ssm}, d_gate={self.d_gate}"
