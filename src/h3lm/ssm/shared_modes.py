"""Diagonal SSMs whose channels share one set of modes: the baselines of the H3 paper.

Both are a `DiagonalSystem` like any other once their parameters are expanded over channels.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from h3lm.ssm import real_modes
from h3lm.ssm.diagonal import check_rule, check_start, discretize
from h3lm.ssm.hints import SSM_HINT, ParameterHint, SSMModule
from h3lm.ssm.hippo import diagonal_eigenvalues
from h3lm.ssm.operators import DiagonalSystem
from h3lm.ssm.real_modes import Pair, split, times


class TiedDiagonalSSM(SSMModule):
    """S4D with one A for all channels and no B of its own.

    | parameter | shape | start |
    |---|---|---|
    | log_dt | (H,) | uniform in [ln dt_min, ln dt_max] |
    | log_neg_A_real | (N/2,) | ln(1/2) |
    | A_imag | (N/2,) | by `init` |
    | C | (H, N/2, 2), real and imaginary part | complex normal times a B drawn once |
    | D | (H,) | standard normal |

    B is drawn complex normal over sqrt(2 sum_j |B_j / lambda_j|^2) and multiplied into C at the
    start: only the product acts.
    Source: the synthetic-task baseline in the training code of Fu et al. 2023.

    Args:
        num_systems: H.
        d_state: N, even.
        init: Imaginary parts of A: "lin", "inv" or "legs".
        discretization: "zoh" or "bilinear".
        dt_min: Smallest step size at the start.
        dt_max: Largest step size at the start.
        device: Where the parameters are made.
    """

    training_hints: ClassVar[dict[str, ParameterHint]] = dict.fromkeys(
        ("log_dt", "log_neg_A_real", "A_imag"), SSM_HINT
    )

    def __init__(
        self,
        num_systems: int,
        d_state: int = 64,
        *,
        init: str = "inv",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_rule(discretization)
        check_start(num_systems, dt_min, dt_max)
        self.num_systems, self.d_state = num_systems, d_state
        self.init = init
        self.discretization = discretization
        self.dt_min, self.dt_max = dt_min, dt_max
        half = len(diagonal_eigenvalues(init, d_state))
        self.log_dt = _empty(num_systems, device=device)
        self.log_neg_A_real = _empty(half, device=device)
        self.A_imag = _empty(half, device=device)
        self.C = _empty(num_systems, half, 2, device=device)
        self.D = _empty(num_systems, device=device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew, from torch's generator."""
        eigenvalues = diagonal_eigenvalues(self.init, self.d_state).to(self.C.device)
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        self.log_neg_A_real.copy_(torch.log(-eigenvalues.real))
        self.A_imag.copy_(eigenvalues.imag)
        B = torch.randn(len(eigenvalues), dtype=torch.complex64, device=self.C.device)
        B = B / torch.sqrt(2 * (B / eigenvalues).abs().square().sum())
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        self.C.copy_(torch.view_as_real(torch.view_as_complex(self.C) * B))
        nn.init.normal_(self.D)

    def system(self) -> DiagonalSystem:
        """Discretise: what every op of `flashconv` takes."""
        self.check_precision()
        A = torch.complex(-torch.exp(self.log_neg_A_real), self.A_imag)
        A = A.expand(self.num_systems, -1)
        a, b = discretize(A, torch.ones_like(A), torch.exp(self.log_dt), self.discretization)
        return DiagonalSystem(a=a, b=b, c=_complex(self.C), skip=self.D)

    def real_modes(self) -> tuple[Pair, Pair]:
        """A and b c of `system`, (H, N/2), in real numbers."""
        A = -torch.exp(self.log_neg_A_real), self.A_imag
        a, b = real_modes.discretize(A, torch.exp(self.log_dt), self.discretization)
        return a, times(b, split(self.C))

    def extra_repr(self) -> str:
        """Sizes and rules, for print."""
        return (
            f"num_systems={self.num_systems}, d_state={self.d_state}, init={self.init!r}, "
            f"discretization={self.discretization!r}"
        )


class SharedModesSSM(SSMModule):
    """H channels that read one set of N complex modes, without step size or conjugate pairs.

        s_t = exp(lambda) s_{t-1} + u_t
        y_t = Re(sum_j C_j (exp(lambda_j) - 1)/lambda_j s_tj) + D u_t
        lambda = -exp(log_neg_A_real) + i exp(log_A_imag)

    As a `DiagonalSystem`, whose read-out is twice the real part, c is half of that weight.
    Source: Mehta et al. 2022 (GSS), its "simplified DSS".

    | parameter | shape | start |
    |---|---|---|
    | log_neg_A_real | (N,) | standard normal |
    | log_A_imag | (N,) | standard normal |
    | C | (H, N, 2), real and imaginary part | standard normal each |
    | D | (H,) | standard normal |

    Args:
        num_systems: H.
        num_modes: N, all of them complex: the state has 2 N floats for a channel.
        device: Where the parameters are made.
    """

    training_hints: ClassVar[dict[str, ParameterHint]] = dict.fromkeys(
        ("log_neg_A_real", "log_A_imag"), SSM_HINT
    )

    def __init__(
        self, num_systems: int, num_modes: int = 64, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if num_modes < 1:
            raise ValueError(f"num_modes={num_modes} must be positive")
        self.num_systems, self.num_modes = num_systems, num_modes
        self.log_neg_A_real = _empty(num_modes, device=device)
        self.log_A_imag = _empty(num_modes, device=device)
        self.C = _empty(num_systems, num_modes, 2, device=device)
        self.D = _empty(num_systems, device=device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew, from torch's generator."""
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def system(self) -> DiagonalSystem:
        """Discretise with step size 1: what every op of `flashconv` takes."""
        self.check_precision()
        A = torch.complex(-torch.exp(self.log_neg_A_real), torch.exp(self.log_A_imag))
        # the zero-order hold's input weight sits in c, so that the state is the published one
        c = _complex(self.C) * (torch.expm1(A) / A) / 2
        a = torch.exp(A).expand(self.num_systems, -1)
        return DiagonalSystem(a=a, b=torch.ones_like(a), c=c, skip=self.D)

    def real_modes(self) -> tuple[Pair, Pair]:
        """A, (1, N), and b c, (H, N), of `system`, in real numbers."""
        A = -torch.exp(self.log_neg_A_real[None]), torch.exp(self.log_A_imag[None])
        a, grown = real_modes.hold(A)
        return a, times(split(self.C / 2), real_modes.over(grown, A))

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return f"num_systems={self.num_systems}, num_modes={self.num_modes}"


def _empty(*shape: int, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.contiguous())
