"""Rows over several processes: each runs the model on one contiguous slice of every row.

H3 layers pass states between the slices (`flashconv.sequence_parallel`); attention layers gather
keys and values. All else works position by position.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from h3lm.flashconv.sequence_parallel import (
    Received,
    gather_lengths,
    gather_positions,
    slowest_decay,
)
from h3lm.layers import H3, CausalAttention

if TYPE_CHECKING:
    from h3lm.models.modeling_h3 import H3ForCausalLM


@dataclass(frozen=True)
class RowSlice:
    """Which part of the rows this process holds.

    Attributes:
        group: The processes that share the rows, in the order of their slices.
        lengths: Positions of each slice.
        start: Position of this slice's first.
        received: What others sent to H3 layers, which recomputed blocks do not ask for again, and
            how slowly the layers' states decay; keys and values of attention layers, which are
            large, recomputed blocks gather again.
    """

    group: ProcessGroup
    lengths: tuple[int, ...]
    start: int
    received: Received = field(default_factory=Received)

    @classmethod
    def of(cls, x: Tensor, group: ProcessGroup, layers: Iterable[nn.Module] = ()) -> "RowSlice":
        """The slice that (B, L, ...) is; all processes must ask.

        Args:
            x: The slice.
            group: The processes.
            layers: Blocks; how slowly the states of their H3 layers decay is asked for here: the
                host waits for the device once for all of them.
        """
        mixers = [m for m in (getattr(b, "mixer", None) for b in layers) if isinstance(m, H3)]
        asked = [gather_lengths(x.shape[1], group, x.device).double()]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            asked += [slowest_decay(m.diagonal_ssm.system()).double()[None] for m in mixers]
        told = torch.cat(asked).tolist()
        world = distributed.get_world_size(group)
        received = Received()
        for mixer, slowest in zip(mixers, told[world:], strict=True):
            received.of(mixer).slowest = slowest
        lengths = tuple(int(n) for n in told[:world])
        return cls(group, lengths, sum(lengths[: distributed.get_rank(group)]), received)

    @property
    def stop(self) -> int:
        """One past the position of this slice's last."""
        return self.start + self.lengths[distributed.get_rank(self.group)]

    def positions(self, device: torch.device) -> Tensor:
        """Positions in the row, (1, L)."""
        return torch.arange(self.start, self.stop, device=device)[None]

    @torch.compiler.disable  # no graph holds what others send
    def up_to_here(self, x: Tensor) -> Tensor:
        """Keys or values (B, heads, L, d) of all slices up to this one's end."""
        return gather_positions(x, list(self.lengths), self.group)[:, :, : self.stop]

    def boundaries(self, position_ids: Tensor, rows: int) -> Tensor | None:
        """Boundaries of packed documents, as `sequence_parallel.slice_boundaries` has them.

        Args:
            position_ids: (1 or B, L), counted from each document's beginning in whatever slice.
            rows: B.

        Returns:
            None where a single document fills the slice and comes from the one before.

        Raises:
            ValueError: if several rows hold several documents.
        """
        first = position_ids[:, :1] == 0 if self.start else torch.zeros_like(position_ids[:, :1])
        begins = torch.cat([first.bool(), position_ids.diff(dim=1) != 1], 1)
        several = bool((position_ids != self.positions(position_ids.device)).any())
        if several and rows != 1:
            raise ValueError(
                f"documents packed in {rows} rows over several processes: give one row at a time"
            )
        if not bool(begins.any()):
            return None
        edge = begins.new_zeros(1, dtype=torch.long)
        starts = begins[0].nonzero()[:, 0]
        return torch.cat([edge, starts, edge + position_ids.shape[1]])

    def attention_mask(self, position_ids: Tensor) -> Tensor | None:
        """Which of the keys up to this slice's end each position sees, (1, 1, L, S).

        Args:
            position_ids: (1 or B, L), counted from each document's beginning.

        Returns:
            None where each sees all before it: its document began with the row.
        """
        if bool((position_ids == self.positions(position_ids.device)).all()):
            return None
        here = self.positions(position_ids.device)[0][:, None]
        key = torch.arange(self.stop, device=position_ids.device)
        seen = (key <= here) & (key >= here - position_ids[0][:, None])
        return seen[None, None]


@torch.library.custom_op("h3lm::stand_in", mutates_args=())
def stand_in(r: Tensor) -> Tensor:
    """A tensor of r's form without a memory of its own, whose gradient is r's.

    Where a compiled block is cut, what goes around the cut would get its gradient in two parts,
    one from each piece, which autograd adds up by themselves. With

        aside = stand_in(r);   ... the cut ...;   r = past_cut(r, aside)

    the part from behind comes to the piece in front as the gradient of an output of its own, and
    is added where that piece makes the other part.

    Args:
        r: (B, L, D).
    """
    # Not expanded from one element: torch 2.11 would have the gradient in that layout
    aside = torch.empty_like(r)
    aside.untyped_storage().resize_(0)
    return aside


@stand_in.register_fake
def _(r: Tensor) -> Tensor:
    return torch.empty_like(r)


stand_in.register_autograd(lambda ctx, grad: grad)


@torch.compiler.disable
def past_cut(r: Tensor, aside: Tensor) -> Tensor:
    """r, whose gradient goes to what stands in for it; see `stand_in`."""
    return _PastCut.apply(r, aside)


class _PastCut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, aside: Tensor) -> Tensor:
        return r.view_as(r)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def slice_bounds(length: int, index: int, count: int) -> tuple[int, int]:
    """First position of slice `index` of `count`, and one past its last.

    The first slices are longer by one where the length does not divide.
    """
    size, more = divmod(length, count)
    start = index * size + min(index, more)
    return start, start + size + (index < more)


def check_mixers(model: "H3ForCausalLM") -> None:
    """Raise ValueError if a layer can pass nothing on between slices."""
    others = {
        layer.mixer_name
        for layer in model.model.layers
        if not isinstance(layer.mixer, H3 | CausalAttention)
    }
    if others:
        raise ValueError(f"rows over several processes: {', '.join(sorted(others))} cannot do it")


def share_rows(model: "H3ForCausalLM", group: ProcessGroup | None) -> None:
    """Have a model take its inputs as slices of rows that a group of processes shares.

    Each process then gives `input_ids` and `shift_labels` of its own slice, and `position_ids`
    where documents are packed; all call, and all call backward. The loss of a process is its
    slice's part: the sum over the processes is the rows', if each is given the number of all
    labels as `num_items_in_batch`.

    Args:
        model: The model.
        group: The processes, in the order of their slices; None for whole rows again.

    Raises:
        ValueError: if a layer can pass nothing on between slices.
    """
    if group is not None:
        check_mixers(model)
    model.model.process_group = group


@contextmanager
def whole_rows(model: "H3ForCausalLM") -> Iterator[None]:
    """Let a model take whole rows in each process for a while."""
    group, model.model.process_group = model.model.process_group, None
    try:
        yield
    finally:
        model.model.process_group = group
