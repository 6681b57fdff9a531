"""The check that stands before the first use of the kernels of a decoding step.

They overlap one another and were tuned for few GPUs. So before the first step of few or many rows a
block of each kind takes some by kernels of these sizes beside its modules, and where they differ,
the modules stay in use and a warning says so.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from h3lm.flashconv import lagging
from h3lm.flashconv.state import as_real_pairs
from h3lm.flashconv.step import RingState, roll_in_place, rows_class
from h3lm.layers.block import Block
from h3lm.layers.mixers import MixerSizes
from h3lm.layers.step import Stream, add_norm, attend_step
from h3lm.ssm.first_use import first_use

logger = logging.getLogger("h3lm.layers")
_known: dict[tuple[torch.device, int], str] = {}
SIZES = MixerSizes(d_model=128, num_heads=2, rotary_dim=32)
ROWS = {1: 1, 16: 3, 64: 33}  # that are compared, by `rows_class`
SEEN = 63  # as many positions as a ring remembers
STEPS = lagging.BLOCK + 2  # in which every state moves
TOLERANCE = 8e-2  # of what a block adds; modules in bfloat16 are off by 1.4e-2 themselves


def step_fault(device: torch.device, rows: int | None = None) -> str:
    """What is wrong with the kernels of a step on this machine; empty if they work.

    Args:
        device: Where.
        rows: Of the step; all sizes are tried if None.
    """
    classes = ROWS if rows is None else [rows_class(rows)]
    return next(filter(None, (_fault(device, most) for most in classes)), "")


def known_fault(device: torch.device, rows: int) -> str | None:
    """What `step_fault` found before; None if it has not run."""
    return _known.get((device, rows_class(rows)))


@first_use(logger, "kernels of decoding steps of up to {1} rows are off, modules take over", _known)
def _fault(device: torch.device, most: int) -> str:
    with torch.random.fork_rng([device]), torch.no_grad():
        torch.manual_seed(0)
        return next(filter(None, (_compare(kind, device, ROWS[most]) for kind in KINDS)), "")


def _compare(kind: str, device: torch.device, rows: int) -> str:
    name = kind.split()[0]
    block = Block(name, SIZES, 2 * SIZES.d_model).to(device).eval()
    for module in block.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.bfloat16()
    text = torch.randn(rows, SEEN + STEPS, SIZES.d_model, device=device).bfloat16()
    _, state = block(text[:, :SEEN])
    position = torch.zeros(rows, dtype=torch.int64, device=device)
    core, found = KINDS[kind](block, state, position), []
    for r in text[:, SEEN:].unbind(1):
        found.append(add_norm(block.advance(Stream(r.contiguous()), core), block.norm1)[0])
        position.add_(1)
    r = text[:, SEEN:].float()
    change = block(text)[0][:, SEEN:].float() - r
    error = float((torch.stack(found, 1).float() - r - change).norm() / change.norm())
    return "" if error < TOLERANCE else f"a step of {kind} differs by {error:.1e} from its modules"


def _h3_core(
    block: Block, state: Any, position: Tensor, lags: bool = False
) -> Callable[[Tensor], Tensor]:
    shift, pairs, recent = state[0], as_real_pairs(state[1]).clone(), None
    ring = torch.cat([shift, torch.zeros_like(shift[..., :1])], 2)
    if lags:
        ring, pairs = (lagging.innermost(x, 1) for x in (ring, pairs))
        recent = lagging.new_recent(shift.shape[0], shift.shape[1], pairs)
    roll_in_place(ring, position, shift)
    stored = RingState(ring, position, pairs if lags else pairs.contiguous(), recent)
    return lambda qkv: block.mixer.step_core(qkv, stored, early=True)


def _attention_core(block: Block, state: Any, position: Tensor) -> Callable[[Tensor], Tensor]:
    keys, values = (torch.cat([x, torch.zeros_like(x)], 2) for x in state[:2])

    def core(qkv: Tensor) -> Tensor:
        lengths = position + SEEN
        return attend_step(qkv, keys, values, lengths, block.mixer.rotation(lengths[:, None]))

    return core


KINDS: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "h3": _h3_core,
    "h3 that lags": partial(_h3_core, lags=True),
    "attention": _attention_core,
}
