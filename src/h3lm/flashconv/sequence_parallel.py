"""One sequence over several processes: each holds a slice, and states pass between them.

What a slice leaves behind, e_r, is gathered from all; the state in front of slice r is then

    x_{r+1} = a^{L_r} x_r + e_r,    x_0 = 0

`h3_core` makes e_r first, from that end of the slice which the slowest mode still remembers there,
and then runs the slice from x_r. `ssm_conv`, which has no way to a state alone, runs the slice from
an empty state and adds what x_r adds to its outputs, as far as the slowest mode remembers it.
Of the short filter only its last taps - 1 inputs go to the next process. Gradients go the other
way by the same two exchanges. A state that has decayed to a sixteenth of a rounding error of what
it was counts as forgotten, which is below what the sums themselves round; nothing else is
approximated.

Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 2, over processes in place of chunks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from h3lm.flashconv import op
from h3lm.flashconv.checks import AnySystem
from h3lm.flashconv.state import H3State
from h3lm.ssm.dplr import DPLRSystem
from h3lm.ssm.operators import ChunkOperators, DiagonalSystem

UNIT = 64  # positions
# torch 2.13 renamed them
_ALL_GATHER, _REDUCE_SCATTER = (
    getattr(distributed, new, None) or getattr(distributed, old)
    for new, old in (
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
    )
)


@torch.compiler.disable  # a graph cannot hold what other processes send
def h3_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    system: DiagonalSystem | ChunkOperators,
    *,
    process_group: ProcessGroup,
    head_dim: int,
    initial_state: H3State | None,
    cu_seqlens: Tensor | None,
    backend: str,
    with_state: bool = True,
    qkv: Tensor | None = None,
    received: "Received | None" = None,
) -> tuple[Tensor, H3State | None]:
    """`flashconv.h3_core` of this process's slice; see there.

    Args:
        q, k, v, taps, system, process_group, head_dim: As there.
        initial_state, cu_seqlens, backend: As there.
        with_state: As `return_final_state` there.
        qkv: What q, k and v are thirds of, as in `flashconv.h3_core_qkv`.
        received: Where to keep what others send, and to find it if this call is one done again.
            Without its `slowest` the host asks the device, and waits for all that that has to do.
    """
    received = Received() if received is None else received
    slice_ = _Slice.of(k.shape[-1], cu_seqlens, process_group)
    slice_.check_start(initial_state)
    modes = system.system if isinstance(system, ChunkOperators) else system
    count = taps.shape[1] - 1
    slice_.check_long_enough(count)
    # Every process takes the same steps, needed or not: what one skips, another would wait for
    begin = slice_.remembered(slice_.reach(modes, received.slowest), count)
    tail = max(slice_.last_start, slice_.length - count)
    D = k.shape[1]
    run: Callable[..., tuple[Tensor, H3State | None]]
    if qkv is None:
        k, k_tail, k_end = _WithEnds.apply(k, (0, D, tail), (0, D, begin))
        v, v_end = _WithEnds.apply(v, (0, D, begin))
        run = partial(op.h3_core, q, k, v)
    else:
        ends = (D, 2 * D, tail), (D, 2 * D, begin), (2 * D, 3 * D, begin)
        qkv, k_tail, k_end, v_end = _WithEnds.apply(qkv, *ends)
        run = partial(op.h3_core_qkv, qkv)
    history = _send_on(k_tail, count, slice_, received)
    start = op.zero_state(slice_.rows(k), k, taps, system, head_dim)
    start = H3State(_add_to_first(start.shift, history), start.diagonal)
    if initial_state is not None:
        start = H3State(start.shift + initial_state.shift, start.diagonal + initial_state.diagonal)
    # what is so far known to stand in front of all that the end state is made of
    known = start if begin == 0 else None
    end = op.h3_end_state(
        k_end, v_end, taps, system, head_dim=head_dim, initial_state=known, backend=backend
    )
    before = _state_before(end.diagonal, modes, slice_, received)
    return run(
        taps, system, head_dim=head_dim,
        initial_state=H3State(start.shift, _add_to_first(start.diagonal, before)),
        return_final_state=with_state, cu_seqlens=slice_.cu_seqlens, backend=backend,
    )  # fmt: skip


@torch.compiler.disable
def ssm_conv(
    u: Tensor,
    system: AnySystem,
    *,
    process_group: ProcessGroup,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    method: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`flashconv.ssm_conv` of this process's slice; see there. The state is always made.

    Raises:
        ValueError: if the system is not diagonal.
    """
    slice_ = _Slice.of(u.shape[-1], cu_seqlens, process_group)
    slice_.check_start(initial_state)
    modes = system if isinstance(system, DiagonalSystem | DPLRSystem) else system.system
    if not isinstance(modes, DiagonalSystem):
        raise ValueError("process_group needs a diagonal system: S4's state has no decay by modes")
    y, end = op.ssm_conv(
        u, system, pre_gate=pre_gate, post_gate=post_gate, initial_state=initial_state,
        return_final_state=True, cu_seqlens=slice_.cu_seqlens, method=method, backend=backend,
    )  # fmt: skip
    assert end is not None
    last = end if slice_.cu_seqlens is None else end[-1:]
    before = _state_before(last, modes, slice_, Received())
    left = _over_heads(_decay(modes, slice_.first_end).to(before.dtype), before) * before
    reach = slice_.felt(slice_.reach(modes))
    added, _ = op.ssm_conv(
        torch.zeros_like(u[..., :reach]), system, initial_state=before, method=method,
        post_gate=None if post_gate is None else post_gate[..., :reach], backend=backend,
    )  # fmt: skip
    return _AddToBeginning.apply(y, added), _add_to_first(end, left)


def slice_boundaries(cu_seqlens: Tensor, start: int, stop: int) -> Tensor:
    """Boundaries of packed sequences as a slice of their row sees them.

    Where a sequence begins with the slice, 0 stands there twice: the sequence of length 0 in
    front is what the slices before had.

    Args:
        cu_seqlens: Boundaries of the whole row, (S + 1,).
        start, stop: First position of the slice, and one past its last.

    Returns:
        Rising boundaries from 0 to stop - start.
    """
    inside = cu_seqlens[(cu_seqlens >= start) & (cu_seqlens < stop)] - start
    edges = cu_seqlens.new_tensor([0]), cu_seqlens.new_tensor([stop - start])
    return torch.cat([edges[0], inside, edges[1]])


def gather_lengths(length: int, group: ProcessGroup, device: torch.device) -> Tensor:
    """Length of every process's slice, in order, on the device."""
    return _gather(torch.full((1,), length, device=device), group).flatten()


@torch.compiler.disable
def gather_positions(x: Tensor, lengths: list[int], group: ProcessGroup) -> Tensor:
    """All processes' slices (B, heads, L, d) of keys or values, joined along the positions.

    The gradient of a slice is the sum of what all processes make of it.

    Args:
        x: This process's slice.
        lengths: Of every process's slice, as `gather_lengths` tells.
        group: The processes.
    """
    return _GatherPositions.apply(x, lengths, group)


class Received:
    """What others have sent in a call, for the same call done again in a backward pass.

    A recomputed layer so waits for nobody in its forward pass. All processes must keep it, or none.

    Attributes:
        parts: What was sent, by name.
        layers: The same for each of several layers.
        slowest: The largest |a| of the layer's system in this call, where it is known.
    """

    slowest: float | None = None

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}
        self.layers: dict[object, Received] = {}

    def of(self, layer: object) -> "Received":
        """What came for one of several layers."""
        return self.layers.setdefault(layer, Received())

    def part(self, name: str, receive: Callable[[], Tensor]) -> Tensor:
        """A part that was received before, or else is now."""
        if name not in self.parts:
            self.parts[name] = receive()
        return self.parts[name].detach()  # or what an operator returns would hold its graph here


@dataclass(frozen=True)
class _Slice:
    """Where a process's slice stands among those of the others.

    Attributes:
        length: Its positions.
        group: The processes that share the row.
        rank: This one's number among them.
        goes_on: Whether its first sequence has begun in a slice before.
        cu_seqlens: Its sequences' boundaries, or None for a single one.
        first_end: Where its first sequence ends.
        last_start: Where its last sequence begins.
    """

    length: int
    group: ProcessGroup
    rank: int
    goes_on: bool
    cu_seqlens: Tensor | None
    first_end: int
    last_start: int

    @classmethod
    def of(cls, length: int, cu_seqlens: Tensor | None, group: ProcessGroup) -> "_Slice":
        if not length:
            raise ValueError("a slice is empty: use fewer processes than positions")
        rank = distributed.get_rank(group)
        bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
        goes_on = bounds[:2] != [0, 0]
        if not goes_on:
            assert cu_seqlens is not None
            bounds, cu_seqlens = bounds[1:], cu_seqlens[1:]
        if len(bounds) == 2 and bounds == [0, length]:
            cu_seqlens = None
        return cls(length, group, rank, goes_on, cu_seqlens, bounds[1], bounds[-2])

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == distributed.get_world_size(self.group) - 1

    @property
    def passes_through(self) -> bool:
        """Whether one sequence comes from before and leaves behind."""
        return self.goes_on and self.cu_seqlens is None

    def rows(self, like: Tensor) -> int:
        return len(like) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def check_start(self, state: object) -> None:
        if state is not None and not self.is_first:
            raise ValueError("initial_state stands before the whole row: only rank 0 gives one")

    def check_long_enough(self, count: int) -> None:
        """Check that the next slice finds the inputs of its short filter in this one alone."""
        if count > self.length and self.passes_through and not self.is_last:
            raise ValueError(
                f"a slice of {self.length} positions is shorter than the {count} values that the "
                "short filter takes from it: use fewer processes or longer rows"
            )

    def reach(self, system: DiagonalSystem, slowest: float | None = None) -> int | None:
        """For how many positions a state is felt; None for ever.

        Behind it the slowest mode has decayed to a sixteenth of a rounding error of what it was. It
        is whole units: rows of another length the kernels do not take.
        """
        if slowest is None:
            slowest = float(slowest_decay(system))
        if slowest >= 1:
            return None
        steps = 1.0
        if slowest > 0:
            steps += math.log(torch.finfo(system.a.real.dtype).eps / 16) / math.log(slowest)
        return UNIT * math.ceil(steps / UNIT)

    def felt(self, reach: int | None) -> int:
        """How far into the slice the state before it is felt, in positions; at least 1."""
        if self.is_first or not self.goes_on:
            # nothing comes in; but all processes must take part in the gradient's way
            reach = UNIT
        return self.first_end if reach is None else min(self.first_end, reach)

    def remembered(self, reach: int | None, count: int) -> int:
        """From where on positions are remembered by the state behind the slice.

        What the `count` inputs in front of it add to the first values of the short filter is
        forgotten, too.
        """
        if reach is None:
            return self.last_start
        return max(self.last_start, self.length - reach - UNIT * math.ceil(count / UNIT))


def slowest_decay(system: DiagonalSystem) -> Tensor:
    """The largest |a|, where the system is."""
    return system.a.detach().abs().amax()


def _send_on(tail: Tensor, count: int, slice_: _Slice, received: Received) -> Tensor:
    """The `count` values of k in front of the slice, sent by the process before."""
    return _FromBefore.apply(F.pad(tail, (count - tail.shape[-1], 0)), slice_, received)


def _state_before(
    end: Tensor, system: DiagonalSystem, slice_: _Slice, received: Received
) -> Tensor:
    """The state in front of the slice, from what the last sequence of each slice leaves behind."""
    if slice_.passes_through and not slice_.is_last:
        through = _decay(system, slice_.first_end).to(end.dtype)
    else:
        through = torch.zeros_like(system.a, dtype=end.dtype)
    return _StateBefore.apply(end, through, slice_, received)


def _decay(system: DiagonalSystem, steps: int) -> Tensor:
    # filled there: to copy a number to a device is to wait for it
    return system.powers(torch.full((1,), steps, device=system.a.device))[..., 0]


def _over_heads(decay: Tensor, state: Tensor) -> Tensor:
    """Decays (H, N/2) as factors of states (rows, H, ..., N/2)."""
    return decay.view(1, len(decay), *[1] * (state.dim() - 3), -1)


def _add_to_first(states: Tensor, more: Tensor) -> Tensor:
    """Add to the states of the rows, or of the first of packed sequences."""
    if len(states) == len(more):
        return states + more
    return torch.cat([states[:1] + more, states[1:]])


class _WithEnds(torch.autograd.Function):
    """x, and ends of some channels; their gradients are added where that of x lies.

    So x must be given to an operator whose gradient nobody else has: autograd by itself would
    write a whole x of zeros for each end. An end is (first channel, one past the last, position).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *ends: tuple[int, int, int]) -> tuple[Tensor, ...]:
        ctx.ends = ends
        return x.view_as(x), *(x[:, first:stop, begin:] for first, stop, begin in ends)

    @staticmethod
    @once_differentiable  # the gradient is added to in place
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, *of_ends = grads
        for (first, stop, begin), end in zip(ctx.ends, of_ends, strict=True):
            grad[:, first:stop, begin:] += end
        return grad, *[None] * len(of_ends)


class _AddToBeginning(torch.autograd.Function):
    """Add something to the first positions of y, in place; its gradient is nowhere copied."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, more: Tensor) -> Tensor:
        ctx.reach = more.shape[-1]
        ctx.mark_dirty(y)
        y[..., : ctx.reach] += more
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        return grad, grad[..., : ctx.reach]


class _FromBefore(torch.autograd.Function):
    """What the process before sends; zero for the first one and where a sequence begins."""

    @staticmethod
    def forward(ctx: Any, tail: Tensor, slice_: _Slice, received: Received) -> Tensor:
        ctx.slice = slice_
        came = received.part("history", lambda: _to_neighbour(tail, slice_, 1))
        return came if slice_.goes_on else torch.zeros_like(came)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        grad = grad if ctx.slice.goes_on else torch.zeros_like(grad)
        return _to_neighbour(grad, ctx.slice, -1), None, None


def _to_neighbour(x: Tensor, slice_: _Slice, by: int) -> Tensor:
    """Send to the process `by` further, and return what the one on the other side sends."""
    group, rank = slice_.group, slice_.rank
    came = torch.zeros_like(x, memory_format=torch.contiguous_format)
    world = distributed.get_world_size(group)
    x = x.contiguous()
    moves = []
    for move, what, other in (
        (distributed.isend, x, rank + by),
        (distributed.irecv, came, rank - by),
    ):
        if 0 <= other < world and x.numel():
            peer = distributed.get_global_rank(group, other)
            moves.append(distributed.P2POp(move, what, peer, group))
    for work in distributed.batch_isend_irecv(moves) if moves else ():
        work.wait()
    return came


class _StateBefore(torch.autograd.Function):
    """x_r of x_{r+1} = d_r x_r + e_r, x_0 = 0, for this process's e and d."""

    @staticmethod
    def forward(ctx: Any, end: Tensor, decay: Tensor, slice_: _Slice, received: Received) -> Tensor:
        count = end.numel()
        both = torch.cat([end.flatten(), decay.flatten()])
        gathered = received.part("states", lambda: _gather_complex(both, slice_.group))
        decays = gathered[:, count:].unflatten(1, decay.shape)
        before = torch.zeros_like(end, memory_format=torch.contiguous_format)
        for r in range(slice_.rank):
            before = _over_heads(decays[r], end) * before + gathered[r, :count].view_as(end)
        if not slice_.goes_on:
            before = torch.zeros_like(before)
        ctx.slice = slice_
        ctx.save_for_backward(decays, before)
        return before

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        decays, before = ctx.saved_tensors
        slice_: _Slice = ctx.slice
        grad = grad if slice_.goes_on else torch.zeros_like(grad)
        all_grads = _gather_complex(grad, slice_.group)
        behind = torch.zeros_like(before)  # the gradient of x_{r+1}
        for r in range(len(all_grads) - 1, slice_.rank, -1):
            behind = all_grads[r] + _over_heads(decays[r], before).conj() * behind
        product = before.conj() * behind
        inner = [0, *range(2, product.dim() - 1)]
        return behind, product.sum(inner), None, None


class _GatherPositions(torch.autograd.Function):
    """All-gather along the positions; reduce-scatter of its gradient.

    Positions come first on the way, as a projection has them in memory: slices of one length are
    then joined, and their gradients cut, as they come and go.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], group: ProcessGroup) -> Tensor:
        ctx.lengths, ctx.group = lengths, group
        slices = _gather(_padded(x.permute(2, 0, 1, 3), max(lengths)), group)
        if _alike(lengths):
            return slices.flatten(0, 1).permute(1, 2, 0, 3)
        cut = [s[:n] for s, n in zip(slices, lengths, strict=True)]
        return torch.cat(cut).permute(1, 2, 0, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        lengths, longest = ctx.lengths, max(ctx.lengths)
        grad = grads[0].permute(2, 0, 1, 3)
        if not _alike(lengths):
            grad = torch.cat([_padded(g, longest) for g in grad.split(lengths)])
        mine = grad.new_empty(longest, *grad.shape[1:])
        _REDUCE_SCATTER(mine, grad.contiguous(), group=ctx.group)
        own = lengths[distributed.get_rank(ctx.group)]
        return mine[:own].permute(1, 2, 0, 3), None, None


def _padded(x: Tensor, length: int) -> Tensor:
    return x if len(x) == length else F.pad(x, (0, 0) * (x.dim() - 1) + (0, length - len(x)))


def _alike(lengths: list[int]) -> bool:
    return min(lengths) == max(lengths)


def _gather_complex(x: Tensor, group: ProcessGroup) -> Tensor:
    """`_gather` of complex tensors, which not every library sends."""
    return torch.view_as_complex(_gather(torch.view_as_real(x.resolve_conj()), group))


def _gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """All processes' tensors of one shape, stacked in their order."""
    x = x.contiguous()
    world = distributed.get_world_size(group)
    gathered = x.new_empty(world, *x.shape)
    _ALL_GATHER(gathered.flatten(0, 1), x, group=group)
    return gathered
