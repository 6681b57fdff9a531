"""A model on rows over several processes equals the model on whole rows."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import distributed
from torch._dynamo.backends.common import aot_autograd

from h3lm.flashconv import sequence_parallel
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.models.slices import past_cut, share_rows, slice_bounds, stand_in
from h3lm.train.compiling import compile_model

CASES = [f"{mixers} 2 {way}" for mixers in ("h3", "hybrid") for way in ("plain", "packed")]
CASES += ["hybrid 2 compiled", "h3 2 long"]


def differences_on(device: str, *cases: str) -> dict[str, dict[str, float]]:
    """Of loss and gradients over several processes, relative; see `sliced_model.py`."""
    command = [sys.executable, "-m", "tests.models.sliced_model", device, *cases]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    """Over 2 and 4 processes of a CPU."""
    return differences_on("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + [c.replace(" 2 ", " 4 ") for c in CASES[:4]])
def test_loss_and_gradients_equal_those_of_whole_rows(differences, case):
    off = differences[case]
    assert off["loss"] < 1e-6
    assert 0 < off["gradients"] < 5e-6


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [("h3 2 plain",), ("h3 2 long",), tuple(CASES[1:5])],
    ids=["fp32-kernels", "bf16-kernels", "torch"],
)
def test_loss_and_gradients_of_two_gpus_equal_those_of_whole_rows(cases):
    found = differences_on("cuda", *cases)
    assert found.keys() == set(cases)
    # by kernels sums over 4,500 positions, which a CPU rounds to 8e-6
    limits = {"h3 2 long": (1e-3, 2e-2), "h3 2 plain": (1e-6, 3e-5)}
    for case, off in found.items():
        of_loss, of_gradients = limits.get(case, (1e-6, 1e-5))
        assert off["loss"] < of_loss, case
        assert 0 < off["gradients"] < of_gradients, case


@pytest.fixture
def alone():
    """A group of processes that this one is all of."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # asked by the compiler
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_compiled_block_is_cut_only_where_something_is_sent(alone, monkeypatch, recomputed):
    torch.manual_seed(0)
    config = H3Config(
        vocab_size=8, hidden_size=8, num_hidden_layers=4, num_attention_heads=2, d_state=4,
        mixers=["h3", "h3", "attention", "attention"],
    )  # fmt: skip
    model = H3ForCausalLM(config).train()
    if recomputed:
        new = "activation_checkpointing_enable"  # in transformers 5.23
        getattr(model, new, model.gradient_checkpointing_enable)({"use_reentrant": False})
    share_rows(model, alone)
    pieces: list[str] = []

    backward: list[str] = []

    def note(words: list[str]) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            words.append(" ".join(f"{node.name}={node.target}" for node in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        return compiler

    compiler = torch.compile
    how = aot_autograd(fw_compiler=note(pieces), bw_compiler=note(backward))
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=how))
    compile_model(model, "blocks")
    ids = torch.randint(0, 8, (2, 16))
    count = torch.tensor(ids.numel())
    loss = model(ids, labels=ids, shift_labels=ids, num_items_in_batch=count).loss
    loss.backward()
    first, behind, of_attention, last = pieces  # equal blocks share them
    for piece in (first, of_attention):
        assert "layer_norm" in piece
        assert "mm" in piece  # the projection
    for piece in (behind, last):
        assert "layer_norm" in piece
        assert "gelu" in piece
    assert len(backward) == 4
    in_front = [piece for piece in backward if "gelu" not in piece]
    for piece, outputs in zip(in_front, (4, 2), strict=True):  # q, k and v, or qkv, and r
        assert f"tangents_{outputs}=" in piece
        assert f"tangents_{outputs + 1}=" not in piece
        assert "layer_norm_backward" in piece


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_block_is_not_cut_at_the_buckets_of_ddp(alone, monkeypatch):
    config = H3Config(
        vocab_size=8, hidden_size=512, num_hidden_layers=1, num_attention_heads=2, d_state=4,
        mixers="h3",
    )  # fmt: skip
    model = H3ForCausalLM(config).train()  # each product's weight is more than DDP's first bucket
    share_rows(model, alone)
    pieces = []
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f: compiler(f, backend=lambda g, _: pieces.append(g) or g.forward)
    )
    compile_model(model, "blocks")
    ids = torch.randint(0, 8, (1, 16))
    call = torch.nn.parallel.DistributedDataParallel(model)
    before = torch._dynamo.config.optimize_ddp
    assert before
    call(ids, labels=ids, shift_labels=ids, num_items_in_batch=torch.tensor(16)).loss.backward()
    assert len(pieces) == 2  # in front of what others are sent, and behind it
    assert torch._dynamo.config.optimize_ddp == before  # for the user's own modules


def test_recomputed_blocks_ask_nobody_again(alone, monkeypatch):
    asked: list[str] = []
    kept: list[torch.Tensor] = []
    part = sequence_parallel.Received.part

    def noting(self: Any, *given: Any) -> torch.Tensor:
        found = part(self, *given)
        kept[:] = [*kept, *(x for x in self.parts.values() if not any(x is k for k in kept))]
        return found

    monkeypatch.setattr(sequence_parallel.Received, "part", noting)
    for name in ("_gather", "_to_neighbour"):
        inner = getattr(sequence_parallel, name)

        def noted(*given: Any, name: str = name, inner: Any = inner) -> Any:
            asked.append(name)
            return inner(*given)

        monkeypatch.setattr(sequence_parallel, name, noted)
    config = H3Config(
        vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, d_state=4,
        mixers="h3",
    )  # fmt: skip
    model = H3ForCausalLM(config).train()
    share_rows(model, alone)
    ids = torch.randint(0, 8, (2, 16))
    count = torch.tensor(ids.numel())
    gradients = []
    for recomputed in (False, True):
        asked.clear()
        kept.clear()
        model.zero_grad()
        if recomputed:
            new = "activation_checkpointing_enable"  # in transformers 5.23
            getattr(model, new, model.gradient_checkpointing_enable)({"use_reentrant": False})
        loss = model(ids, labels=ids, shift_labels=ids, num_items_in_batch=count).loss
        loss.backward()
        # lengths once, and in each layer a state and k's last values, and the gradients of both
        assert sorted(asked) == ["_gather"] * 5 + ["_to_neighbour"] * 4
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(kept) == 4  # a state and k's last values of each layer, and no graph of a block
    assert not any(part.requires_grad for part in kept)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_stands_in_takes_no_memory_and_takes_the_gradient():
    r = torch.randn(2, 5, 3, requires_grad=True)
    aside = stand_in(r)
    assert aside.shape == r.shape
    assert aside.untyped_storage().nbytes() == 0
    behind = past_cut(r, aside)
    assert torch.equal(behind, r)
    grad = torch.randn_like(r)
    for leaf in (r, aside):
        assert torch.equal(torch.autograd.grad(behind, leaf, grad, retain_graph=True)[0], grad)
    torch.library.opcheck(stand_in, (r,), test_utils=("test_schema", "test_autograd_registration"))


@pytest.mark.parametrize(("length", "count"), [(75, 4), (8, 2), (3, 2)])
def test_slices_cover_the_row(length, count):
    bounds = [slice_bounds(length, i, count) for i in range(count)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == length
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    assert max(b - a for a, b in bounds) - min(b - a for a, b in bounds) <= 1


def test_a_mixer_that_passes_nothing_on_is_refused():
    model = H3ForCausalLM(
        H3Config(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            mixers="linear_attention",
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="several processes: linear_attention cannot do it"):
        share_rows(model, object())
