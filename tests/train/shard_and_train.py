"""Train a small model sharded over the processes of `torchrun`; prints losses as JSON.

python -m torch.distributed.run --nproc-per-node N shard_and_train.py [bfloat16]
"""

# ruff: noqa: T201 (what it prints is its result)

import json
import sys

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from h3lm import H3Config, H3ForCausalLM
from h3lm.ssm import DiagonalSSM, ShiftSSM
from h3lm.train.parallel import shard_model, world_size
from h3lm.train.param_groups import parameter_groups


def main(compute: str | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = H3Config(
        vocab_size=40, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, d_state=8,
        initializer_range=0.2,
    )  # fmt: skip
    model = H3ForCausalLM(config).train()
    seen: dict[str, set[str]] = {key: set() for key in ("shift", "diagonal", "linear")}
    watch(seen)
    if world_size() > 1:
        distributed.init_process_group("gloo")
        shard_model(model, compute_dtype=getattr(torch, compute) if compute else None)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert model.lm_head.weight is model.model.embed_tokens.weight
    groups = parameter_groups(model, learning_rate=3e-3, weight_decay=0.1)
    for group in groups:
        group.pop("names")
    optimizer = torch.optim.AdamW(groups, fused=True)
    generator = torch.Generator().manual_seed(1)
    rank = distributed.get_rank() if world_size() > 1 else 0
    losses = []
    for _ in range(5):
        ids = torch.randint(0, 40, (4, 33), generator=generator)
        mine = ids.chunk(world_size())[rank]
        labels = mine[:, 1:].contiguous()
        loss = model(input_ids=mine[:, :-1], labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world_size() > 1:
            distributed.all_reduce(total)
        losses.append(total.item() / world_size())
    if rank == 0:
        stored = sorted({str(parameter.dtype) for parameter in model.parameters()})
        found = {name: sorted(dtypes) for name, dtypes in seen.items()}
        print(json.dumps({"losses": losses, "stored": stored, **found}))
    if world_size() > 1:
        distributed.destroy_process_group()


def watch(seen: dict[str, set[str]]) -> None:
    """Note the dtypes that modules compute with, where they read their parameters."""

    def noting(module: type, name: str, key: str) -> None:
        original = getattr(module, name)

        def read(self, *arguments):
            parameters = list(self.parameters())
            assert not any(isinstance(parameter, DTensor) for parameter in parameters)
            seen[key] |= {str(parameter.dtype) for parameter in parameters}
            return original(self, *arguments)

        setattr(module, name, read)

    noting(ShiftSSM, "taps", "shift")
    noting(DiagonalSSM, "system", "diagonal")
    noting(torch.nn.Linear, "forward", "linear")


if __name__ == "__main__":
    main(*sys.argv[1:])
