"""The diagonal SSM (S4D) and its discretisation."""

import math
from typing import ClassVar

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from h3lm.ssm import real_modes
from h3lm.ssm.fused_parameters import bilinear, can_discretize
from h3lm.ssm.hints import SSM_HINT, ParameterHint, SSMModule
from h3lm.ssm.hippo import diagonal_eigenvalues
from h3lm.ssm.operators import DiagonalSystem
from h3lm.ssm.real_modes import Pair, split, times

DISCRETIZATIONS = ("bilinear", "zoh")


def discretize(
    A: Complex[Tensor, "H half"],
    B: Complex[Tensor, "H half"],
    dt: Float[Tensor, " H"],
    rule: str,
) -> tuple[Complex[Tensor, "H half"], Complex[Tensor, "H half"]]:
    """Discretise a diagonal system, elementwise.

    | rule | a | b |
    |---|---|---|
    | bilinear | (1 + dt A/2) / (1 - dt A/2) | dt B / (1 - dt A/2) |
    | zoh | exp(dt A) | B (exp(dt A) - 1) / A |

    The two are different models where dt |A| is large, not two approximations of one.

    Returns:
        `a` and `b`, shape and dtype of `A`.

    Raises:
        ValueError: if `rule` is unknown.
    """
    check_rule(rule)
    z = dt[:, None] * A
    if rule == "bilinear":
        denominator = 1 - z / 2
        return (1 + z / 2) / denominator, dt[:, None] * B / denominator
    return torch.exp(z), B * torch.expm1(z) / A


def check_rule(rule: str) -> None:
    """Refuse an unknown discretisation.

    Raises:
        ValueError: naming those that there are.
    """
    if rule not in DISCRETIZATIONS:
        raise ValueError(f"discretization={rule!r} is not one of {', '.join(DISCRETIZATIONS)}")


def check_start(num_systems: int, dt_min: float, dt_max: float) -> None:
    """Refuse what no systems can be drawn with.

    Raises:
        ValueError: if there are no systems, or step sizes have no range.
    """
    if num_systems < 1:
        raise ValueError(f"num_systems={num_systems} must be positive")
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"need 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")


def _discretized(
    log_dt: Tensor, log_neg_A_real: Tensor, A_imag: Tensor, B: Tensor, rule: str
) -> tuple[Tensor, Tensor]:
    """A and b of a `DiagonalSSM`'s parameters, in plain PyTorch."""
    A = torch.complex(-torch.exp(log_neg_A_real), A_imag)
    return discretize(A, torch.view_as_complex(B.contiguous()), torch.exp(log_dt), rule)


def plain_bilinear(
    log_dt: Tensor, log_neg_A_real: Tensor, A_imag: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """What `fused_parameters.bilinear` makes, in plain PyTorch."""
    return _discretized(log_dt, log_neg_A_real, A_imag, B, "bilinear")


class DiagonalSSM(SSMModule):
    """H diagonal state space models of state size N, stored as N/2 complex modes.

    A = -exp(log_neg_A_real) + i A_imag, one step size dt = exp(log_dt) for each system.

    | parameter | shape | start |
    |---|---|---|
    | log_dt | (H,) | uniform in [ln dt_min, ln dt_max] |
    | log_neg_A_real | (H, N/2) | ln(1/2) |
    | A_imag | (H, N/2) | by `init` |
    | B | (H, N/2, 2), real and imaginary part | 1 |
    | C | (H, N/2, 2) | complex normal, E|C|^2 = 1 |
    | D | (H,) | standard normal |

    Source: Gu et al. 2022 (S4D); Fu et al. 2023 (arXiv 2212.14052v3), section 3, and its release.

    Args:
        num_systems: H.
        d_state: N, even.
        init: Imaginary parts of A: "lin", "inv" or "legs".
        discretization: "bilinear" (the H3 layer's) or "zoh" (the stand-alone S4D's).
        dt_min: Smallest step size at the start.
        dt_max: Largest step size at the start.
        device: Where the parameters are made.
    """

    training_hints: ClassVar[dict[str, ParameterHint]] = dict.fromkeys(
        ("log_dt", "log_neg_A_real", "A_imag", "B"), SSM_HINT
    )

    def __init__(
        self,
        num_systems: int,
        d_state: int = 64,
        *,
        init: str = "lin",
        discretization: str = "bilinear",
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
        diagonal_eigenvalues(init, d_state)  # refuses what cannot be made before allocating
        half = d_state // 2

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))

        self.log_dt = empty(num_systems)
        self.log_neg_A_real = empty(num_systems, half)
        self.A_imag = empty(num_systems, half)
        self.B = empty(num_systems, half, 2)
        self.C = empty(num_systems, half, 2)
        self.D = empty(num_systems)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew, from torch's generator."""
        eigenvalues = diagonal_eigenvalues(self.init, self.d_state)
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        self.log_neg_A_real.copy_(torch.log(-eigenvalues.real).expand(self.num_systems, -1))
        self.A_imag.copy_(eigenvalues.imag.expand(self.num_systems, -1))
        self.B[..., 0].fill_(1.0)
        self.B[..., 1].fill_(0.0)
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.D)

    def system(self) -> DiagonalSystem:
        """Discretise: what every op of `flashconv` takes.

        Returns:
            complex64 (complex128 for a float64 module), differentiable in every parameter.
        """
        self.check_precision()
        given = self.log_dt, self.log_neg_A_real, self.A_imag, self.B
        if self.discretization == "bilinear" and can_discretize(self.A_imag):
            a, b = bilinear(*given)
        else:
            a, b = _discretized(*given, self.discretization)
        C = torch.view_as_complex(self.C.contiguous())
        return DiagonalSystem(a=a, b=b, c=C, skip=self.D)

    def real_modes(self) -> tuple[Pair, Pair]:
        """A and b c of `system`, (H, N/2), in real numbers."""
        A = -torch.exp(self.log_neg_A_real), self.A_imag
        a, b = real_modes.discretize(A, torch.exp(self.log_dt), self.discretization)
        return a, times(times(b, split(self.B)), split(self.C))

    def extra_repr(self) -> str:
        """Sizes and rules, for print."""
        return (
            f"num_systems={self.num_systems}, d_state={self.d_state}, init={self.init!r}, "
            f"discretization={self.discretization!r}"
        )
