"""A discrete diagonal SSM and its views: step, filter, chunk operators."""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Inexact, Integer
from torch import Tensor
from torch.nn import functional as F

from h3lm.ssm.fused_operators import can_fuse, fused_operators

DEFAULT_CHUNK_LENGTH = 64


@dataclass(frozen=True)
class DiagonalSystem:
    """H discrete diagonal SSMs of N/2 stored complex modes each.

        x_t = a x_{t-1} + b u_t        (update, then read)
        y_t = 2 Re(sum_n c_n x_{t,n}) + skip u_t

    The factor 2 Re stands for the conjugate modes that are not stored.
    Source: Fu et al. 2023 (arXiv 2212.14052v3), section 2.1; Gu et al. 2022 (S4D), section 3.

    Attributes:
        a: Decay per step, (H, N/2), complex64 or complex128, |a| < 1.
        b: Input weights, (H, N/2), as `a`.
        c: Output weights, (H, N/2), as `a`. Used as they are: nothing is conjugated.
        skip: Direct term (the paper's D), (H,), real.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    skip: Tensor

    def __post_init__(self) -> None:
        """Check that the four tensors belong together."""
        if self.a.dim() != 2 or not (self.a.shape == self.b.shape == self.c.shape):
            raise ValueError(
                "a, b and c must share one shape (H, N/2), got "
                f"{tuple(self.a.shape)}, {tuple(self.b.shape)}, {tuple(self.c.shape)}"
            )
        if self.skip.shape != self.a.shape[:1]:
            raise ValueError(
                f"skip must be ({self.a.shape[0]},) like the rows of a, "
                f"got {tuple(self.skip.shape)}"
            )

    @property
    def num_systems(self) -> int:
        """H, the number of independent systems."""
        return self.a.shape[0]

    @property
    def num_modes(self) -> int:
        """N/2, the number of stored complex modes."""
        return self.a.shape[1]

    def powers(self, exponents: Integer[Tensor, " J"]) -> Complex[Tensor, "H half J"]:
        """A to non-negative integer powers, in the widest precision of the device.

        The logarithm is taken once, in float64, with its phase in (-pi, pi]: powers made in
        float32 are off by 1e-3 at exponent 1024. A mode that is exactly 0 stays 0, with gradient
        0, in every power but the zeroth.
        """
        a = _widen(self.a)
        zero = a == 0
        log_a = torch.log(torch.where(zero, torch.ones_like(a), a))
        table = torch.exp(log_a[..., None] * exponents.to(log_a.real.dtype))
        return torch.where(zero[..., None] & (exponents > 0), torch.zeros_like(table), table)

    def filter(self, length: int) -> Float[Tensor, "H L"]:
        """The impulse response without the skip term: K_l = 2 Re(sum_n c_n b_n a_n^l).

        Made as one matrix product of two short tables of powers, so that time and memory for a
        long filter are those of the result.

        Returns:
            (H, L), float32 (float64 for a complex128 system). Differentiable in a, b, c.

        Raises:
            ValueError: if `length` is negative.
        """
        if length < 0:
            raise ValueError(f"length={length} must not be negative")
        if length == 0:
            return self.skip.new_zeros(self.num_systems, 0)
        inner = 1 << ((length - 1).bit_length() + 1) // 2
        outer = -(-length // inner)
        device = self.a.device
        fine = self.powers(torch.arange(inner, device=device))
        coarse = self.powers(torch.arange(outer, device=device) * inner)
        coarse = coarse * _widen(self.b * self.c)[..., None]
        # Re(x y) as real products: half of the work of the complex one, and its gradient stays real
        table = coarse.real.mT @ fine.real - coarse.imag.mT @ fine.imag
        return 2 * table.flatten(1)[:, :length].to(self.skip.dtype)

    def step(
        self,
        u: Inexact[Tensor, "B H *inner"],
        state: Complex[Tensor, "B H *inner half"] | None = None,
    ) -> tuple[Inexact[Tensor, "B H *inner"], Complex[Tensor, "B H *inner half"]]:
        """Advance by one input.

        Args:
            u: Input, (B, H, ...); the further axes are independent channels of one head.
            state: State before this input, (B, H, ..., N/2); None for zero.

        Returns:
            The output, shape and dtype of `u`, and the state after this input.
        """
        axes = (slice(None), *([None] * (u.dim() - 2)))  # [H, 1, ..., N/2]
        a, b, c = self.a[axes], self.b[axes], self.c[axes]
        wide = u.to(self.skip.dtype)
        new = b * wide[..., None]
        if state is not None:
            new = a * state + new
        y = 2 * (c * new).real.sum(-1) + self.skip[axes] * wide
        return y.to(u.dtype), new

    def dense(
        self,
    ) -> tuple[Float[Tensor, "H N N"], Float[Tensor, "H N"], Float[Tensor, "H N"]]:
        """The system on real states (Re x, Im x): A, b and the read-out row, float64.

        y = row x + skip u.
        """
        a, b, c = (_widen(x) for x in (self.a, self.b, self.c))
        re, im = torch.diag_embed(a.real), torch.diag_embed(a.imag)
        A = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
        return A, torch.cat([b.real, b.imag], -1), torch.cat([2 * c.real, -2 * c.imag], -1)

    def chunk_operators(
        self,
        taps: Float[Tensor, "D n_taps"] | None = None,
        chunk_length: int = DEFAULT_CHUNK_LENGTH,
    ) -> "ChunkOperators":
        """Build the matrices that carry this system over chunks of `chunk_length` inputs.

        On an NVIDIA GPU with Triton one operator makes all of them (`ssm.fused_operators`).

        Args:
            taps: Taps of a short filter in front of the system (`ShiftSSM.taps()`), (D, n_taps);
                D is a multiple of H.
            chunk_length: T, the length of a chunk.

        Raises:
            ValueError: if `chunk_length` is not positive.
        """
        if chunk_length < 1:
            raise ValueError(f"chunk_length={chunk_length} must be positive")
        T = chunk_length
        if can_fuse(self.a, taps, T):
            M, K, P, filters, decay = fused_operators(self.a, self.b, self.c, self.skip, taps, T)
            return ChunkOperators(M, K, P, filters, decay, system=self, taps=taps)
        return self.plain_chunk_operators(taps, T)

    def plain_chunk_operators(self, taps: Tensor | None, T: int) -> "ChunkOperators":
        """`chunk_operators` in plain PyTorch, on any device."""
        response = self.filter(T)
        response = torch.cat([response[:, :1] + self.skip[:, None], response[:, 1:]], 1)
        into, out = self._power_tables(T)
        return ChunkOperators(
            M=lower_toeplitz(response, 1, T)[:, 0],
            K=torch.cat([into.real, into.imag], 1),
            P=torch.cat([out.real, -out.imag], 1).mT,
            F=None if taps is None else lower_toeplitz(taps, 1 + -(-(taps.shape[1] - 1) // T), T),
            decay=self.powers(torch.full((1,), T, device=self.a.device))[..., 0].to(self.a.dtype),
            system=self,
            taps=taps,
        )

    def _power_tables(self, T: int) -> tuple[Complex[Tensor, "H half T"], ...]:
        """B a^{T-1} .. b a^0 and 2 c a^1 .. 2 c a^T, as products of two short tables.

        The short tables are made in float64 and rounded before the product: one rounding more,
        for an eighth of the exponentials and half of the memory.
        """
        inner = 1 << ((T - 1).bit_length() + 1) // 2
        fine = torch.arange(inner, device=self.a.device)
        coarse = torch.arange(-(-T // inner), device=self.a.device) * inner
        low, high, after = (
            self.powers(exponents).to(self.a.dtype) for exponents in (fine, coarse, coarse + 1)
        )
        into = (self.b[..., None] * high).flip(-1)[..., None] * low.flip(-1)[..., None, :]
        out = (2 * self.c[..., None] * after)[..., None] * low[..., None, :]
        return into.flatten(-2)[..., -T:], out.flatten(-2)[..., :T]


@dataclass(frozen=True)
class ChunkOperators:
    """The matrices of state passing for chunks of T inputs.

    With w the input of the diagonal SSM, x the state before a chunk (real and imaginary parts
    stacked) and k the input of the short filter, for chunk c:

        s_c = sum_m F_m k_{c-m};   y_c = M w_c + P x_c;   x_{c+1} = decay x_c + K w_c

        F_m[t, u] = taps[m T + t - u]         M[t, u] = 2 Re(sum_n c_n a_n^{t-u} b_n), t >= u,
        K[n, u]   = a_n^{T-1-u} b_n                     plus the skip on the diagonal
        P[t, n]   = 2 c_n a_n^{t+1}           decay   = a^T

    K's rows are (real, imaginary) and P's columns (real, -imaginary), so that P x is the real
    part of the complex product.
    Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 2, with powers from 1 in P.

    Attributes:
        M: (H, T, T), float32 (float64 for a complex128 system).
        K: (H, N, T).
        P: (H, T, N).
        F: (D, 1 + ceil((n_taps - 1) / T), T, T), or None without taps.
        decay: a^T, what a chunk leaves of the state before it, (H, N/2), complex; made in float64,
            then rounded.
        system: The system that the operators were made from.
        taps: The taps that `F` was made from, (D, n_taps), or None.
    """

    M: Tensor
    K: Tensor
    P: Tensor
    F: Tensor | None
    decay: Tensor
    system: DiagonalSystem
    taps: Tensor | None

    @property
    def chunk_length(self) -> int:
        """T, the number of inputs of one chunk."""
        return self.M.shape[-1]

    @property
    def n_taps(self) -> int:
        """Number of taps of the short filter; 0 without one."""
        return 0 if self.taps is None else self.taps.shape[1]

    @property
    def num_modes(self) -> int:
        """N/2, the number of stored complex modes."""
        return self.decay.shape[1]

    def powers(self, exponents: Integer[Tensor, " J"]) -> Complex[Tensor, "H half J"]:
        """A to small powers, made in float64 and rounded: decay over a part of a chunk."""
        return self.system.powers(exponents).to(self.decay.dtype)

    def decay_powers(self, counts: Integer[Tensor, " J"]) -> Complex[Tensor, "H half J"]:
        """Decay over several chunks, a^(T j), made in float64 and rounded."""
        return self.powers(counts * self.chunk_length)


def lower_toeplitz(first: Tensor, blocks: int, T: int) -> Tensor:
    """Toeplitz blocks [rows, m, t, u] = first[rows, m T + t - u], zero outside of `first`."""
    length = blocks * T
    first = first[:, :length]
    padded = F.pad(first, (T - 1, length - first.shape[1]))
    return padded.unfold(1, T, 1).flip(-1).unflatten(1, (blocks, T))


def _widen(x: Tensor) -> Tensor:
    # Apple's GPUs have no float64: the powers are then as good as float32 makes them
    return x if x.device.type == "mps" else x.to(torch.complex128)
