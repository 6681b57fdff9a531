"""Rows in slices over several processes, against the same rows in one.

python -m tests.flashconv.sliced_rows prints, as a line of JSON, how far outputs, states and
gradients are off in each case: the largest difference over all processes, relative to the
largest value.
"""

# ruff: noqa: T201 (what it prints is its result)

import itertools
import json

import torch
from tests.processes import in_processes
from torch import distributed

from h3lm.flashconv import H3State, h3_core, ssm_conv, zero_state
from h3lm.flashconv.sequence_parallel import slice_boundaries
from h3lm.ssm import DiagonalSSM, ShiftSSM

CASES = {
    # name: (lengths of the slices, boundaries of packed sequences, rows)
    "even": ([64, 64], None, 2),
    "uneven": ([33, 70, 21, 50], None, 2),
    "forgets": ([700, 900], None, 1),  # the slowest mode is gone before a slice ends
    # within a slice, at its edge, over two edges, several in one, the last ones short
    "packed": ([40, 30, 41, 22], [0, 17, 40, 115, 117, 120, 133], 1),
    "packed-short": ([40, 5, 30, 3], [0, 41, 44, 76, 77, 78], 1),
}


def compare(mine, expected) -> float:
    difference = (mine - expected).detach().abs().max()
    return float(difference / expected.detach().abs().max().clamp(min=1e-30))


def run_case(name: str, op: str, head_dim: int, dtype: torch.dtype, group) -> dict[str, float]:
    torch.manual_seed(0)
    lengths, bounds, rows = CASES[name]
    L, D, rank = sum(lengths), 4, distributed.get_rank(group)
    steps = (0.3, 0.5) if name == "forgets" else (0.01, 0.1)
    diagonal = DiagonalSSM(D // head_dim, 8, dt_min=steps[0], dt_max=steps[1]).to(dtype)
    shift = ShiftSSM(D, 20).to(dtype)
    parameters = [*diagonal.parameters(), *shift.parameters()]
    q, k, v = torch.randn(3, rows, D, L, dtype=torch.float64).to(dtype).unbind()
    weight = torch.randn(rows, D, L, dtype=torch.float64).to(dtype)
    start = zero_state(rows, k, shift.taps(), diagonal.system(), head_dim)
    start = H3State(*(torch.randn_like(x).requires_grad_() for x in start))
    if bounds is not None or op == "ssm_conv":
        start = None
    cu = None if bounds is None else torch.tensor(bounds)

    def run(at: slice, cu, start, group):
        leaves = [x[..., at].clone().requires_grad_() for x in (q, k, v)]
        if op == "h3_core":
            o, state = h3_core(
                *leaves, shift.taps(), diagonal.system(), head_dim=head_dim, cu_seqlens=cu,
                initial_state=start, return_final_state=True, process_group=group,
            )  # fmt: skip
            state = [state.shift, torch.view_as_real(state.diagonal)]
        else:
            o, state = ssm_conv(
                leaves[0], diagonal.system(), pre_gate=leaves[1], post_gate=leaves[2],
                cu_seqlens=cu, return_final_state=True, process_group=group,
            )  # fmt: skip
            state = [torch.view_as_real(state)]
        ends = [s[-rows:] for s in state]
        # the row's last state counts too, with other weights than its outputs
        loss = (o * weight[..., at]).sum()
        if at.stop == L:
            loss = loss + sum((s * s.detach().cos()).sum() for s in ends)
        wanted = [*parameters, *leaves, *(start or ())]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        found = [
            torch.zeros_like(p) if g is None else g for g, p in zip(grads, wanted, strict=True)
        ]
        return o.detach(), ends, found

    first = sum(lengths[:rank])
    at = slice(first, first + lengths[rank])
    mine = None if cu is None else slice_boundaries(cu, at.start, at.stop)
    o, state, grads = run(at, mine, start if rank == 0 else None, group)
    whole_o, whole_state, whole_grads = run(slice(0, L), cu, start, None)
    n = len(parameters)
    grads[:n] = [grad.contiguous().clone() for grad in grads[:n]]  # some share memory
    for grad in grads[:n]:
        distributed.all_reduce(grad, group=group)
    off = {"output": compare(o, whole_o[..., at])}
    if at.stop == L:
        off["state"] = max(map(compare, state, whole_state))
    off["parameters"] = max(map(compare, grads[:n], whole_grads[:n]))
    mine_of_whole = [x[..., at] for x in whole_grads[n : n + 3]]
    off["inputs"] = max(
        compare(a, b) for a, b in zip(grads[n : n + 3], mine_of_whole, strict=True) if b.any()
    )
    if start is not None and rank == 0:
        off["start"] = max(map(compare, grads[n + 3 :], whole_grads[n + 3 :]))
    return off


def process(rank: int) -> dict[str, dict[str, float]]:
    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    report = {}
    dtypes = (torch.float64, torch.float32)
    for name, op, head_dim, dtype in itertools.product(
        CASES, ("h3_core", "ssm_conv"), (1, 2), dtypes
    ):
        if op == "ssm_conv" and head_dim == 2:
            continue
        group = pairs[rank // 2] if len(CASES[name][0]) == 2 else distributed.group.WORLD
        off = run_case(name, op, head_dim, dtype, group)
        report[f"{name} {op} {head_dim} {str(dtype)[6:]}"] = off
    return report


if __name__ == "__main__":
    reports = in_processes(4, process)
    worst = {
        case: {
            key: max(report[case].get(key, 0.0) for report in reports)
            for key in ("output", "state", "parameters", "inputs", "start")
        }
        for case in reports[0]
    }
    print(json.dumps(worst))
