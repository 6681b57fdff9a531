import io
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from h3lm.errors import UserError
from h3lm.evals.perplexity import score_tokens
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.train import memory
from h3lm.train import run as run_module
from h3lm.train.graphs import GraphedSteps
from h3lm.train.memory import (
    Estimate,
    Kept,
    keep_activations,
    kept_by_blocks,
    short_of_memory,
)
from h3lm.train.mesh import Mesh
from h3lm.train.recipe import make_recipe
from h3lm.train.trainer import H3Trainer

from .conftest import TINY
from .test_parallel import run

CPU = torch.device("cpu")
SMALL = Estimate(
    parameters=1000, width=4, vocab=8, kept=(Kept(0, 1000), Kept(0, 3000)), tokens=10, total=10**9
)


def test_what_is_held_is_counted_without_allocating_it(tiny):
    config = H3Config(**TINY["model"], vocab_size=24, mixers="h3")
    parameters = sum(p.numel() for p in H3ForCausalLM(config).parameters())
    whole = Estimate.of(config, tiny(), Mesh(shard=4), CPU, False)
    assert whole.held == 16 * parameters  # ddp: each process holds it whole
    assert whole.tokens == 1 * 16
    part = Estimate.of(config, tiny(parallel="fsdp"), Mesh(2, 2, 2), CPU, False)
    assert part.held == 16 * parameters / 4
    assert part.tokens == 1 * 8
    large = Estimate.of(H3Config.from_preset("2.7b"), tiny(), Mesh(), CPU, True)
    assert large.held > 42e9


def test_slices_of_rows_keep_what_attention_gathers(tiny):
    config = H3Config(**TINY["model"], vocab_size=24, mixers="hybrid")
    alone, sliced = (Estimate.of(config, tiny(), mesh, CPU, True) for mesh in (Mesh(), Mesh(seq=3)))
    more = [b.of_token - a.of_token for a, b in zip(alone.kept, sliced.kept, strict=True)]
    assert more == pytest.approx([0 if m == "h3" else 2 * 4 * 16 for m in config.mixers])
    assert sliced.tokens == 4 * 6


def test_sharded_blocks_stay_whole_where_there_is_room():
    shards = replace(SMALL, parts=2)
    more = shards.needs(False, gathered=True) - shards.needs(False)
    assert more == 2 * (SMALL.parameters - SMALL.vocab * SMALL.width)
    assert shards.keeps_gathered(False)
    tight = replace(shards, total=int(shards.needs(False) / memory.USABLE) + 1)
    assert tight.choose(None)[0] == 0
    assert not tight.keeps_gathered(False)
    assert not SMALL.keeps_gathered(False)  # nothing is sharded
    assert not replace(shards, total=None).keeps_gathered(False)


def test_gradients_that_are_not_accumulated_take_the_place_of_activations():
    once = replace(SMALL, accumulated=False)
    assert SMALL.needs(False) - once.needs(False) == 4 * SMALL.parameters
    few = replace(SMALL, tokens=1, accumulated=False)  # the backward pass ends with more
    assert few.needs(True) > few.held


def test_gradients_in_the_buckets_of_copies_are_there_all_along(tiny):
    config = H3Config(**TINY["model"], vocab_size=24, mixers="h3")

    def accumulated(mesh, **changes):
        return Estimate.of(config, tiny(**changes), mesh, CPU, False).accumulated

    assert not accumulated(Mesh())
    assert accumulated(Mesh(shard=2))
    assert accumulated(Mesh(seq=2))
    assert not accumulated(Mesh(shard=2), parallel="fsdp")
    assert accumulated(Mesh(), micro_batch_size=1)


@pytest.mark.parametrize("mixers", ["h3", "attention", "s4d", "linear_attention"])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_blocks_keep_is_what_a_training_step_keeps(mixers, rows):
    """Measured on one block of each kind at two lengths; here on the whole model, at a third."""
    config = H3Config(
        vocab_size=32, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, d_state=8,
        mixers=mixers, attention_dropout=0.0, embedding_dropout=0.0,
    )  # fmt: skip
    model = H3ForCausalLM(config).train()
    saved, own = [], {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x):
        saved.append(weakref.ref(x))
        return x

    ids = torch.zeros(rows, 192, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        hidden = model.model(ids).last_hidden_state
    alive = [x.untyped_storage() for ref in saved if (x := ref()) is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
    found = sum(size for at, size in sizes.items() if at not in own)
    expected = sum(kept.bytes(rows * 192) for kept in kept_by_blocks(config, CPU, False))
    # beside the blocks: ids, the input of the last norm, groups of chunks that are not full
    assert found == pytest.approx(expected, rel=0.2)
    assert hidden.shape == (rows, 192, 32)


def test_recomputation_is_chosen_where_all_would_not_fit():
    assert SMALL.needs(True) < SMALL.needs(False)
    assert SMALL.choose(None) == (0, "they fit 0.9, 90% of the device's")
    assert replace(SMALL, total=None).choose(None)[0] == 0
    tight = replace(SMALL, total=int(SMALL.needs(False)))
    chosen, why = tight.choose(None)
    assert chosen
    assert "without that it would take" in why
    for wanted in (True, False):
        assert tight.choose(wanted) == (2 * wanted, "the recipe says so")


def test_no_more_blocks_are_recomputed_than_have_to_be():
    blocks = replace(SMALL, kept=(Kept(0, 1000),) * 8, tokens=1000)
    needs = [blocks.needs(n) for n in range(9)]
    assert needs[8] == blocks.needs(True)
    assert needs[0] == blocks.needs(False)
    assert needs[1:8] == sorted(needs[1:8], reverse=True)
    for n in (3, 6):
        tight = replace(blocks, total=int(needs[n] / memory.USABLE) + 1)
        assert tight.choose(None)[0] == n
    assert replace(blocks, total=1).choose(None)[0] == 8


@pytest.mark.parametrize(
    ("tokens", "room", "changes", "remedy"),
    [
        (10, 1.05, {"gradient_checkpointing": False}, "gradient_checkpointing=true fits"),
        (1000, 1.05, {"micro_batch_size": 4}, "micro_batch_size=2 fits"),
        (1000, 1.05, {"micro_batch_size": 4, "gradient_checkpointing": False},
         "micro_batch_size=2 with gradient_checkpointing=true fits"),
    ],
)  # fmt: skip
def test_the_nearest_setting_that_fits_is_named(tiny, tokens, room, changes, remedy):
    recipe = tiny(**changes)
    base = replace(SMALL, tokens=tokens)
    fits = replace(base, tokens=tokens // 2) if "micro_batch_size" in changes else base
    estimate = replace(base, total=int(room * fits.needs(True)))
    with pytest.raises(UserError, match=f"the model cannot fit: .* lacks .* {remedy}$") as error:
        estimate.check(recipe)
    assert "\n" not in str(error.value)


def test_a_model_too_large_for_one_device_is_divided(tiny):
    large = Estimate(10**9, 2048, 50000, (Kept(1e6, 1e4),) * 10, tokens=16, total=10 * 10**9)
    with pytest.raises(UserError, match="parallel=fsdp on 4 processes of one copy fits"):
        large.check(tiny(batch_size=1))
    assert replace(large, parts=4).needs(True) < large.total < replace(large, parts=2).needs(True)
    long = replace(large, tokens=10**5)  # of a block of 16
    with pytest.raises(
        UserError,
        match=r"parallel=fsdp on 32 processes of one copy with block_length=8 \(or rows shared by "
        r"mesh.seq\) fits$",
    ):
        long.check(tiny(batch_size=1))
    half = replace(long, tokens=10**5 // 2)
    assert replace(half, parts=32).needs(True) < large.total < replace(half, parts=16).needs(True)
    assert replace(long, parts=2**11).needs(True) > large.total
    with pytest.raises(UserError, match="no setting does: the model is too large"):
        replace(large, tokens=10**9).check(tiny(batch_size=1))


def test_an_evaluation_stands_beside_a_captured_step(tiny):
    """A graph keeps the memory of its step; blocks that are recomputed are not captured."""
    config = H3Config(**TINY["model"], vocab_size=24, mixers="h3")
    launched = Estimate.of(config, tiny(eval_every=2), Mesh(), CPU, False)
    assert launched.evaluation == 0
    captured = replace(launched, evaluation=5e8, total=10**9)
    assert captured.needs(0) - launched.needs(0) == pytest.approx(5e8)
    assert captured.needs(1) == launched.needs(1)
    assert captured.activations(0) == pytest.approx(launched.activations(0))
    assert "activations 0.00, evaluation 0.50; of 1.00" in captured.words(0)
    assert "evaluation" not in captured.words(1)
    tight = replace(captured, total=5 * 10**8)
    assert tight.choose(None)[0] == 1
    with pytest.raises(UserError, match=r"evaluation .* lacks .* graphs=false fits$"):
        tight.check(tiny(gradient_checkpointing=False))


def test_what_an_evaluation_takes_are_the_logits_of_its_windows(tiny):
    config = H3Config(**TINY["model"], vocab_size=2**20, mixers="h3")
    kept = (Kept(0, 10), Kept(50, 20))
    assert memory._of_evaluation(config, tiny(), 4, kept) == 0
    found = memory._of_evaluation(config, tiny(eval_every=2), 4, kept)
    assert found == 12 * 4 * 16 * 2**20 + 50 + 20 * 4 * 16
    few = memory._of_evaluation(config, tiny(eval_every=2), 64, kept)
    assert few == 12 * 2**28 + 50 + 20 * 2**28 // 2**20  # as many windows as may be at once
    strided = memory._of_evaluation(config, tiny(eval_every=2, eval_stride=4), 4, kept)
    assert strided == 12 * 4 * 4 * 2**20 + 50 + 20 * 4 * 16


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(tiny, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: 1000)
    monkeypatch.setattr(run_module, "_make_model", lambda *_: pytest.fail("it was made"))
    with pytest.raises(UserError, match="the model cannot fit: GB of a process: weights"):
        run(tiny())


@pytest.mark.parametrize("total", [None, 10**12, "tight"])
def test_a_run_says_what_it_takes_and_what_it_chose(tiny, monkeypatch, total):
    model = TINY["model"] | {"num_hidden_layers": 4}
    recipe = tiny(steps=1, block_length=128, batch_size=8, model=model, mixers="attention")
    if total == "tight":
        config = H3Config(**model, vocab_size=24, mixers="attention")
        total = int(Estimate.of(config, recipe, Mesh(), CPU, False).needs(False))
    chosen = total not in (None, 10**12)
    monkeypatch.setattr(memory, "device_memory", lambda: total)
    seen = []
    make = H3Trainer.compute_loss

    def noting(self, *arguments, **named):
        seen.append([layer.gradient_checkpointing for layer in self.model.model.layers])
        return make(self, *arguments, **named)

    monkeypatch.setattr(H3Trainer, "compute_loss", noting)
    shown = io.StringIO()
    run_module.train(recipe, Console(file=shown, width=300))
    assert "GB of a process: weights 0.00, gradients 0.00, optimizer 0.00, activations" in (
        shown.getvalue()
    )
    words = "kept, not recomputed: "
    if chosen:
        words = "activations of 1 of 4 blocks are recomputed in the backward pass: without that"
    assert (words in shown.getvalue()) == (total is not None)  # a CPU has no limit to speak of
    assert seen == [[chosen, False, False, False]]


@pytest.mark.parametrize(
    ("error", "changes", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), {}, "GPU .* 4 x 16 .* take "
         "micro_batch_size=2 or gradient_checkpointing=true or parallel=fsdp on several"),
        (torch.OutOfMemoryError(), {"micro_batch_size": 1, "gradient_checkpointing": True},
         "take parallel=fsdp on several GPUs;"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), {}, "the machine "),
    ],
)  # fmt: skip
def test_memory_that_runs_out_is_one_line_with_what_to_change(
    tiny, monkeypatch, error, changes, remedy
):
    forward, calls = H3ForCausalLM.forward, []

    def failing(self, *arguments, **named):
        calls.append(self.training)
        if sum(calls) * (changes.get("micro_batch_size") or 4) > 12:  # in the fourth step
            raise error
        return forward(self, *arguments, **named)

    monkeypatch.setattr(H3ForCausalLM, "forward", failing)
    with pytest.raises(UserError, match=remedy) as caught:
        run(tiny(save_every=2, **changes))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert "resuming at step 2" in run(tiny(save_every=2, micro_batch_size=2))


def test_other_faults_stay_what_they_are(tiny):
    with pytest.raises(RuntimeError, match="ours"), short_of_memory(tiny(), 4):
        raise RuntimeError("ours")


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [0, 7, 12])
@pytest.mark.parametrize("mixers", ["hybrid", "attention"])
def test_the_estimate_is_what_a_gpu_takes(tiny, mixers, recomputed):
    device = torch.device("cuda")
    config = H3Config.from_preset("125m", mixers, embedding_dropout=0.0, attention_dropout=0.0)
    recipe = tiny(block_length=2048, batch_size=8, model={}, preset="125m", mixers=mixers)
    estimate = Estimate.of(config, recipe, Mesh(), device, True)
    with device:
        model = H3ForCausalLM(config).train()
        ids = torch.zeros(8, 2048, dtype=torch.long)
    if recomputed:
        new = "activation_checkpointing_enable"  # in transformers 5.23
        getattr(model, new, model.gradient_checkpointing_enable)({"use_reentrant": False})
        keep_activations(model, recomputed)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, skip_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    taken = torch.cuda.max_memory_allocated()
    assert taken == pytest.approx(estimate.needs(recomputed), rel=0.25)


@pytest.mark.gpu
def test_a_captured_step_and_an_evaluation_take_what_is_estimated(tiny):
    device = torch.device("cuda")
    config = H3Config.from_preset("125m", embedding_dropout=0.0, attention_dropout=0.0)
    recipe = tiny(block_length=2048, batch_size=8, model={}, preset="125m", eval_every=1)
    estimate = Estimate.of(config, recipe, Mesh(), device, True)
    assert estimate.evaluation > 1e9
    with device:
        model = H3ForCausalLM(config).train()
        ids = torch.zeros(8, 2048, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    steps = GraphedSteps(model.parameters())

    def step(inputs):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs, skip_logits=True).loss
        loss.backward()
        return loss.detach()

    for _ in range(4):
        steps({"input_ids": ids, "labels": ids}, step)
        optimizer.step()
        optimizer.zero_grad()
    assert steps.captured
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        score_tokens(model, np.zeros(8 * 2048 + 1, np.int64), context=2048, batch_size=8)
    # what a graph has in its pool is reserved, whether it runs or not
    taken = torch.cuda.max_memory_reserved()
    assert taken == pytest.approx(estimate.needs(0), rel=0.25)


def test_what_would_fit_divides_the_rows_of_a_process_and_fits():
    recipe = make_recipe({"steps": 1, "batch_size": 32, "gradient_checkpointing": True})
    of_eight = replace(SMALL, tokens=4 * 1024, share=4, accumulated=False)
    for fewer in (2, 1):
        fits = replace(of_eight, tokens=fewer * 1024, accumulated=True).needs(True)
        tight = replace(of_eight, total=int(fits) + 1)
        with pytest.raises(UserError, match=f"micro_batch_size={fewer} fits"):
            tight.check(recipe)
