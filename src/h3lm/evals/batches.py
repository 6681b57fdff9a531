"""Rows of different lengths in few batches with little padding."""

import numpy as np

from h3lm.evals.prefix_tree import Ints


def padded(lengths: Ints, align: int) -> Ints:
    """Lengths rounded up to a multiple of `align`."""
    return -(-lengths // align) * align


def like_widths(widths: Ints, call_tokens: int) -> list[Ints]:
    """Rows in groups that are padded to their longest, at the least cost.

    A group costs its rows times its width, and `call_tokens` for being a call of its own. The
    best groups of sorted rows are found exactly, by the cheapest way to cut after each width.

    Args:
        widths: (R,) width that each row needs.
        call_tokens: What a call costs, as the tokens that take as long.

    Returns:
        Row numbers of each group, in order of width.
    """
    order = np.argsort(widths, kind="stable")
    width, first = np.unique(widths[order], return_index=True)
    bounds = np.append(first, len(order))
    cost, cut = np.zeros(len(width) + 1, dtype=np.int64), []
    for j in range(1, len(width) + 1):
        ways = cost[:j] + (bounds[j] - bounds[:j]) * width[j - 1] + call_tokens
        cut.append(int(ways.argmin()))
        cost[j] = ways[cut[-1]]
    groups, j = [], len(width)
    while j:
        i = cut[j - 1]
        groups.append(order[bounds[i] : bounds[j]])
        j = i
    return groups[::-1]
