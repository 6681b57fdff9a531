"""Log-likelihoods of many requests, every shared prefix computed once."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from h3lm.evals.batches import like_widths, padded
from h3lm.evals.prefix_tree import STATE_COST_TOKENS, Ints, PrefixTree, Request
from h3lm.evals.states import NO_MASK, States, empty_cache, probe, to_device
from h3lm.models.configuration_h3 import H3Config

GIB = 2**30
LARGE_GPU = 48 * GIB  # free memory from which calls are twice as large
READ_ROWS = 2048
MASK_BYTES = 4  # of a query and a key, at most: masks become floats on their way


class Answer(NamedTuple):
    """Sum of log-probabilities of a continuation, in nats, and whether greedy decoding makes it."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Limits:
    """How much is in memory at a time, and how calls are cut.

    Attributes:
        batch_tokens: Tokens of one call of the model.
        batch_logits: Positions of one call whose logits are computed.
        segment: Longest stretch of an edge in one call; a power of two.
        state_bytes: States of branching points that are kept at a time, and those of a call.
        mask_bytes: Attention masks of one call.
        align: Lengths of all edges are multiples of this: branching points are moved to one, see
            `PrefixTree`, and edges behind which nothing follows are padded.
        call_tokens: What a call costs, as the tokens that take as long.
        state_cost_tokens: What a kept state costs, see `PrefixTree`.
    """

    batch_tokens: int
    batch_logits: int
    segment: int
    state_bytes: int
    mask_bytes: int
    align: int
    call_tokens: int = 32
    state_cost_tokens: int = STATE_COST_TOKENS

    @classmethod
    def of(cls, device: torch.device, state_bytes: int | None = None) -> "Limits":
        """What suits a device.

        Args:
            device: Where the model is.
            state_bytes: Budget for states; an eighth of a GPU's free memory, or 1 GiB, if None.
        """
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            tokens = 65536 if free > LARGE_GPU else 32768
            # Hopper's kernels take multiples of 16; a call is hundreds of launches, 15 ms of a host
            return cls(tokens, tokens // 2, 2048, state_bytes or free // 8, GIB // 2, 16, 16384, 16)
        return cls(2048, 1024, 512, state_bytes or GIB, GIB // 8, 1)


@dataclass
class Work:
    """What a run asked for and what it did.

    Attributes:
        requests: Answered requests.
        asked: Input tokens of the requests, each by itself.
        computed: Tokens on the edges of the tree.
        run: Tokens that went through the model, padding included.
        calls: Calls of the model.
        seconds: Time of it.
        building: Seconds of it that trees took to build.
        waiting: Seconds of it that the host waited for the device's answers.
        peak_state_bytes: Most memory that kept states took at once.
    """

    requests: int = 0
    asked: int = 0
    computed: int = 0
    run: int = 0
    calls: int = 0
    seconds: float = 0.0
    building: float = 0.0
    waiting: float = 0.0
    peak_state_bytes: int = 0


class _Front(NamedTuple):
    """Nodes still to be run, and the states that they branch off from."""

    nodes: Ints
    states: States | None  # None: the root's
    rows: Ints  # row of each node's parent in `states`


class TreeScorer:
    """Scores requests with a causal language model of transformers, one tree at a time.

    Nodes at one distance from the root are run together across documents. An edge that others
    branch off from is run in stretches whose lengths are powers of two, so that no row is padded
    and every state is exact; other edges are padded on the right, where nothing sees the padding,
    those of like length together.
    The tree is walked depth first, in parts as large as the budget for states allows.

    Args:
        model: In eval mode. Its cache has to be of constant states and keys and values.
        limits: What suits the device if None.
        state_cost_tokens: See `PrefixTree`; as the limits say if None.

    Raises:
        UserError: if the model's cache cannot be branched.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        limits: Limits | None = None,
        state_cost_tokens: int | None = None,
    ) -> None:
        self.model, self.device = model, model.device
        self.limits = limits or Limits.of(model.device)
        self.state_cost_tokens = (
            self.limits.state_cost_tokens if state_cost_tokens is None else state_cost_tokens
        )
        with torch.inference_mode():
            self.shape = probe(model)
        config: Any = model.config
        # Ours take no mask for rows of one length: causal, and aligned with the last keys
        self._takes_no_mask = isinstance(config, H3Config)
        self._needs_positions = self.shape.has_attention or bool(
            getattr(config, "num_learned_positions", 0)
        )
        self.work = Work()

    @torch.inference_mode()
    def score(
        self,
        requests: Sequence[Request],
        *,
        finished: Callable[[Sequence[int], Sequence[Answer]], None] | None = None,
    ) -> list[Answer]:
        """Answer requests.

        Args:
            requests: Token ids.
            finished: Called now and then with the numbers of the requests answered since the
                last call, and their answers.

        Returns:
            An answer for each request, in order.
        """
        if not requests:
            return []
        began = time.monotonic()
        tree = PrefixTree(
            requests, state_cost_tokens=self.state_cost_tokens, align=self.limits.align
        )
        self.work.building += time.monotonic() - began
        self.work.asked += tree.asked
        self.work.computed += tree.computed
        answers = _Answers(tree, len(requests), finished)
        for _ in self._walk(tree, answers):
            answers.settle()
        answers.settle(wait=True)
        self.work.waiting += answers.waited
        self.work.requests += len(requests)
        self.work.seconds += time.monotonic() - began
        return answers.all()

    def _walk(self, tree: PrefixTree, answers: "_Answers") -> Iterator[None]:
        """Run all edges, depth first; yields after each part."""
        nodes, rows = tree.children_of(np.zeros(1, dtype=np.int64))
        stack = [_Front(nodes, None, rows)]
        del rows
        while stack:
            front = stack.pop()
            # An edge longer than a call is run in stretches, like one that is branched off from
            length = tree.edge_length[front.nodes]
            staged = (
                tree.has_children[front.nodes]
                | (length > self.limits.batch_tokens)
                | ~self._mask_fits(length, tree.start[front.nodes])
            )
            plain = ~staged
            if plain.any():
                self._run_leaves(
                    tree, _Front(front.nodes[plain], front.states, front.rows[plain]), answers
                )
                yield
            if not staged.any():
                continue
            nodes, rows = front.nodes[staged], front.rows[staged]
            # The deepest subtree last, when nothing of this level has to be kept for others: so
            # that the number of levels kept grows with the logarithm of the tree's size
            order = np.lexsort((tree.depth[nodes], tree.height[nodes]))
            nodes, rows = nodes[order], rows[order]
            held = sum(x.states.nbytes for x in _distinct(stack, front))
            wave = self._rows_that_fit(tree.depth[nodes], held)
            states = self._advance(tree, _Front(nodes[:wave], front.states, rows[:wave]), answers)
            self.work.peak_state_bytes = max(self.work.peak_state_bytes, held + states.nbytes)
            if wave < len(nodes):
                stack.append(_Front(nodes[wave:], front.states, rows[wave:]))
            del front
            below, parents = tree.children_of(nodes[:wave])
            if len(below):
                stack.append(_Front(below, states, parents))
            del states
            yield

    def _rows_that_fit(self, depth: Ints, held: int) -> int:
        """How many of the next nodes may keep a state: half of what is left, at least one."""
        room = max(0, self.limits.state_bytes - held) // 2
        widest = np.maximum.accumulate(depth)
        need = (np.arange(len(depth)) + 1) * (
            self.shape.constant_bytes + widest * self.shape.token_bytes
        )
        return max(1, int(np.searchsorted(need, room, side="right")))

    def _advance(self, tree: PrefixTree, front: _Front, answers: "_Answers") -> States:
        """Run edges and return the states behind them."""
        nodes, length = front.nodes, tree.edge_length[front.nodes]
        slots = int(tree.depth[nodes].max()) if self.shape.has_attention else 0
        if front.states is None:
            states = States.zeros(self.shape, len(nodes), slots)
        else:
            states = front.states.select(front.rows, slots)
        asked, owner = tree.questions.of(nodes)
        done = np.zeros(len(nodes), dtype=np.int64)
        size = self.limits.segment
        while size:
            fits = self._mask_fits(np.array(size), states.lengths) | (size == 1)
            rows = np.flatnonzero((length - done >= size) & fits)
            if not len(rows):
                size //= 2
                continue
            nothing = np.zeros(len(nodes), dtype=np.int64)
            for part in self._parts(rows, size, states.lengths, nothing):
                ids = tree.edge_tokens(nodes[part], done[part], size)
                place = np.full(len(nodes), -1)
                place[part] = np.arange(len(part))
                here = (place[owner] >= 0) & _within(
                    tree.questions.offset[asked], done[owner], size
                )
                at = asked[here]
                column = tree.questions.offset[at] - done[owner[here]]
                begun = bool(states.lengths[part].any())
                in_place = states.are_all(part) and states.is_aligned
                past = states if in_place else states.borrow(part)
                if begun or in_place:
                    cache = past.cache(self.model, in_place=in_place)
                else:
                    cache = empty_cache(self.model)
                self._call(
                    ids,
                    past if begun else None,
                    cache,
                    place[owner[here]] * size + column,
                    at,
                    answers,
                )
                states.take(cache, part, size)
            done[rows] += size
        return states

    def _parts(self, rows: Ints, width: int, past: Ints, asked: Ints) -> Iterator[Ints]:
        """Rows in parts that fit into a call of a width, those behind a like length together.

        Args:
            rows: Some of all rows.
            width: New tokens of each.
            past: (R,) tokens before, of all rows.
            asked: (R,) positions of each of all rows whose logits are asked.
        """
        rows = rows[np.argsort(past[rows], kind="stable")]
        total = np.concatenate([[0], asked[rows].cumsum()])
        begin = 0
        while begin < len(rows):
            end = begin + self._count_that_fits(
                width, past[rows[begin:]], total[begin + 1 :] - total[begin]
            )
            yield rows[begin:end]
            begin = end

    def _count_that_fits(self, width: int, past: Ints, asked: Ints) -> int:
        """How many of some rows fit into a call, at least one; `asked` are running totals."""

        def is_too_much(count: int) -> bool:
            longest, logits = int(past[count - 1]), int(asked[count - 1])
            return not self._fits(count, width, int(past[0]), longest, logits)

        return max(1, bisect_left(range(1, len(past) + 1), True, key=is_too_much))

    def _fits(self, rows: int, new: int, shortest: int, longest: int, logits: int) -> bool:
        """Whether a call of rows behind pasts of such lengths is within the limits."""
        limits = self.limits
        mask = 0 if shortest == longest and self._is_maskless else self._mask_bytes(new, longest)
        return (
            rows * new <= limits.batch_tokens
            and logits <= limits.batch_logits
            and rows * mask <= limits.mask_bytes
            and rows * self.shape.row_bytes(new + longest) <= limits.state_bytes
        )

    def _mask_fits(self, new: Ints, past: Ints) -> NDArray[np.bool_]:
        """Which rows, each in a call of its own, are within the limit on masks."""
        if self._is_maskless or not self.shape.has_attention:
            return np.ones(len(past), dtype=bool)
        return (past == 0) | (new * (new + past) * MASK_BYTES <= self.limits.mask_bytes)

    @property
    def _is_maskless(self) -> bool:
        """Whether rows of one length need no mask in memory; on the CPU torch makes one."""
        return self._takes_no_mask and self.device.type == "cuda"

    def _mask_bytes(self, new: int, past: int) -> int:
        return new * (new + past) * MASK_BYTES if self.shape.has_attention and past else 0

    def _run_leaves(self, tree: PrefixTree, front: _Front, answers: "_Answers") -> None:
        """Run edges behind which nothing follows, padded to a common length."""
        widths = padded(tree.edge_length[front.nodes], self.limits.align)
        past_length = tree.start[front.nodes]
        counts = np.diff(tree.questions.first)[front.nodes]
        for group in like_widths(widths, self.limits.call_tokens):
            width = int(widths[group[-1]])
            for part in self._parts(group, width, past_length, counts):
                self._run_part(tree, front, part, width, answers)

    def _run_part(
        self, tree: PrefixTree, front: _Front, part: Ints, width: int, answers: "_Answers"
    ) -> None:
        nodes = front.nodes[part]
        ids = tree.edge_tokens(nodes, np.zeros(len(part), dtype=np.int64), width)
        asked, owner = tree.questions.of(nodes)
        place = owner * width + tree.questions.offset[asked]
        if front.states is None:
            self._call(ids, None, None, place, asked, answers)
        else:
            past = front.states.for_leaves(front.rows[part], width)
            self._call(ids, past, past.cache(self.model, last=True), place, asked, answers)

    def _call(
        self,
        ids: Ints,
        past: States | None,
        cache: Any,
        place: Ints,
        asked: Ints,
        answers: "_Answers",
    ) -> None:
        """Call the model on (R, L) ids and answer questions at flat positions of it."""
        rows, length = ids.shape
        inputs: dict[str, Tensor | dict[str, None]] = {}
        if past is not None and self._needs_positions:
            seen = to_device(past.lengths, self.device)
            inputs["position_ids"] = seen[:, None] + torch.arange(length, device=self.device)
            if self.shape.has_attention and self._takes_no_mask and past.is_aligned:
                inputs["attention_mask"] = NO_MASK
            elif self.shape.has_attention:
                slots = int(past.lengths.max(initial=0))
                inputs["attention_mask"] = _causal_behind(seen, slots, length)
        order = np.argsort(place, kind="stable")
        at, row = np.unique(place[order], return_inverse=True)
        with _only_at(self.model, to_device(at, self.device)):
            logits = self.model(
                input_ids=to_device(ids, self.device),
                past_key_values=cache,
                use_cache=cache is not None,
                **inputs,
            ).logits[0]
        self.work.calls += 1
        self.work.run += rows * length
        if len(asked):
            asked = asked[order]
            answers.add(asked, *_read(logits, row, answers.tree.questions.target[asked]))


class _OnTheirWay(NamedTuple):
    """Predictions that are being copied to the host."""

    asked: Ints
    log_probability: Tensor
    is_best: Tensor
    arrived: torch.cuda.Event | None


class _Answers:
    """Collects single predictions into requests.

    Values stay on the device until `settle`, which waits for those of the call before it only:
    a GPU has the next part to do meanwhile.
    """

    def __init__(
        self,
        tree: PrefixTree,
        count: int,
        finished: Callable[[Sequence[int], Sequence[Answer]], None] | None,
    ) -> None:
        self.tree, self.finished = tree, finished
        self.missing = np.bincount(tree.questions.request, minlength=count)
        self.sums = np.zeros(count)
        self.greedy = np.ones(count, dtype=bool)
        self.waiting: list[tuple[Ints, Tensor, Tensor]] = []
        self.coming: list[_OnTheirWay] = []
        self.waited = 0.0

    def add(self, asked: Ints, log_probability: Tensor, is_best: Tensor) -> None:
        """Remember predictions."""
        self.waiting.append((asked, log_probability, is_best))

    def settle(self, *, wait: bool = False) -> None:
        """Send for what is waiting; hand over the requests finished by what was sent for before.

        Args:
            wait: Hand over everything.
        """
        if self.waiting:
            self.coming.append(_fetch(self.waiting))
            self.waiting = []
        while len(self.coming) > (0 if wait else 1):
            self._take(self.coming.pop(0))

    def _take(self, new: _OnTheirWay) -> None:
        if new.arrived is not None:
            began = time.monotonic()
            new.arrived.synchronize()
            self.waited += time.monotonic() - began
        values, best = new.log_probability.double().numpy(), new.is_best.numpy()
        owner = self.tree.questions.request[new.asked]
        count = len(self.missing)
        self.sums += np.bincount(owner, weights=values, minlength=count)
        self.greedy &= np.bincount(owner[~best], minlength=count) == 0
        seen = np.bincount(owner, minlength=count)
        self.missing -= seen
        done = np.flatnonzero((seen > 0) & (self.missing == 0)).tolist()
        if done and self.finished is not None:
            self.finished(done, self._answers(self.sums[done], self.greedy[done]))

    def all(self) -> list[Answer]:
        """Every request's answer."""
        assert not self.missing.any()
        return self._answers(self.sums, self.greedy)

    @staticmethod
    def _answers(sums: NDArray[np.float64], greedy: NDArray[np.bool_]) -> list[Answer]:
        return list(map(Answer, sums.tolist(), greedy.tolist()))


def _fetch(waiting: list[tuple[Ints, Tensor, Tensor]]) -> _OnTheirWay:
    """Start to copy predictions to the host."""
    asked, values, best = zip(*waiting, strict=True)
    value, is_best = (torch.cat(x) for x in (values, best))
    arrived = torch.cuda.Event() if value.is_cuda else None
    value, is_best = (x.to("cpu", non_blocking=True) for x in (value, is_best))
    if arrived is not None:
        arrived.record()
    return _OnTheirWay(np.concatenate(asked), value, is_best, arrived)


@contextmanager
def _only_at(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Let the model's head see some positions of a batch only.

    The head itself picks them, so that whatever a model does to its logits behind it is done.
    """

    def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].flatten(0, 1)[positions][None],)

    head = model.get_output_embeddings()
    assert head is not None
    hook = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()


def _read(logits: Tensor, row: Ints, target: Ints) -> tuple[Tensor, Tensor]:
    """Log-probability of targets in float32, and whether each is the best token of its row.

    Args:
        logits: (N, vocabulary).
        row: (Q,) row of each question, ascending.
        target: (Q,) token that is asked for.
    """
    index, targets = to_device(row, logits.device), to_device(target, logits.device)
    values, best = [], []
    # In float32 whatever the model's dtype, a few rows at a time: the vocabulary is wide
    for first in range(0, len(logits), READ_ROWS):
        part = logits[first : first + READ_ROWS]
        begin, end = np.searchsorted(row, [first, first + READ_ROWS])
        log_probability = part.log_softmax(-1, dtype=torch.float32)
        values.append(log_probability[index[begin:end] - first, targets[begin:end]])
        best.append(part.argmax(-1))
    return torch.cat(values), torch.cat(best)[index] == targets


def _causal_behind(seen: Tensor, slots: int, length: int) -> Tensor:
    """Mask (R, 1, L, slots + L): a row sees its `seen` slots and new tokens up to itself."""
    past = torch.arange(slots, device=seen.device) < seen[:, None]
    new = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
    rows = len(seen)
    return torch.cat(
        [past[:, None, None].expand(rows, 1, length, slots), new.expand(rows, 1, length, length)],
        -1,
    )


def _within(offset: Ints, begin: Ints, size: int) -> NDArray[np.bool_]:
    return (offset >= begin) & (offset < begin + size)


def _distinct(stack: list[_Front], front: _Front) -> list[Any]:
    """Fronts that hold states, each set of states once."""
    return list({id(x.states): x for x in (*stack, front) if x.states is not None}.values())
