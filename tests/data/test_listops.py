import itertools
import random
import statistics
import time

import numpy as np
import pytest

from h3lm.data.listops import CLOSE_ID, SYMBOLS, evaluate, generate, parse
from h3lm.errors import UserError


def literal_value(symbols):
    """By the definition, on text, sharing nothing with the code under test."""
    symbol = symbols.pop(0)
    if not symbol.startswith("["):
        return int(symbol)
    operands = []
    while symbols[0] != "]":
        operands.append(literal_value(symbols))
    symbols.pop(0)
    return {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda x: int(statistics.median(x)),
        "[SM": lambda x: sum(x) % 10,
    }[symbol](operands)


def literal_tree(rng, depth=1):
    """The tree of the definition as symbols."""
    if depth == 10 or rng.random() > 0.25:
        return [str(rng.randrange(10))]
    children = [literal_tree(rng, depth + 1) for _ in range(rng.randint(2, 10))]
    operator = rng.choice(["[MIN", "[MAX", "[MED", "[SM"])
    return [operator, *itertools.chain(*children), "]"]


def text_of(tokens):
    return [SYMBOLS[token] for token in tokens]


@pytest.mark.parametrize("window", [(500, 2000), (2, 60)])
def test_generated_trees_have_the_value_of_the_literal_evaluator(window):
    low, high = window
    trees = list(itertools.islice(generate(1, min_length=low, max_length=high), 300))
    for tree in trees:
        assert low < len(tree.tokens) < high
        assert literal_value(text_of(tree.tokens)) == tree.value == evaluate(tree.tokens)
    assert len({tree.tokens.tobytes() for tree in trees}) == 300
    assert len({tree.value for tree in trees}) == 10


def test_the_distribution_is_that_of_the_literal_generator():
    """Lengths, values, operators, depths and arities of short trees; counts within 5 sigma."""
    rng = random.Random(0)
    literal = {}
    while len(literal) < 600:
        tree = literal_tree(rng)
        if 20 < len(tree) < 80:
            literal.setdefault(" ".join(tree), tree)
    grown = itertools.islice(generate(2, min_length=20, max_length=80), 600)
    ours = [text_of(tree.tokens) for tree in grown]
    for statistic in (
        lambda t: len(t) // 10,
        lambda t: literal_value(list(t)),
        lambda t: t[0],
        lambda t: max(itertools.accumulate((s[0] == "[") - (s == "]") for s in t)),
        lambda t: sum(s[0] == "[" for s in t) // 3,
    ):
        left, right = (
            {
                key: len(list(group))
                for key, group in itertools.groupby(sorted(map(statistic, trees)))
            }
            for trees in (literal.values(), ours)
        )
        for key in left | right:
            a, b = left.get(key, 0), right.get(key, 0)
            assert abs(a - b) < 5 * max(1.0, (a + b)) ** 0.5 + 3, (key, a, b)


def test_the_same_seed_gives_the_same_trees():
    first, second, other = (list(itertools.islice(generate(s), 20)) for s in (0, 0, 1))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))


def test_thirty_thousand_trees_a_minute():
    began = time.process_time()
    list(itertools.islice(generate(0), 1000))
    assert 1000 / (time.process_time() - began) > 500


def test_the_releases_brackets_are_passed_over():
    tokens = parse("( ( ( [MAX 2 ) 9 ) ] )")
    assert text_of(tokens) == ["[MAX", "2", "9", "]"]
    assert evaluate(tokens) == 9
    assert evaluate(parse("[MED 1 4 7 2 ]")) == 3
    assert evaluate(parse("7")) == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[MAX 2 11 ]", "symbol 3 is '11'"),
        ("[MAX 2 9", "ends at symbol 3 with 1 brackets open"),
        ("[MAX 2 ] ]", "symbol 4 comes after its end"),
        ("] 2", r"symbol 1, '\]', closes nothing"),
        ("[SM ]", r"symbol 2, '\]', closes an operator without operands"),
        ("", "ends at symbol 0"),
    ],
)
def test_what_does_not_parse_is_told_with_its_position(text, words):
    with pytest.raises(UserError, match=words):
        parse(text)


def test_ids():
    assert SYMBOLS[CLOSE_ID] == "]"
    assert [SYMBOLS[i] for i in range(10)] == list("0123456789")
