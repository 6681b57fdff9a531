"""Kernels that start while the one before them still runs, of a decoding step above all.

A step is a chain of kernels of 3 to 10 microseconds. With programmatic dependent launch (Hopper
and later) programs of the next kernel start in multiprocessors that are free already, and may
bring what no earlier kernel writes, weights above all, closer before they wait.

A kernel lets the next one start before its own wait or behind it, whichever is faster; before it,
several of a chain may be under way. Each waits for the one before it, which ends only behind its
own wait: behind a wait, everything that was launched earlier is done. What runs before a wait may
read only what no other kernel of the chain writes, and write only what none reads or writes: what
was written and read before the last plain kernel in front of it.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether the GPU and this Triton have programmatic dependent launch."""
    if device.type != "cuda" or not hasattr(cuda, "gdc_wait"):
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(early: bool, first: bool) -> dict[str, Any]:
    """What a launch takes besides.

    Args:
        early: Whether kernels overlap; they do not in the interpreter.
        first: Whether the next may start before this one waits.
    """
    options = {"first": int(first), "EARLY": early}
    return {**options, "launch_pdl": True} if early else options


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """Let the next kernel start: of one that waits at its end, or was itself launched plainly."""
    if EARLY:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(first, EARLY: tl.constexpr):
    """Wait for the kernel before this one, and let the next start: `first`, or behind the wait."""
    if EARLY:
        if first != 0:
            cuda.gdc_launch_dependents()
        cuda.gdc_wait()
        if first == 0:
            cuda.gdc_launch_dependents()


@triton.jit
def fetch(pointers, EARLY: tl.constexpr):
    """Ask for the 128 bytes at each pointer to be brought to the L2 cache."""
    if EARLY:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
