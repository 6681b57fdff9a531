"""The shift SSM: a state that remembers the last inputs."""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from h3lm.ssm.fused_parameters import can_filter, shift_taps
from h3lm.ssm.hints import SSM_HINT, ParameterHint, SSMModule


def plain_taps(B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`ShiftSSM.taps` of its parameters, in plain PyTorch."""
    slots = B.shape[1]
    n = 2 * slots  # no wrap-around
    spectrum = torch.fft.rfft(B, n=n).conj() * torch.fft.rfft(C, n=n)
    taps = torch.fft.irfft(spectrum, n=n)[:, :slots]
    return torch.cat([taps[:, :1] + D[:, None], taps[:, 1:]], 1)


class ShiftSSM(SSMModule):
    """D shift state space models of N slots.

        x_t = shift(x_{t-1}) + B k_t;   y_t = C x_t + D k_t       (update, then read)

    The shift moves slot i to i + 1; with B the first unit vector the state is the last N inputs.
    The whole is a causal filter of exactly N taps, f_j = sum_n B_n C_{n+j}, f_0 += D.
    Source: Fu et al. 2023 (arXiv 2212.14052v3), section 3.1.

    | parameter | shape | start |
    |---|---|---|
    | B | (D, N) | first unit vector |
    | C | (D, N) | uniform in +-1/sqrt(N) |
    | D | (D,) | standard normal |

    Args:
        d_model: Number of channels D, one system each.
        d_state: Number of slots N.
        device: Where the parameters are made.
    """

    training_hints: ClassVar[dict[str, ParameterHint]] = {"B": SSM_HINT}

    def __init__(
        self, d_model: int, d_state: int = 64, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if d_model < 1 or d_state < 1:
            raise ValueError(f"d_model={d_model} and d_state={d_state} must be positive")
        self.d_model, self.d_state = d_model, d_state

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))

        self.B = empty(d_model, d_state)
        self.C = empty(d_model, d_state)
        self.D = empty(d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew, from torch's generator."""
        self.B.zero_()
        self.B[:, 0] = 1.0
        bound = 1 / math.sqrt(self.d_state)
        nn.init.uniform_(self.C, -bound, bound)
        nn.init.normal_(self.D)

    def taps(self) -> Float[Tensor, "D n_taps"]:
        """The filter, skip included: f_j = sum_n B_n C_{n+j}, plus D at j = 0.

        Returns:
            (D, N), float32 (float64 for a float64 module), differentiable.
        """
        self.check_precision()
        make = shift_taps if can_filter(self.B) else plain_taps
        return make(self.B, self.C, self.D)

    def step(
        self, k: Float[Tensor, "B D"], state: Float[Tensor, "B D N"] | None = None
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D N"]]:
        """Advance the N-slot state by one input; slot 0 holds the newest.

        Layers carry the last N - 1 inputs instead (`flashconv.H3State`), which is lossless
        for any B.

        Returns:
            The output (B, D) and the state after this input (B, D, N).
        """
        new = self.B * k[..., None]
        if state is not None:
            new = new + nn.functional.pad(state[..., :-1], (1, 0))
        return (self.C * new).sum(-1) + self.D * k, new

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return f"d_model={self.d_model}, d_state={self.d_state}"
