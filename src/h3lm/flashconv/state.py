"""The state that an H3 core hands on."""

from typing import NamedTuple

import torch
from torch import Tensor


class H3State(NamedTuple):
    """What an H3 core remembers of everything before a position.

    Attributes:
        shift: The last n_taps - 1 values of k, oldest first, (B, D, n_taps - 1), dtype of k.
        diagonal: State of the diagonal SSM, complex64 (complex128 in float64):
            (B, D, N/2) for head_dim 1, else (B, H, head_dim, head_dim, N/2) with the axes
            (row, head, channel of k, channel of v, mode).

    With `cu_seqlens` of S sequences the leading axis is S.
    """

    shift: Tensor
    diagonal: Tensor


def diagonal_shape(rows: int, num_heads: int, head_dim: int, num_modes: int) -> tuple[int, ...]:
    """Shape of `H3State.diagonal`."""
    if head_dim == 1:
        return rows, num_heads, num_modes
    return rows, num_heads, head_dim, head_dim, num_modes


def as_real_pairs(state: Tensor) -> Tensor:
    """Complex state (..., N/2) as real pairs (..., N/2, 2): the form that caches store."""
    return torch.view_as_real(state.resolve_conj())


def from_real_pairs(pairs: Tensor) -> Tensor:
    """Real pairs (..., N/2, 2) as a complex state (..., N/2)."""
    return torch.view_as_complex(pairs.contiguous())
