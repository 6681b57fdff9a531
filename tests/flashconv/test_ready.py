"""Launches that skip Triton's look at every argument: the same kernel for the same kind of call."""

import pytest
import torch

from h3lm.flashconv.kernels import ready
from h3lm.flashconv.kernels.ready import Ready


class Jitted:
    """Stands in for a kernel of `triton.jit`: compiles for each call, and writes down launches."""

    arg_names = ("x", "n", "y", "BLOCK", "DOUBLE")

    def __init__(self) -> None:
        self.compiled = 0
        self.launched: list[tuple] = []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.compiled += 1
            names = ("BLOCK", "DOUBLE")
            self.launched.append((grid, *arguments, *(constants[name] for name in names)))
            return {(*grid, 1, 1)[:3]: lambda *all_: self.launched.append((grid, *all_))}

        return run


def launch(kernel, x, n, y=None, block=64, warps=4):
    kernel[(7,)](x, n, y, DOUBLE=False, BLOCK=block, num_warps=warps)


def test_a_call_of_a_known_kind_launches_what_was_compiled():
    jitted = Jitted()
    kernel = Ready(jitted)
    for x in (torch.zeros(8), torch.ones(9)):
        launch(kernel, x, 5)
    assert jitted.compiled == 1
    first, second = jitted.launched
    assert first[0] == second[0] == (7,)
    assert first[2:] == second[2:] == (5, None, 64, False)
    assert second[1].sum() == 9


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(8).double()},
        {"x": torch.zeros(8)[1:]},
        {"n": 1},
        {"n": 5.5},
        {"y": torch.zeros(8)},
        {"block": 32},
        {"warps": 8},
    ],
    ids=str,
)
def test_whatever_a_kernel_is_compiled_for_tells_calls_apart(other):
    jitted = Jitted()
    kernel = Ready(jitted)
    usual = {"x": torch.zeros(8), "n": 5}
    launch(kernel, **usual)
    launch(kernel, **usual | other)
    assert jitted.compiled == 2


def test_kinds_of_calls_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(ready, "MAX_KEPT", 3)
    kernel = Ready(Jitted())
    for n in range(2, 20):
        launch(kernel, torch.zeros(8), n)
    assert len(kernel._kept) <= 3


def test_nothing_is_kept_of_an_interpreter():
    class Interpreted(Jitted):
        def __getitem__(self, grid):
            return lambda *arguments, **constants: None

    kernel = Ready(Interpreted())
    launch(kernel, torch.zeros(8), 5)
    assert not kernel._kept
