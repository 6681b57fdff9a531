import pytest
import torch

from h3lm.errors import UserError
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.train import run as run_module
from h3lm.train.memory import Held, short_of_memory
from h3lm.train.mesh import Mesh

from .conftest import TINY
from .test_parallel import run


def test_what_is_held_is_counted_without_allocating_it(tiny):
    config = H3Config(**TINY["model"], vocab_size=24, mixers="h3")
    parameters = sum(p.numel() for p in H3ForCausalLM(config).parameters())
    whole = Held.of(config, tiny(), Mesh(shard=4), None)
    assert whole.bytes == 16 * parameters  # ddp: each process holds it whole
    part = Held.of(config, tiny(parallel="fsdp"), Mesh(replicate=2, shard=2, seq=2), None)
    assert part.bytes == 16 * parameters // 4
    large = Held.of(H3Config.from_preset("2.7b"), tiny(), Mesh(), 141 * 10**9)
    assert large.bytes > 42e9
    large.check()


def test_the_nearest_setting_that_fits_is_named():
    held = Held(parameters=1000, parts=1, total=8000)
    with pytest.raises(UserError, match="parallel=fsdp on 3 or more processes"):
        held.check()  # two would hold 8000 each and leave nothing
    Held(parameters=1000, parts=3, total=8000).check()


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(tiny, monkeypatch):
    monkeypatch.setattr(run_module, "device_memory", lambda: 1000)
    monkeypatch.setattr(run_module, "_make_model", lambda *_: pytest.fail("it was made"))
    with pytest.raises(UserError, match="the model cannot fit: GB of a process: weights"):
        run(tiny())


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


def test_a_run_says_what_it_holds(tiny):
    assert "GB of a process: weights 0.00, gradients 0.00, optimizer 0.00" in run(tiny(steps=1))
