import numpy as np
import pytest

from h3lm.evals.prefix_tree import PrefixTree, Request, concatenated_ranges


def random_requests(seed, count=25, vocabulary=2):
    draw = np.random.default_rng(seed)

    def tokens(low, high):
        return draw.integers(0, vocabulary, draw.integers(low, high)).tolist()

    return [Request(tokens(1, 8), tokens(1, 5)) for _ in range(count)]


def prefix(tree, node):
    """Tokens from the root to a node's end."""
    path = []
    while node > 0:
        length = int(tree.edge_length[node])
        path = tree.edge_tokens(np.array([node]), np.zeros(1, int), length)[0].tolist() + path
        node = int(tree.parent[node])
    return path


@pytest.mark.parametrize(
    ("cost", "align"), [(0, 1), (1, 1), (3, 1), (8, 1), (0, 2), (0, 4), (1, 4), (3, 2)]
)
@pytest.mark.parametrize("seed", range(5))
def test_every_prediction_is_asked_once_behind_its_own_prefix(seed, cost, align):
    requests = random_requests(seed)
    tree = PrefixTree(requests, state_cost_tokens=cost, align=align)
    asked = {i: [] for i in range(len(requests))}
    q = tree.questions
    for node, offset, target, owner in zip(q.node, q.offset, q.target, q.request, strict=True):
        seen = prefix(tree, int(node))[: int(tree.start[node] + offset) + 1]
        asked[int(owner)].append((tuple(seen), int(target)))
    for i, (context, continuation) in enumerate(requests):
        whole = [*context, *continuation]
        expected = [(tuple(whole[:p]), whole[p]) for p in range(len(context), len(whole))]
        assert sorted(asked[i]) == sorted(expected)


@pytest.mark.parametrize("seed", range(5))
def test_at_no_cost_each_distinct_prefix_is_computed_once(seed):
    requests = random_requests(seed)
    inputs = [[*r.context, *r.continuation[:-1]] for r in requests]
    tree = PrefixTree(requests, state_cost_tokens=0)
    assert tree.asked == sum(map(len, inputs))
    assert tree.computed == len({tuple(x[:n]) for x in inputs for n in range(1, len(x) + 1)})


def test_a_shared_prefix_that_saves_less_than_its_state_costs_is_not_shared():
    short = [Request([1, i], [2]) for i in range(2, 5)]
    assert PrefixTree(short, state_cost_tokens=8).computed == 6
    long = [Request([*range(100), i], [2]) for i in range(2, 5)]
    assert PrefixTree(long, state_cost_tokens=8).computed == 103


def test_answers_of_one_token_need_no_branch():
    tree = PrefixTree([Request([5, 6, 7], [answer]) for answer in (1, 2, 3)])
    assert tree.computed == 3
    assert tree.questions.offset.tolist() == [2, 2, 2]
    assert sorted(tree.questions.target.tolist()) == [1, 2, 3]


def test_an_empty_context_or_continuation_is_refused():
    for request in (Request([], [1]), Request([1], [])):
        with pytest.raises(ValueError, match="at least one token"):
            PrefixTree([request])


def test_ranges_are_laid_end_to_end():
    assert concatenated_ranges(np.array([3, 9, 0]), np.array([2, 0, 3])).tolist() == [3, 4, 0, 1, 2]


@pytest.mark.parametrize("align", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_aligned_branches_lie_at_multiples_and_share_what_they_can(seed, align):
    requests = random_requests(seed, count=40)
    tree = PrefixTree(requests, state_cost_tokens=0, align=align)
    assert (tree.depth[tree.has_children] % align == 0).all()
    inputs = [[*r.context, *r.continuation[:-1]] for r in requests]
    # what lies behind the last multiple at which two inputs still agree is each one's own
    distinct = {tuple(x) for x in inputs}
    shared = {x[:n] for x in distinct for n in range(align, len(x) + 1, align)}
    assert tree.computed == align * len(shared) + sum(len(x) % align for x in distinct)
