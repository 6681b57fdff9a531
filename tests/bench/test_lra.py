from dataclasses import replace

import pytest
import torch

from h3lm.bench.lra import (
    PATHS,
    PLAIN,
    S4_FFT,
    S4_KERNEL,
    SDPA,
    TASKS,
    make_batch,
    make_model,
    means,
    plot_speed_ups,
    run,
    training_step,
    with_ratios,
)
from h3lm.errors import UserError

SMALL = [replace(task, length=12, batch=2, width=8) for task in TASKS if task.name != "path-x"]
SMALL = [replace(task, state=4) for task in SMALL]


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
@pytest.mark.parametrize("name", [name for name in PATHS if name != S4_KERNEL])
def test_every_path_takes_a_training_step_of_every_task(task, name):
    model = make_model(task, PATHS[name], device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    training_step(model, optimizer, make_batch(task, device="cpu"))()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > len(changed) // 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_plain_attention_is_attention():
    task = SMALL[0]
    plain, sdpa = (make_model(task, PATHS[name], device="cpu").eval() for name in (PLAIN, SDPA))
    batch = make_batch(task, device="cpu")
    assert torch.allclose(plain(**batch).logits, sdpa(**batch).logits, atol=1e-5)


def test_the_tasks_are_those_of_the_paper():
    rows = {task.name: (task.length, task.batch, task.width, task.state) for task in TASKS}
    assert rows == {
        "listops": (2048, 32, 256, 4), "text": (4096, 16, 256, 4),
        "retrieval": (4000, 64, 256, 4), "image": (1024, 50, 512, 64),
        "pathfinder": (1024, 64, 256, 64), "path-x": (16384, 16, 256, 64),
    }  # fmt: skip


def test_ratios_means_and_picture(tmp_path):
    rows = []
    for task, scale in (("text", 1.0), ("image", 4.0), ("path-x", 1.0)):
        rows += with_ratios([
            {"task": task, "path": S4_FFT, "ms per example": 4.0},
            {"task": task, "path": S4_KERNEL, "ms per example": 4.0 / scale},
            {"task": task, "path": PLAIN, "ms per example": 8.0}
            if task != "path-x" else {"task": task, "path": PLAIN, "batch": "out of memory"},
        ])  # fmt: skip
    kernel = [row for row in rows if row["path"] == S4_KERNEL]
    assert [row["over s4 torch.fft"] for row in kernel] == [1.0, 4.0, 1.0]
    assert [row.get("over plain") for row in kernel] == [2.0, 8.0, None]
    found = {(row["task"], row["path"]): row for row in means(rows)}
    assert found["mean without path-x", S4_KERNEL]["over s4 torch.fft"] == pytest.approx(2.0)
    assert found["mean", S4_KERNEL]["over plain"] == pytest.approx(4.0)
    assert plot_speed_ups(tmp_path, "lra", rows).stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(UserError, match="bench lra times a GPU"):
        run(tmp_path, print)


@pytest.mark.gpu
def test_it_measures_and_reports(tmp_path):
    lines = []
    path = run(tmp_path, lines.append, tuple(replace(t, length=256) for t in SMALL[:1]), 3)
    assert "over s4 torch.fft" in path.read_text()
