"""What a model's weights, gradients and optimiser take, before any of it is allocated."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from h3lm.errors import UserError
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.train.mesh import Mesh
from h3lm.train.recipe import Recipe

BYTES = {"weights": 4, "gradients": 4, "optimizer": 8}  # of a parameter: fp32, AdamW's two moments
GB = 1e9


@dataclass(frozen=True)
class Held:
    """Memory that a process holds all along, in bytes; activations come on top.

    Attributes:
        parameters: Parameters of the whole model.
        parts: Among how many processes they are divided.
        total: What the device has, or None if that is not known.
    """

    parameters: int
    parts: int
    total: int | None

    @classmethod
    def of(cls, config: H3Config, recipe: Recipe, mesh: Mesh, total: int | None) -> "Held":
        """Count a model that is not there yet."""
        with torch.device("meta"):
            parameters = H3ForCausalLM(config).num_parameters()
        parts = mesh.shard * mesh.seq if recipe.parallel == "fsdp" else 1
        return cls(parameters, parts, total)

    @property
    def bytes(self) -> int:
        """Weights, gradients and optimiser of a process."""
        return sum(BYTES.values()) * self.parameters // self.parts

    def check(self) -> None:
        """Raise UserError, with the nearest setting that fits, if not even this fits."""
        if self.total is None or self.bytes < self.total:
            return
        needed = math.ceil(sum(BYTES.values()) * self.parameters / self.total)
        needed += needed * self.total == sum(BYTES.values()) * self.parameters
        raise UserError(
            f"the model cannot fit: {self}. parallel=fsdp on {needed} or more processes of one "
            "copy divides it far enough, if their activations fit beside it"
        )

    def __str__(self) -> str:
        shares = ", ".join(
            f"{name} {size * self.parameters / self.parts / GB:.2f}" for name, size in BYTES.items()
        )
        words = f"GB of a process: {shares}"
        if self.total is None:
            return words
        left = (self.total - self.bytes) / GB
        rest = f"leaves {left:.2f} for activations" if left > 0 else f"lacks {-left:.2f}"
        return f"{words}; of {self.total / GB:.2f} that {rest}"


@contextmanager
def short_of_memory(recipe: Recipe, rows: int) -> Iterator[None]:
    """Say in one line what to do when a run has no memory left; nothing that was saved is lost.

    Args:
        recipe: The run.
        rows: Blocks that a process takes through the model at once.

    Raises:
        UserError: naming keys that may change in the same run.
    """
    try:
        yield
    except RuntimeError as error:
        on_cpu = "can't allocate memory" in str(error)
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        fewer = next((n for n in range(rows // 2, 0, -1) if rows % n == 0), None)
        ways = [] if fewer is None else [f"micro_batch_size={fewer}"]
        ways += [] if recipe.gradient_checkpointing else ["gradient_checkpointing=true"]
        ways += [] if recipe.parallel == "fsdp" else ["parallel=fsdp on several GPUs"]
        remedy = " or ".join(ways) or "a shorter block_length in another output_dir"
        where = "the machine" if on_cpu else "the GPU"
        raise UserError(
            f"{where} has no memory left for {rows} x {recipe.block_length} tokens at once: "
            f"take {remedy}; checkpoints are kept, and the run goes on from the newest"
        ) from error


def device_memory() -> int | None:
    """Bytes of this process's GPU, or None without one."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
