import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerState

from h3lm import H3Config, H3ForCausalLM
from h3lm.train.progress import Clock, Speed
from h3lm.train.throughput import flops_per_token, peak_flops


def model(mixers, **fields):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "d_state": 8}
    return H3ForCausalLM(H3Config(vocab_size=64, mixers=mixers, **(sizes | fields)))


def test_a_transformers_operations_are_those_that_torch_counts():
    transformer, length = model("attention"), 128
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        transformer(torch.zeros(1, length, dtype=torch.long)).logits.sum().backward()
    matrices = sum(p.numel() for p in transformer.parameters() if p.ndim == 2)
    vectors = sum(p.numel() for p in transformer.parameters()) - matrices
    # torch counts all scores of the attention, of which the mask leaves half, and no vectors
    scores = 2 * 6 * length * 32
    expected = counter.get_total_flops() / length - scores + 6 * vectors
    assert flops_per_token(transformer, length) == pytest.approx(expected, rel=0.05)


def test_recurrences_are_counted_by_their_definition():
    h3 = model("h3", h3_head_dim=4)
    parameters = sum(p.numel() for p in h3.parameters())
    shift, modes = 2 * 32 * 8, 14 * (8 // 2) * 32 * 4
    assert flops_per_token(h3, 128) == 6 * parameters + 2 * 3 * (shift + modes)


def test_the_peak_of_a_cpu_is_not_known_and_that_of_a_gpu_goes_by_its_name(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA L4": 121e12,
        "NVIDIA A10": 125e12,
        "NVIDIA RTX A1000": None,
        "Another": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak


def test_figures_are_of_steps_without_their_start_and_pauses_and_time_left_of_all(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("h3lm.train.progress.time.monotonic", lambda: now[0])
    clock = Clock(None, before_s=50.0)
    speed = Speed(clock, 1000, peak_tokens_per_s=4000.0)
    state = TrainerState(global_step=10, max_steps=40)
    for callback in (clock, speed):
        callback.on_train_begin(None, state, None)
    assert speed.figures(state) == {}
    now[0], state.global_step = 110.0, 11  # compiled meanwhile
    assert speed.figures(state) == {}
    speed.mark(state)
    assert clock.elapsed_s == 60.0
    assert speed.figures(state)["tokens_per_s"] == 100.0
    now[0], state.global_step = 112.0, 15
    speed.mark(state)
    assert speed.figures(state) == {"tokens_per_s": 2000.0, "seconds_left": 12.5, "mfu": 0.5}
    with speed.aside():
        now[0] += 4.0
    now[0], state.global_step = 120.0, 23
    speed.mark(state)
    found = speed.figures(state)
    assert (found["tokens_per_s"], found["mfu"]) == (2000.0, 0.5)
    assert found["seconds_left"] == 8.5 * 20 / 16  # 17 steps, and as much besides as there was
    assert speed.done(state) == 23 / 40
    for _ in range(20):  # of the last ten logs alone
        now[0], state.global_step = now[0] + 1.0, state.global_step + 4
        speed.mark(state)
    assert speed.figures(state)["tokens_per_s"] == 4000.0
    limited = Clock(100.0, before_s=50.0)
    limited.on_train_begin(None, state, None)
    now[0] += 10.0
    assert Speed(limited, 1000).done(state) == 0.6
