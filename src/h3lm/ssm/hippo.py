"""HiPPO-LegS and the diagonal state matrices made from it.

Source: Gu et al. 2020 (HiPPO), Gu et al. 2022 (S4, S4D); `A` and `B` as there, real, lower
triangular. Everything is built in float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

DIAGONAL_INITS = ("lin", "inv", "legs")


class NormalPlusLowRank(NamedTuple):
    """Half of the conjugate pairs of `A = V (diag(eigenvalues) - P P*) V*`.

    Attributes:
        eigenvalues: (N/2,) complex128, real part -1/2, imaginary parts positive and ascending.
        P: (N/2,) complex128, the low-rank vector in the eigenbasis; real and positive.
        B: (N/2,) complex128, the input vector in the eigenbasis; equals sqrt(2) P.
        V: (N, N/2) complex128, the kept eigenvectors.
    """

    eigenvalues: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def legs_matrices(d_state: int) -> tuple[Float[Tensor, "N N"], Float[Tensor, " N"]]:
    """Build the HiPPO-LegS matrices.

        A[m, k] = -sqrt(2m+1) sqrt(2k+1) for m > k, -(m+1) for m = k, 0 above;  B[m] = sqrt(2m+1)

    Args:
        d_state: State size N, at least 1.

    Returns:
        `A` (N, N) and `B` (N,), float64.
    """
    n = torch.arange(d_state, dtype=torch.float64, device="cpu")
    root = torch.sqrt(2 * n + 1)
    A = -torch.tril(root[:, None] * root[None, :], diagonal=-1) - torch.diag(n + 1)
    return A, root


def legs_normal_plus_low_rank(d_state: int) -> NormalPlusLowRank:
    """Diagonalise HiPPO-LegS as a normal matrix plus a rank-one correction.

    `A + P P^T` with `P[m] = sqrt(m + 1/2)` is -1/2 I plus a skew-symmetric matrix, which a
    Hermitian solver handles with condition number one; the eigenvectors of `A` itself are
    numerically singular from N = 32 on. Each eigenvector's free phase is fixed so that `P` is
    real and positive, which makes the result the same on every machine.

    Args:
        d_state: State size N, even.

    Raises:
        ValueError: if `d_state` is odd or not positive.
    """
    _check_even(d_state)
    A, B = legs_matrices(d_state)
    P = torch.sqrt(torch.arange(d_state, dtype=torch.float64, device="cpu") + 0.5)
    skew = A + torch.outer(P, P) + 0.5 * torch.eye(d_state, dtype=torch.float64, device="cpu")
    skew = (skew - skew.T) / 2
    frequency, V = torch.linalg.eigh(-1j * skew)  # ascending; the upper half is positive
    frequency, V = frequency[d_state // 2 :], V[:, d_state // 2 :]
    projected = V.mH @ P.to(V.dtype)
    V = V * (projected / projected.abs())
    return NormalPlusLowRank(
        eigenvalues=torch.complex(torch.full_like(frequency, -0.5), frequency),
        P=V.mH @ P.to(V.dtype),
        B=V.mH @ B.to(V.dtype),
        V=V,
    )


def diagonal_eigenvalues(init: str, d_state: int) -> Complex[Tensor, " half"]:
    """Continuous-time eigenvalues of a diagonal SSM, one of each conjugate pair.

    | init | name | imaginary part of mode n |
    |---|---|---|
    | lin | S4D-Lin | pi n |
    | inv | S4D-Inv | (N/pi) (N/(2n+1) - 1) |
    | legs | S4D-LegS | eigenvalues of the normal part of HiPPO-LegS, ascending |

    The real part is -1/2 in all of them.

    Args:
        init: One of "lin", "inv", "legs".
        d_state: True state size N, even; N/2 modes are returned.

    Returns:
        (N/2,) complex128.

    Raises:
        ValueError: if `init` is unknown or `d_state` is odd.
    """
    _check_even(d_state)
    n = torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    if init == "lin":
        imaginary = torch.pi * n
    elif init == "inv":
        imaginary = d_state / torch.pi * (d_state / (2 * n + 1) - 1)
    elif init == "legs":
        return legs_normal_plus_low_rank(d_state).eigenvalues
    else:
        raise ValueError(f"init={init!r} is not one of {', '.join(DIAGONAL_INITS)}")
    return torch.complex(torch.full_like(imaginary, -0.5), imaginary)


def _check_even(d_state: int) -> None:
    if d_state < 2 or d_state % 2:
        raise ValueError(
            f"d_state={d_state} must be even and positive: modes are stored as conjugate pairs"
        )
