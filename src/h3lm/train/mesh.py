"""How the processes of a run are arranged: copies of the model, parts of it, slices of rows."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from h3lm.errors import UserError
from h3lm.models import H3ForCausalLM
from h3lm.models.slices import check_mixers, share_rows, slice_bounds
from h3lm.train.processes import on_one_host, rank, world_size
from h3lm.train.recipe import Recipe


@dataclass(frozen=True)
class Mesh:
    """The run's processes as a grid (replicate, shard, seq), the last dimension the fastest.

    Attributes:
        replicate: Copies of the sharded model; processes of one copy should be of one host.
        shard: Processes of a copy, each of which has data of its own.
        seq: Processes that share each row, each with a slice of it; of a sharded model they
            hold parts too.
    """

    replicate: int = 1
    shard: int = 1
    seq: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> "Mesh":
        """The grid that a recipe asks for.

        Raises:
            UserError: if it does not divide the processes that there are.
        """
        replicate, seq = (recipe.mesh.get(name, 1) for name in ("replicate", "seq"))
        shard, left = divmod(world_size(), replicate * seq)
        if left or not shard:
            raise UserError(
                f"the mesh's replicate={replicate} times seq={seq} does not divide "
                f"{world_size()} processes"
            )
        return cls(replicate, shard, seq)

    @property
    def readers(self) -> int:
        """How many different batches are read at once."""
        return self.replicate * self.shard

    @property
    def row_slice(self) -> tuple[int, int]:
        """Which slice of its rows this process takes, from 0, and of how many."""
        return rank() % self.seq, self.seq

    @property
    def bucket_mb(self) -> int | None:
        """Size of DDP's buckets of gradients; None for its own.

        Slices on one host sum all at the end, in one bucket: over NVLink that takes less than what
        sums beside the backward pass take from it, and others have not long waited for each other.
        """
        return 1 << 20 if self.seq > 1 and on_one_host() else None

    def sharding(self, device: torch.device) -> DeviceMesh | None:
        """What `shard_model` shards over: None for all processes alike."""
        if self.replicate == 1:
            return None
        sizes = self.replicate, self.shard * self.seq
        return init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))

    def share_rows(self, model: H3ForCausalLM, device: torch.device) -> None:
        """Have a model take slices of rows, if the grid has any."""
        if self.seq == 1:
            return
        sizes = self.readers, self.seq
        grid = init_device_mesh(device.type, sizes, mesh_dim_names=("read", "seq"))
        share_rows(model, grid["seq"].get_group())

    def check(self, model: H3ForCausalLM, recipe: Recipe) -> None:
        """Check that rows can be sliced.

        Raises:
            UserError: if a layer cannot, slices are too short, or several rows are packed.
        """
        if self.seq == 1:
            return
        try:
            check_mixers(model)
        except ValueError as error:
            raise UserError(f"the mesh has seq={self.seq}: {error}") from None
        first, stop = slice_bounds(recipe.block_length, self.seq - 1, self.seq)
        needed = (model.config.h3_num_taps or model.config.d_state) - 1
        if stop - first < needed:
            raise UserError(
                f"block_length={recipe.block_length} over seq={self.seq} processes leaves "
                f"{stop - first} tokens to each, and the short filter takes {needed} from the "
                "process before: use fewer processes or longer blocks"
            )
        rows = recipe.micro_batch_size or recipe.batch_size // self.readers
        if recipe.reset_state_at_documents and rows > 1:
            raise UserError(
                f"reset_state_at_documents over seq={self.seq} processes takes one block at a "
                f"time: micro_batch_size=1, not {rows}"
            )


def check_same_recipe(recipe: Recipe) -> None:
    """Check that all processes run the same; all must come here.

    Raises:
        UserError: in every process, naming a key that differs.
    """
    if not distributed.is_initialized():
        return
    gathered: list[Mapping[str, object]] = [{}] * world_size()
    distributed.all_gather_object(gathered, json.loads(json.dumps(asdict(recipe))))
    for number, other in enumerate(gathered):
        for name, value in gathered[0].items():
            if other[name] != value:
                raise UserError(
                    f"the processes were started with different recipes: {name} is {value!r} in "
                    f"process 0 and {other[name]!r} in process {number}"
                )
