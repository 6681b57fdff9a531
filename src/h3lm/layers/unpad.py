"""Masked positions taken out, so that they are as if they were not there."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

State = TypeVar("State", bound=tuple[Tensor, ...])


def check_mask(shape: torch.Size, rows: int, length: int) -> None:
    """Refuse a mask of another shape.

    Raises:
        ValueError: naming both shapes.
    """
    if shape != (rows, length):
        raise ValueError(f"mask is {tuple(shape)}, the input has {rows} rows of {length} positions")


class Unpadded:
    """The unmasked positions of a batch as sequences packed in one row.

    Setting masked inputs to zero is not enough: projections have biases, and the state would
    still decay over masked positions.

    Args:
        mask: (B, L), nonzero where a position counts; anywhere, not only at an end.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        mask = mask.bool()
        lengths = mask.sum(1)
        self._position = mask.flatten().nonzero()[:, 0]
        self._rows = lengths.nonzero()[:, 0]  # rows with anything at all
        self.cu_seqlens = F.pad(lengths[self._rows].cumsum(0), (1, 0))

    def run(
        self,
        op: Callable[..., tuple[Tensor, State]],
        state: State,
        inputs: tuple[Tensor, ...],
    ) -> tuple[Tensor, State]:
        """Run `op(state, cu_seqlens, *packed_inputs) -> (output, state)` on what counts.

        Args:
            op: A function of packed rows, (1, D, total).
            state: A named tuple of tensors with the batch row first; rows without any unmasked
                position keep theirs.
            inputs: Tensors (B, D, L).

        Returns:
            The output (B, D, L), zero at masked positions, and the new state.

        Raises:
            ValueError: if the mask is not of these inputs.
        """
        for x in inputs:
            check_mask(self.shape, x.shape[0], x.shape[2])
        if not len(self._rows):
            return torch.zeros_like(inputs[0]), state
        output, new = op(
            type(state)(*(x[self._rows] for x in state)),
            self.cu_seqlens,
            *(self._pack(x) for x in inputs),
        )
        merged: list[Any] = [
            old.index_copy(0, self._rows, x.to(old.dtype))
            for old, x in zip(state, new, strict=True)
        ]
        return self._unpack(output), type(state)(*merged)

    def _pack(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1)[:, self._position][None]

    def _unpack(self, y: Tensor) -> Tensor:
        D = y.shape[1]
        flat = y.new_zeros(D, self.shape.numel()).index_copy(1, self._position, y[0])
        return flat.view(D, *self.shape).transpose(0, 1)
