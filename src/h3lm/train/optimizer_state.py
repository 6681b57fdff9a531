"""The optimiser's state in a checkpoint, in one form for any number of processes.

Each process writes what it holds (of what all hold, a part), by the names of the parameters, and
reads what it needs: whole or sharded, a run can go on from what any other number has written.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

FOLDER = "optimizer"


def save_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Write the state into a checkpoint; all processes must come here.

    Raises:
        CheckpointException: in every process, if one of them could not write.
    """
    _by_all(checkpoint.save, get_optimizer_state_dict(model, optimizer), folder)


def load_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Read the state from a checkpoint; all processes must come here.

    Raises:
        CheckpointException: in every process, if one of them could not read.
    """
    state = get_optimizer_state_dict(model, optimizer)  # a new one's, to be written over
    _by_all(checkpoint.load, state, folder)
    set_optimizer_state_dict(model, optimizer, state)


def _by_all(move: Callable[..., Any], state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():  # that there is one process only
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        move(state, checkpoint_id=folder / FOLDER, no_dist=not distributed.is_initialized())
