"""Requests as a tree of shared prefixes: what is asked, and the little that has to be computed.

A request asks for log P(continuation | context). Its model input is all tokens but the last. Many
requests begin alike (a document, its questions, their answers), so the inputs form a radix tree;
each edge is run once, from the state that its parent left behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# A shared prefix is worth a state only if it saves more tokens than keeping the state costs:
# writing it and reading it for each branch take about as long as so many tokens each. On a GPU it
# is twice as much: for the 125m hybrid 4.5 MB of states, keys and values, moved and padded several
# times at 3 TB/s, are some 12 us on an H200, against a little under 1 us of computing for a token.
STATE_COST_TOKENS = 8


class Request(NamedTuple):
    """Token ids of a context (at least one) and of the continuation asked for (at least one)."""

    context: Sequence[int] | Ints
    continuation: Sequence[int] | Ints


@dataclass(frozen=True)
class Questions:
    """Single predictions that requests are made of, grouped by the node whose edge they lie on.

    Attributes:
        node: (Q,) node, ascending.
        offset: (Q,) position on the node's edge whose logits are asked.
        target: (Q,) token that is asked for there.
        request: (Q,) request that asks.
        first: (nodes + 1,) where each node's questions begin.
    """

    node: Ints
    offset: Ints
    target: Ints
    request: Ints
    first: Ints

    def of(self, nodes: Ints) -> tuple[Ints, Ints]:
        """Questions on the edges of some nodes: (question, place of its node in `nodes`)."""
        counts = self.first[nodes + 1] - self.first[nodes]
        return concatenated_ranges(self.first[nodes], counts), np.repeat(
            np.arange(len(nodes)), counts
        )


class PrefixTree:
    """The radix tree of the requests' inputs. Node 0 is the root, the empty prefix.

    Attributes:
        parent: (nodes,) parent of each node; the root's is -1.
        depth: (nodes,) tokens from the root to the end of the node's edge.
        first_child, children: children of node v are
            `children[first_child[v] : first_child[v + 1]]`.
        height: (nodes,) edges to the deepest node below.
        questions: What is asked on which edge.
        asked: Input tokens of all requests, each by itself.
        computed: Tokens on all edges.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        state_cost_tokens: int = STATE_COST_TOKENS,
        align: int = 1,
    ) -> None:
        """Build the tree.

        Args:
            requests: What is asked; contexts and continuations are not empty.
            state_cost_tokens: A branching point is kept if it saves so many tokens for each state
                written and read; 0 keeps all of them, which computes the fewest tokens.
            align: Branching points are moved towards the root to a multiple of this, and what
                lies between is computed for each branch: a kernel that wants such lengths then
                gets no others, at the price of a few tokens.

        Raises:
            ValueError: if a context or a continuation is empty.
        """
        if any(not len(r.context) or not len(r.continuation) for r in requests):
            raise ValueError("a request needs at least one token of context and of continuation")
        contexts = {id(r.context): r.context for r in requests}  # many requests share one
        begins = {name: _big_endian(context) for name, context in contexts.items()}
        inputs = [begins[id(r.context)] + _big_endian(r.continuation[:-1]) for r in requests]
        # Big-endian bytes compare as the numbers do, at the speed of memcmp
        unique = sorted(set(inputs))
        lengths = np.array([len(x) // 4 for x in unique], dtype=np.int64)
        self._tokens = np.frombuffer(b"".join(unique), dtype=">i4").astype(np.int64)
        self._start_of_input = np.concatenate([[0], lengths.cumsum()])
        common = _common_prefixes(self._tokens, self._start_of_input)
        parent, depth, source, leaf = _radix_tree(lengths, common // align * align)
        terminal = np.zeros(len(parent), dtype=bool)
        terminal[leaf] = True
        parent, keep = _collapsed(parent, depth, terminal, state_cost_tokens)
        new_name = np.cumsum(keep) - 1
        self.parent = np.where(parent[keep] < 0, -1, new_name[parent[keep]])
        self.depth, self._source = depth[keep], source[keep]
        self.first_child, self.children = _children(self.parent)
        self.height = self._heights()
        place = {x: i for i, x in enumerate(unique)}
        ends = new_name[leaf[[place[x] for x in inputs]]] if inputs else np.zeros(0, np.int64)
        self.questions = self._ask(requests, ends)
        self.asked = int(sum(len(x) // 4 for x in inputs))
        self.computed = int(self.edge_length.sum())

    def __len__(self) -> int:
        return len(self.parent)

    @property
    def start(self) -> Ints:
        """(nodes,) tokens from the root to the begin of each node's edge."""
        return np.where(self.parent < 0, 0, self.depth[self.parent])

    @property
    def edge_length(self) -> Ints:
        """(nodes,) tokens on each node's edge."""
        return self.depth - self.start

    @property
    def has_children(self) -> NDArray[np.bool_]:
        """(nodes,) whether anything branches off behind a node."""
        return np.diff(self.first_child) > 0

    def children_of(self, nodes: Ints) -> tuple[Ints, Ints]:
        """Children of some nodes: (child, place of its parent in `nodes`)."""
        counts = self.first_child[nodes + 1] - self.first_child[nodes]
        at = concatenated_ranges(self.first_child[nodes], counts)
        return self.children[at], np.repeat(np.arange(len(nodes)), counts)

    def edge_tokens(self, nodes: Ints, offset: Ints, length: int) -> Ints:
        """Tokens of edges from `offset` on, (nodes, length); zero behind an edge's end."""
        begin = self._start_of_input[self._source[nodes]] + self.start[nodes] + offset
        left = self.depth[nodes] - self.start[nodes] - offset
        position = np.arange(length)
        inside = position < left[:, None]
        return np.where(inside, self._tokens[np.where(inside, begin[:, None] + position, 0)], 0)

    def _heights(self) -> Ints:
        height = np.zeros(len(self), dtype=np.int64)
        for node in np.argsort(-self.depth, kind="stable"):
            above = self.parent[node]
            if above >= 0:
                height[above] = max(height[above], height[node] + 1)
        return height

    def _ask(self, requests: Sequence[Request], ends: Ints) -> Questions:
        """Lay each request's predictions out on the edges from its end towards the root."""
        context = np.array([len(r.context) for r in requests], dtype=np.int64)
        asked = np.array([len(r.continuation) for r in requests], dtype=np.int64)
        targets = np.concatenate([np.asarray(r.continuation, dtype=np.int64) for r in requests])
        first_target = np.concatenate([[0], asked.cumsum()])[:-1]
        low, high = context - 1, context - 1 + asked  # input positions whose logits are asked
        node, request = ends.copy(), np.arange(len(requests))
        parts: list[tuple[Ints, Ints, Ints, Ints]] = []
        start = self.start
        while len(request):
            begin = np.maximum(low[request], start[node])
            count = high[request] - begin
            position = concatenated_ranges(begin, count)
            owner, edge = np.repeat(request, count), np.repeat(node, count)
            target = targets[first_target[owner] + position - low[owner]]
            parts.append((edge, position - start[edge], target, owner))
            high[request] = begin
            on = begin > low[request]
            node, request = self.parent[node[on]], request[on]
        node, offset, target, owner = (np.concatenate(x) for x in zip(*parts, strict=True))
        order = np.lexsort((offset, node))
        first = np.searchsorted(node[order], np.arange(len(self) + 1))
        return Questions(node[order], offset[order], target[order], owner[order], first)


def _big_endian(ids: Sequence[int] | Ints) -> bytes:
    return np.asarray(ids, dtype=">i4").tobytes()


def concatenated_ranges(start: Ints, count: Ints) -> Ints:
    """start[0], start[0] + 1, ... (count[0] of them), start[1], ..."""
    total = int(count.sum())
    if not total:
        return np.zeros(0, dtype=np.int64)
    before = np.concatenate([[0], count.cumsum()])[:-1]
    return np.arange(total) + np.repeat(start - before, count)


def _common_prefixes(tokens: Ints, start: Ints) -> Ints:
    """Length of the common prefix of each input with the one before it in sorted order."""
    common = np.zeros(len(start) - 1, dtype=np.int64)
    for i in range(1, len(common)):
        a, b = tokens[start[i - 1] : start[i]], tokens[start[i] : start[i + 1]]
        shorter = min(len(a), len(b))
        differ = a[:shorter] != b[:shorter]
        at = int(differ.argmax()) if shorter else 0
        common[i] = at if shorter and differ[at] else shorter
    return common


def _radix_tree(lengths: Ints, common: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Parent, depth and a source input of each node, and the node where each input ends.

    The inputs come in sorted order, so the path to the last one is a stack, and a new input
    branches off where its common prefix with the last one ends.
    """
    parent, depth, source = [-1], [0], [0]
    leaf = np.zeros(len(lengths), dtype=np.int64)
    path = [0]

    def add(above: int, until: int, of: int) -> int:
        parent.append(above)
        depth.append(until)
        source.append(of)
        return len(parent) - 1

    for i, (length, shared) in enumerate(zip(lengths.tolist(), common.tolist(), strict=True)):
        below = -1
        while depth[path[-1]] > shared:
            below = path.pop()
        if depth[path[-1]] < shared:  # the branching point lies within an edge
            fork = add(path[-1], shared, i)
            parent[below] = fork
            path.append(fork)
        leaf[i] = add(path[-1], length, i)
        path.append(int(leaf[i]))
    return np.array(parent), np.array(depth), np.array(source), leaf


def _collapsed(
    parent: Ints, depth: Ints, terminal: NDArray[np.bool_], cost: int
) -> tuple[Ints, NDArray[np.bool_]]:
    """Branching points that save too little taken out: new parents, and which nodes stay."""
    parent, branches = parent.copy(), np.bincount(parent[1:], minlength=len(parent))
    keep = np.ones(len(parent), dtype=bool)
    forks = np.zeros(len(parent), dtype=bool)  # nodes that others may branch off from
    forks[0] = True
    for node in np.argsort(depth, kind="stable").tolist():
        if node == 0:
            continue
        above = int(parent[node])
        while not forks[above]:
            above = int(parent[above])
        parent[node] = above
        users = int(branches[node]) + int(terminal[node])
        saved = (int(depth[node]) - int(depth[above])) * (users - 1)
        forks[node] = branches[node] > 0 and saved >= cost * (users + 1)
        keep[node] = forks[node] or terminal[node]
    return parent, keep


def _children(parent: Ints) -> tuple[Ints, Ints]:
    order = np.argsort(parent, kind="stable")[1:]  # the root is nobody's child
    return np.searchsorted(parent[order], np.arange(len(parent) + 1)), order
