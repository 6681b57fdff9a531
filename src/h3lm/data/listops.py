"""ListOps of the Long Range Arena: generated, read and evaluated.

    [MAX 2 [SM 4 9 ] 0 ]   is   max(2, (4 + 9) mod 10, 0) = 3

Source: the generator of the Long Range Arena (google-research/long-range-arena, commit 29833a1,
lra_benchmarks/data/listops.py), by its definition: the distribution of trees is the same, the
trees of a seed are not.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from h3lm.errors import UserError

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
CLOSE = "]"
SYMBOLS = (*map(str, range(10)), *OPERATORS, CLOSE)  # a digit's id is its value
FIRST_OPERATOR, CLOSE_ID = 10, 14
MAX_DEPTH = 10
MIN_CHILDREN, MAX_CHILDREN = 2, 10
OPERATOR_PROBABILITY = 0.25

_IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
_TREES = 4096  # grown at a time


class Expression(NamedTuple):
    """A tree written out.

    Attributes:
        tokens: Ids of `SYMBOLS`, (L,), uint8.
        value: What it evaluates to, 0 to 9.
    """

    tokens: NDArray[np.uint8]
    value: int


def generate(seed: int, *, min_length: int = 500, max_length: int = 2000) -> Iterator[Expression]:
    """Draw trees, all different, of lengths strictly between two bounds; it never ends.

    At a node above the largest depth, with probability 1/4 an operator (MIN, MAX, MED or SM) over
    2 to 10 children, else a digit; at the largest depth, 10, always a digit. Trees of other
    lengths are thrown away.

    Args:
        seed: Of NumPy's default generator.
        min_length: Every kept tree is longer.
        max_length: Every kept tree is shorter.
    """
    rng = np.random.default_rng(seed)
    seen: set[bytes] = set()
    while True:
        for expression in _grow(rng, min_length, max_length):
            key = expression.tokens.tobytes()
            if key not in seen:
                seen.add(key)
                yield expression


class _Level(NamedTuple):
    """The nodes of all trees at one depth, those of a tree and of a parent side by side.

    Attributes:
        operator: (n,), -1 for a digit, else 0 to 3.
        digit: (n,), the digit where there is one.
        children: (n,), how many children stand for it at the next level.
    """

    operator: NDArray[np.int64]
    digit: NDArray[np.int64]
    children: NDArray[np.int64]


def _grow(rng: np.random.Generator, min_length: int, max_length: int) -> list[Expression]:
    """Grow many trees level by level, and write out those of the right length.

    The trees that have grown too long already are not grown further.
    """
    tree = np.arange(_TREES)  # which tree each node of the level belongs to
    length = np.zeros(_TREES, np.int64)
    levels: list[_Level] = []
    owners: list[NDArray[np.int64]] = []
    for depth in range(1, MAX_DEPTH + 1):
        n = len(tree)
        operator = np.full(n, -1)
        if depth < MAX_DEPTH:
            grows = rng.random(n) <= OPERATOR_PROBABILITY
            operator[grows] = rng.integers(0, len(OPERATORS), grows.sum())
        is_operator = operator >= 0
        children = np.zeros(n, np.int64)
        children[is_operator] = rng.integers(MIN_CHILDREN, MAX_CHILDREN + 1, is_operator.sum())
        levels.append(_Level(operator, rng.integers(0, 10, n), children))
        owners.append(tree)
        length += np.bincount(tree, 1 + is_operator, _TREES).astype(np.int64)
        alive = length + np.bincount(tree, children, _TREES) < max_length
        tree = np.repeat(tree, children)
        if not alive.all():
            levels, owners = _keep(levels, owners, alive)
            tree = tree[alive[tree]]
    levels, _ = _keep(levels, owners, (length > min_length) & (length < max_length))
    return _write_out(levels)


def _keep(
    levels: list[_Level], owners: list[NDArray[np.int64]], kept: NDArray[np.bool_]
) -> tuple[list[_Level], list[NDArray[np.int64]]]:
    """Only the nodes of some trees."""
    chosen = [kept[tree] for tree in owners]
    return (
        [_Level(*(x[here] for x in level)) for level, here in zip(levels, chosen, strict=True)],
        [tree[here] for tree, here in zip(owners, chosen, strict=True)],
    )


def _write_out(levels: list[_Level]) -> list[Expression]:
    """Evaluate from the leaves up, then give every node its place from the root down."""
    values, lengths = _from_below(levels)
    total = lengths[0]
    if not len(total):
        return []
    text = np.empty(total.sum(), np.uint8)
    starts = np.cumsum(total) - total
    start = starts
    for depth, level in enumerate(levels):
        parents = level.operator >= 0
        text[start] = np.where(parents, FIRST_OPERATOR + level.operator, level.digit)
        text[start[parents] + lengths[depth][parents] - 1] = CLOSE_ID
        if depth + 1 < len(levels):
            below = lengths[depth + 1]
            before = np.cumsum(below) - below  # lengths of all nodes further left
            first = np.cumsum(level.children) - level.children
            own = first[parents]
            offset = start[parents] + 1 - before[own] if len(below) else own
            start = before + np.repeat(offset, level.children[parents])
    return [
        Expression(text[a : a + n], int(value))
        for a, n, value in zip(starts, total, values[0], strict=True)
    ]


def _from_below(levels: list[_Level]) -> tuple[list[NDArray], list[NDArray]]:
    """Value and length of every node of every level."""
    values = [level.digit.copy() for level in levels]
    lengths = [np.where(level.operator >= 0, 2, 1) for level in levels]
    for depth in range(len(levels) - 2, -1, -1):
        level = levels[depth]
        parents = np.flatnonzero(level.operator >= 0)
        if not len(parents):
            continue
        count = level.children[parents]
        first = np.cumsum(count) - count
        below = values[depth + 1]
        lengths[depth][parents] += np.add.reduceat(lengths[depth + 1], first)
        ordered = below[np.lexsort((below, np.repeat(np.arange(len(parents)), count)))]
        last = first + count - 1
        # the middle one, or the mean of the middle two, cut to an integer
        median = (ordered[(first + last) // 2] + ordered[(first + last + 1) // 2]) // 2
        results = np.stack(
            [ordered[first], ordered[last], median, np.add.reduceat(below, first) % 10]
        )
        values[depth][parents] = results[level.operator[parents], np.arange(len(parents))]
    return values, lengths


def parse(text: str) -> NDArray[np.uint8]:
    """Ids of an expression; the release's round brackets are passed over.

    Raises:
        UserError: naming the position (in symbols, from 1) at which it is none.
    """
    symbols = text.replace("(", " ").replace(")", " ").split()
    try:
        tokens = np.fromiter((_IDS[symbol] for symbol in symbols), np.uint8, len(symbols))
    except KeyError:
        at = next(i for i, symbol in enumerate(symbols) if symbol not in _IDS)
        raise UserError(
            f"no ListOps expression: symbol {at + 1} is {symbols[at]!r}, not one of "
            f"{' '.join(SYMBOLS)}"
        ) from None
    evaluate(tokens)
    return tokens


def evaluate(tokens: NDArray[np.uint8]) -> int:
    """The value of an expression.

    Raises:
        UserError: naming the position (in symbols, from 1) at which it is none.
    """
    open_: list[tuple[int, list[int]]] = []
    for at, token in enumerate(tokens.tolist(), 1):
        if FIRST_OPERATOR <= token < CLOSE_ID:
            open_.append((token - FIRST_OPERATOR, []))
            continue
        value = token
        if token == CLOSE_ID:
            if not open_ or not open_[-1][1]:
                problem = "closes nothing" if not open_ else "closes an operator without operands"
                raise UserError(f"no ListOps expression: symbol {at}, {CLOSE!r}, {problem}")
            value = _apply(*open_.pop())
        if not open_:
            if at < len(tokens):
                raise UserError(f"no ListOps expression: symbol {at + 1} comes after its end")
            return value
        open_[-1][1].append(value)
    raise UserError(
        f"no ListOps expression: it ends at symbol {len(tokens)} with {len(open_)} brackets open"
    )


def _apply(operator: int, operands: list[int]) -> int:
    if operator == 0:
        return min(operands)
    if operator == 1:
        return max(operands)
    if operator == 3:
        return sum(operands) % 10
    ordered, n = sorted(operands), len(operands)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) // 2
