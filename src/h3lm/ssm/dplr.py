"""S4: a state space model whose matrix is diagonal plus low rank, and its views.

The read-out C itself is stored, not the C (I - Abar^L) of the published code. That other one
belongs to a single length: a filter of another length, the recurrence and a checkpoint all need
that length beside it, and growing it is a change of parameters in the middle of training. Here
C (I - Abar^L) is made anew for each filter, by repeated squaring in float64, at O(N^3 log L) for
a channel: every length is exact, and steps and filters read the same parameter.

Source: Gu et al. 2022 (S4), sections 3.2 and 3.3 and Appendix C.3.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Complex, Float, Inexact
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from h3lm.ssm.diagonal import check_start
from h3lm.ssm.fused_filters import can_fuse, fused_filters
from h3lm.ssm.hints import SSM_HINT, ParameterHint, SSMModule
from h3lm.ssm.hippo import legs_normal_plus_low_rank
from h3lm.ssm.operators import DiagonalSystem, _widen
from h3lm.ssm.state_blocks import Dense, StateBlocks, advance, as_complex, as_real

MAX_CONDITION = 1e6
WRAPPED = 1e-8  # r^L, for a filter of length L on a circle of radius r
_MAX_ENTRIES = 1 << 24  # of the Cauchy table held at once


@dataclass(frozen=True)
class DPLRSystem:
    """H bilinear systems with A = diag(eigenvalues) - P P*, N/2 of N conjugate entries stored.

        x_t = Abar x_{t-1} + Bbar u_t        (update, then read)
        y_t = 2 Re(sum_n c_n x_{t,n}) + skip u_t
        Abar = (I - dt/2 A)^-1 (I + dt/2 A);   Bbar = (I - dt/2 A)^-1 dt B

    The same P on both sides keeps A + A* negative definite, so that every step contracts.

    Attributes:
        eigenvalues: Diagonal part, (H, N/2), complex64 or complex128, real parts negative.
        P: Low-rank part, (H, N/2), complex.
        B: Input weights of the continuous system, (H, N/2), complex.
        c: Output weights, (H, N/2), complex. Used as they are: nothing is conjugated.
        dt: Step size, (H,), real and positive.
        skip: Direct term (the paper's D), (H,), real.
    """

    eigenvalues: Tensor
    P: Tensor
    B: Tensor
    c: Tensor
    dt: Tensor
    skip: Tensor
    # not a cached property: the compiler does not look through its lock
    _kept: dict[str, Dense] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_systems(self) -> int:
        """H, the number of independent systems."""
        return self.eigenvalues.shape[0]

    @property
    def num_modes(self) -> int:
        """N/2, the number of stored complex entries of a state."""
        return self.eigenvalues.shape[1]

    def dense(
        self,
    ) -> tuple[Float[Tensor, "H N N"], Float[Tensor, "H N"], Float[Tensor, "H N"]]:
        """The discrete system on real states (Re x, Im x): the step on each unit vector.

        Returns:
            Abar (H, N, N), Bbar (H, N) and the read-out row (H, N), float64. y = row x + skip u.
        """
        if "dense" not in self._kept:
            self._kept["dense"] = self._make_dense()
        return self._kept["dense"]

    def _make_dense(self) -> tuple[Tensor, Tensor, Tensor]:
        P, B, c = (_widen(x) for x in (self.P, self.B, self.c))
        wide = replace(
            self,
            eigenvalues=_widen(self.eigenvalues),
            P=P,
            B=B,
            c=c,
            dt=self.dt.to(P.real.dtype),
            skip=self.skip.to(P.real.dtype),
        )
        N = 2 * self.num_modes
        unit = as_complex(torch.eye(N, dtype=wide.dt.dtype, device=P.device))
        unit = unit[:, None].expand(-1, self.num_systems, -1)
        none, one = (
            wide.skip.new_full((rows, self.num_systems), x) for rows, x in ((N, 0), (1, 1))
        )
        _, columns = wide.step(none, unit)  # [N, H, N/2], one column of Abar in each row
        _, into = wide.step(one)
        return as_real(columns).permute(1, 2, 0), as_real(into)[0], _as_row(c)

    def filter(self, length: int) -> Float[Tensor, "H L"]:
        """The impulse response without the skip term: K_l = 2 Re(c Abar^l Bbar).

        From its generating function at the L-th roots of unity, or near them; made in float64. On
        an NVIDIA GPU with Triton one operator makes it (`ssm.fused_filters`).

        Returns:
            (H, L), float32 (float64 for a complex128 system). Differentiable in everything.

        Raises:
            ValueError: if `length` is negative.
        """
        return self.filters(self.c[None], length)[0]

    def filters(self, readouts: Complex[Tensor, "K H half"], length: int) -> Float[Tensor, "K H L"]:
        """`filter` with each of several read-outs in place of c; they share most of the work.

        Args:
            readouts: (K, H, N/2), complex.
            length: L.

        Returns:
            (K, H, L), as `filter`.

        Raises:
            ValueError: if `length` is negative.
        """
        if length > 0 and can_fuse(self.eigenvalues, self.B, readouts, length):
            return fused_filters(self.eigenvalues, self.P, self.B, readouts, self.dt, length)
        return self.plain_filters(readouts, length)

    def both_ways(
        self, backward: Complex[Tensor, "H half"], length: int
    ) -> tuple[Float[Tensor, "H L"], Float[Tensor, "H L"]]:
        """Filters that look back, with the skip, and ahead, from the next position on.

        Args:
            backward: Read-out of what lies ahead, (H, N/2).
            length: L, at least 1.
        """
        readouts = torch.stack([self.c, backward])
        if can_fuse(self.eigenvalues, self.B, readouts, length):
            made = fused_filters(
                self.eigenvalues, self.P, self.B, readouts, self.dt, length,
                skip=self.skip, delayed=True,
            )  # fmt: skip
            behind, ahead = made.unbind(0)  # whose gradient is one copy
            return behind, ahead
        behind, ahead = self.plain_filters(readouts, length)
        behind = torch.cat([behind[:, :1] + self.skip[:, None], behind[:, 1:]], 1)
        return behind, F.pad(ahead[:, :-1], (1, 0))

    def plain_filters(
        self, readouts: Complex[Tensor, "K H half"], length: int
    ) -> Float[Tensor, "K H L"]:
        """`filters` in plain PyTorch."""
        return self._responses(_widen(self.B), readouts, length)

    def quick_filter(self, length: int) -> Float[Tensor, "H L"]:
        """`filter` for short rows, in few operations: no power of the dense matrix.

        By kernels where they run. Else the generating function is taken on a circle on which what
        follows after L is below the last place of float32, as in `ssm.filters_triton`.
        """
        if can_fuse(self.eigenvalues, self.B, self.c[None], length):
            return self.filter(length)
        eigenvalues, P, B, c = (_widen(x) for x in (self.eigenvalues, self.P, self.B, self.c))
        dt, radius = self.dt.to(c.real.dtype), WRAPPED ** (1 / length)
        wound = _generate(eigenvalues, P, dt, c, B, length, radius)
        lags = torch.arange(length, device=c.device, dtype=dt.dtype)
        return (wound * WRAPPED ** (-lags / length)).to(self.skip.dtype)

    def initial_response(
        self, state: Complex[Tensor, "B H half"], length: int
    ) -> Float[Tensor, "B H L"]:
        """What a state before position 0 adds to the outputs: 2 Re(c Abar^(t+1) x).

        The filter of a system whose discrete input vector is Abar x, that is whose continuous one
        is (I + dt/2 A) x / dt.

        Raises:
            ValueError: if `length` is negative.
        """
        x, P = _widen(state), _widen(self.P)
        rank_one = P * _double_real(P.conj() * x)
        Ax = _widen(self.eigenvalues) * x - rank_one
        return self._responses(x / self.dt.to(x.real.dtype)[:, None] + Ax / 2, self.c, length)

    def step(
        self,
        u: Inexact[Tensor, "B H"],
        state: Complex[Tensor, "B H half"] | None = None,
    ) -> tuple[Inexact[Tensor, "B H"], Complex[Tensor, "B H half"]]:
        """Advance by one input, in O(N) for a channel.

            w = (2/dt + A) x + 2 B u;   x = (2/dt - A)^-1 w   by Sherman-Morrison

        Args:
            u: Input, (B, H).
            state: State before this input, (B, H, N/2); None for zero.

        Returns:
            The output, shape and dtype of `u`, and the state after this input.
        """
        g = (2 / self.dt)[:, None]
        inverse = 1 / (g - self.eigenvalues)
        wide = u.to(self.skip.dtype)
        w = 2 * self.B * wide[..., None]
        if state is not None:
            w = w + (g + self.eigenvalues) * state
            w = w - self.P * _double_real(self.P.conj() * state)
        w = inverse * w
        denominator = 1 + _double_real(inverse * self.P * self.P.conj())
        new = w - inverse * self.P * (_double_real(self.P.conj() * w) / denominator)
        y = 2 * (self.c * new).real.sum(-1) + self.skip * wide
        return y.to(u.dtype), new

    def final_state(
        self,
        u: Inexact[Tensor, "B H L"],
        state: Complex[Tensor, "B H half"] | None = None,
    ) -> Complex[Tensor, "B H half"]:
        """The state after the inputs `u`, all of them at once.

        See `StateBlocks`.

        Args:
            u: Inputs, (B, H, L); L may be 0.
            state: State before them; zero if None.
        """
        dtype, L = self.skip.dtype, u.shape[-1]
        end = u.new_zeros(*u.shape[:2], 2 * self.num_modes, dtype=dtype)
        if L:
            end = StateBlocks.of(self.dense(), L, dtype).end_state(u)
        if state is not None:
            power = torch.linalg.matrix_power(self.dense()[0], L).to(dtype)
            end = end + advance(power, as_real(state).to(dtype))
        return as_complex(end)

    def diagonalized(self, max_condition: float = MAX_CONDITION) -> DiagonalSystem:
        """The same system in the eigenbasis of Abar: all N modes, each with half of its weight.

        Near the LegS start the eigenvectors are almost parallel (condition 8e10 at N = 16), and
        the diagonal form loses all digits; training usually moves away from it.

        Returns:
            complex64 (complex128 for a complex128 system), for every op that takes a
            `DiagonalSystem`.

        Raises:
            ValueError: if the condition number of a channel's eigenvectors exceeds
                `max_condition`.
        """
        Abar, column, row = self.dense()
        a, vectors = torch.linalg.eig(Abar)
        condition = torch.linalg.cond(vectors.detach())
        worst = int(condition.argmax())
        if not bool(condition[worst] <= max_condition):
            raise ValueError(
                f"the eigenvectors of system {worst} have condition number "
                f"{float(condition[worst]):.1e}, more than {max_condition:.0e}: its diagonal form "
                "would not be the same system; use step() and filter()"
            )
        b = torch.linalg.solve(vectors, column.to(vectors.dtype)[..., None])[..., 0]
        c = (row.to(vectors.dtype)[..., None, :] @ vectors)[..., 0, :] / 2
        narrow = self.eigenvalues.dtype
        return DiagonalSystem(a=a.to(narrow), b=b.to(narrow), c=c.to(narrow), skip=self.skip)

    def _responses(self, B: Tensor, c: Tensor, length: int) -> Tensor:
        """Filters for continuous input vectors B, complex128, and read-outs c: (..., H, L).

        Both are (..., H, N/2) and broadcast.
        """
        if length < 0:
            raise ValueError(f"length={length} must not be negative")
        if length == 0:
            return self.skip.new_zeros(*torch.broadcast_shapes(B.shape, c.shape)[:-1], 0)
        Abar, _, _ = self.dense()
        row = _as_row(_widen(c))
        row = row - (row[..., None, :] @ torch.linalg.matrix_power(Abar, length))[..., 0, :]
        half = self.num_modes
        readout = torch.complex(row[..., :half], -row[..., half:]) / 2
        arguments = (
            _widen(self.eigenvalues), _widen(self.P), self.dt.to(row.dtype), readout, B
        )  # fmt: skip
        entries = self.num_modes * (length // 2 + 1)
        group = max(1, _MAX_ENTRIES // entries)
        if group >= self.num_systems:
            return _generate(*arguments, length).to(self.skip.dtype)
        # the table of a long filter is remade in the backward pass rather than kept
        parts = [
            checkpoint(_generate, *(x[..., at, :] if x.dim() > 1 else x[at] for x in arguments),
                       length, use_reentrant=False)
            for at in (slice(h, h + group) for h in range(0, self.num_systems, group))
        ]  # fmt: skip
        return torch.cat(parts, -2).to(self.skip.dtype)


class DPLRSSM(SSMModule):
    """H state space models of state size N with A = diag - P P*, started at HiPPO-LegS.

    | parameter | shape | start |
    |---|---|---|
    | log_dt | (H,) | uniform in [ln dt_min, ln dt_max] |
    | log_neg_A_real | (H, N/2) | ln(1/2) |
    | A_imag | (H, N/2) | the normal part of HiPPO-LegS, ascending |
    | P | (H, N/2, 2), real and imaginary part | HiPPO-LegS |
    | B | (H, N/2, 2) | HiPPO-LegS |
    | C | (H, N/2, 2) | complex normal, E|C|^2 = 1 |
    | D | (H,) | standard normal |

    Bilinear discretisation. C is the read-out of the state, for every length (see the module).
    Source: Gu et al. 2022 (S4), and its release, which stores C (I - Abar^L) instead.

    Args:
        num_systems: H.
        d_state: N, even.
        dt_min: Smallest step size at the start.
        dt_max: Largest step size at the start.
        device: Where the parameters are made.
    """

    training_hints: ClassVar[dict[str, ParameterHint]] = dict.fromkeys(
        ("log_dt", "log_neg_A_real", "A_imag", "P", "B"), SSM_HINT
    )

    def __init__(
        self,
        num_systems: int,
        d_state: int = 64,
        *,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_start(num_systems, dt_min, dt_max)
        self.num_systems, self.d_state = num_systems, d_state
        self.dt_min, self.dt_max = dt_min, dt_max
        half = len(legs_normal_plus_low_rank(d_state).B)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))

        self.log_dt = empty(num_systems)
        self.log_neg_A_real = empty(num_systems, half)
        self.A_imag = empty(num_systems, half)
        self.P = empty(num_systems, half, 2)
        self.B = empty(num_systems, half, 2)
        self.C = empty(num_systems, half, 2)
        self.D = empty(num_systems)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew, from torch's generator."""
        legs = legs_normal_plus_low_rank(self.d_state)
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        self.log_neg_A_real.copy_(torch.log(-legs.eigenvalues.real).expand_as(self.log_neg_A_real))
        self.A_imag.copy_(legs.eigenvalues.imag.expand_as(self.A_imag))
        self.P.copy_(torch.view_as_real(legs.P).expand_as(self.P))
        self.B.copy_(torch.view_as_real(legs.B).expand_as(self.B))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.D)

    def system(self) -> DPLRSystem:
        """The system that the parameters stand for.

        Returns:
            complex64 (complex128 for a float64 module), differentiable in every parameter.
        """
        self.check_precision()
        P, B, C = (torch.view_as_complex(x.contiguous()) for x in (self.P, self.B, self.C))
        return DPLRSystem(
            eigenvalues=torch.complex(-torch.exp(self.log_neg_A_real), self.A_imag),
            P=P,
            B=B,
            c=C,
            dt=torch.exp(self.log_dt),
            skip=self.D,
        )

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return f"num_systems={self.num_systems}, d_state={self.d_state}"


def _generate(
    eigenvalues: Tensor,
    P: Tensor,
    dt: Tensor,
    readout: Tensor,
    B: Tensor,
    length: int,
    radius: float = 1.0,
) -> Tensor:
    """Filters from the truncated generating function, `readout` being C (I - Abar^L).

    On a circle of another radius r, at lag l, they are r^l times what the whole generating
    function gives for a read-out C, but for what follows after L, r^L as large.

    With the Woodbury identity multiplied through by 1 + z, which is finite at z = -1:

        K(z) = dt (q[C, B] - s q[C, P] q[P*, B] / (1 + s q[P*, P]))
        q[a, b](z) = sum over all N of a_j b_j / ((1 - z) - s lambda_j),   s = dt/2 (1 + z)

    The two terms of a conjugate pair are not conjugates of each other at a complex z; they are
    added over their common denominator, which has real coefficients above it:

        v/(w - s l) + v'/(w - s l') = (2 Re(v) w - 2 Re(v l') s) / ((w - s l)(w - s l'))
    """
    k = torch.arange(length // 2 + 1, device=P.device, dtype=P.real.dtype)
    angle = -2 * math.pi / length * k
    z = torch.polar(torch.full_like(angle, radius), angle)
    if length % 2 == 0:
        z = torch.where(k == length // 2, torch.full_like(z, -radius), z)
    w, s = 1 - z, dt[:, None] / 2 * (1 + z)
    table = w - s[:, None] * eigenvalues[..., None]
    table = 1 / (table * (w - s[:, None] * eigenvalues.conj()[..., None]))  # [H, N/2, nodes]

    def q(v: Tensor) -> Tensor:  # [..., H, N/2] -> [..., H, nodes]
        above = 2 * torch.stack([v.real, (v * eigenvalues.conj()).real], -2).to(table.dtype)
        over_w, over_s = (above @ table).unbind(-2)
        return over_w * w - over_s * s

    low_rank = s * q(readout * P) / (1 + s * q(P.conj() * P))
    spectrum = dt[:, None] * (q(readout * B) - low_rank * q(P.conj() * B))
    return torch.fft.irfft(spectrum, n=length)


def _double_real(x: Tensor) -> Tensor:
    """Sum over all N entries of a conjugate-symmetric vector of which N/2 are stored."""
    return 2 * x.real.sum(-1, keepdim=True)


def _as_row(c: Tensor) -> Tensor:
    return torch.cat([2 * c.real, -2 * c.imag], -1)
