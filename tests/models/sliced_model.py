"""A model on rows in slices over several processes, against the same model on whole rows.

python -m tests.models.sliced_model [DEVICE [CASE]...] prints, as a line of JSON, how far loss and
gradients are off in each case, or in those named, relative to the largest value: in four processes,
or on two GPUs. There "h3 2 plain" takes the kernels, in float32 and in slices of unlike length and
several tiles, and "long" in bfloat16, as training does; the rest would compile for minutes.
"""

# ruff: noqa: T201 (what it prints is its result)

import json
import math
import sys
from functools import partial

import torch
from torch import distributed

from h3lm.layers import H3
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.models.slices import share_rows, slice_bounds, whole_rows
from h3lm.ssm import DiagonalSSM
from h3lm.train.compiling import compile_model
from tests.processes import in_processes

L = 75  # divides neither by 2 nor by 4
SEVERAL_TILES = 4501  # a tile of float32 has 2048 positions
LONG = 3301  # slices of which forget what was in front of them
DOCUMENTS = [0, 11, 19, 60, 63]  # one begins with a slice, one goes over two edges


def in_bf16(way: str, device: str) -> bool:
    return way == "long" and device == "cuda"


def by_kernels(mixers: str, way: str, device: str) -> bool:
    return in_bf16(way, device) or (device == "cuda" and (mixers, way) == ("h3", "plain"))


def make(mixers: str, way: str, device: str) -> H3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "d_state": 64} if in_bf16(way, device) else {}
    config = H3Config(
        **{"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "d_state": 8} | sizes,
        mixers=["h3", "attention", "h3"] if mixers == "hybrid" else mixers, rotary_dim=4,
        h3_head_dim=2 if mixers == "hybrid" else 1, num_hidden_layers=3,
    )  # fmt: skip
    model = H3ForCausalLM(config).train().to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, H3) and not by_kernels(mixers, way, device):
            module.backend = "torch"
        if isinstance(module, DiagonalSSM) and way == "long":  # forgets within a slice
            module.log_dt.data.clamp_(min=math.log(0.05))
    if way == "packed":
        new = "activation_checkpointing_enable"  # in transformers 5.23
        getattr(model, new, model.gradient_checkpointing_enable)({"use_reentrant": False})
    if way == "compiled":
        compiler = torch.compile
        torch.compile = lambda f: compiler(f, backend="aot_eager")  # no code is generated
        compile_model(model, "blocks")
        torch.compile = compiler
    return model


def run(model: H3ForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    count, half = torch.tensor(batch.pop("count")), batch.pop("half")
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        loss = model(**batch, num_items_in_batch=count).loss
    loss.backward()
    return loss.item(), [p.grad.clone().contiguous() for p in model.parameters()]


def run_case(mixers: str, way: str, group, device: str) -> dict[str, float]:
    model = make(mixers, way, device)
    # compiled: slices of one length
    packed, length = way == "packed", {"long": LONG, "compiled": L + 1}.get(way, L)
    if in_bf16(way, device):
        length -= length % 32  # Hopper's take multiples of 16
    elif by_kernels(mixers, way, device):
        length = SEVERAL_TILES
    rows = 1 if packed else 2
    tokens = torch.randint(0, 32, (rows, length + 1))
    labels = tokens[:, 1:].clone()
    labels[:, 30:37] = -100
    whole = {"input_ids": tokens[:, :-1], "labels": labels, "shift_labels": labels}
    if packed:
        positions = torch.arange(L)
        starts = torch.zeros(L, dtype=torch.long)
        starts[DOCUMENTS] = torch.tensor(DOCUMENTS)
        whole["position_ids"] = (positions - starts.cummax(0)[0])[None]
    whole = {name: x.to(device) for name, x in whole.items()}
    others = {"count": int((labels != -100).sum()), "half": in_bf16(way, device)}
    share_rows(model, group)
    with whole_rows(model):
        loss, grads = run(model, whole | others)
    start, stop = slice_bounds(
        length, distributed.get_rank(group), distributed.get_world_size(group)
    )
    mine = {name: x[:, start:stop].contiguous() for name, x in whole.items()}
    part, parts = run(model, mine | others)
    together = torch.tensor(part, dtype=torch.float64, device=device)
    distributed.all_reduce(together, group=group)
    off = {"loss": abs(float(together) - loss) / loss}
    for grad in parts:
        distributed.all_reduce(grad, group=group)
    off["gradients"] = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(parts, grads, strict=True)
    )
    return off


def process(device: str, cases: list[str], rank: int) -> dict[str, dict[str, float]]:
    groups = [(distributed.get_world_size(), distributed.group.WORLD)]
    if device == "cpu":
        pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
        groups.insert(0, (2, pairs[rank // 2]))
    report = {}
    for mixers in ("h3", "hybrid"):
        for world, group in groups:
            ways = ["plain", "packed"]
            if world == 2:
                ways.append("long" if mixers == "h3" else "compiled")
            for way in ways:
                case = f"{mixers} {world} {way}"
                if cases and case not in cases:
                    continue
                again = way == "compiled" and rank > 1  # by a second pair, which takes long
                off = {} if again else run_case(mixers, way, group, device)
                report[case] = off
    return report


if __name__ == "__main__":
    device, *cases = sys.argv[1:] or ["cpu"]
    where = (4, "gloo") if device == "cpu" else (2, "nccl")
    reports = in_processes(where[0], partial(process, device, cases), where[1])
    worst = {
        case: {
            key: max(report[case].get(key, 0.0) for report in reports)
            for key in ("loss", "gradients")
        }
        for case in reports[0]
    }
    print(json.dumps(worst))
