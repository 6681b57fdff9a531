"""Requests that join and leave a running batch."""

import json

import pytest
import torch

from h3lm.errors import UserError
from h3lm.models.serving import Request, RowChooser, Slots, read_requests

from .conftest import FAMILIES, small_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def some_requests():
    random = torch.Generator().manual_seed(5)
    sizes = [(5, 12), (40, 3), (17, 1), (1, 20), (33, 9), (8, 15), (22, 6), (3, 3)]
    return [
        Request(torch.randint(0, 72, (length,), generator=random).tolist(), count, 100 + i, i)
        for i, (length, count) in enumerate(sizes)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "top_k": 30, "top_p": 0.95}])
def test_every_request_gets_the_tokens_it_gets_alone(family, device, sampling):
    model = small_model(**FAMILIES[family]).to(device)
    together = {r.number: r.tokens for r in Slots(model, 3, 48, **sampling).run(some_requests())}
    alone = Slots(model, 1, 48, **sampling)
    for request in some_requests():
        (done,) = alone.run([request])
        assert together[done.number] == done.tokens
        assert len(done.tokens) == done.max_new_tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mixers", ["hybrid", "s4d-hybrid", "linear_attention"])
def test_greedy_tokens_are_those_of_generate(mixers, device):
    model = small_model(mixers=mixers).to(device)
    for done in Slots(model, 3, 48).run(some_requests()):
        ids = torch.tensor([done.ids], device=device)
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=done.max_new_tokens,
        )  # fmt: skip
        assert whole[0, len(done.ids) :].tolist() == done.tokens


def test_requests_leave_when_they_stop():
    model = small_model()
    free = {r.number: r.tokens for r in Slots(model, 3, 48).run(some_requests())}
    stop = free[0][4]
    ended = list(Slots(model, 3, 48, stop=[stop]).run(some_requests()))
    assert sorted(r.number for r in ended) == list(range(8))
    for request in ended:
        tokens = free[request.number]
        cut = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert request.tokens == tokens[:cut]


def test_slots_take_requests_as_they_are_needed():
    taken = []

    def arriving():
        for request in some_requests():
            taken.append(request.number)
            yield request

    running = Slots(small_model(), 2, 48).run(arriving())
    next(running)
    assert len(taken) < 8
    assert len(list(running)) == 7


def test_samples_follow_the_softmax():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 9.0]]).expand(20000, -1)
    choose = RowChooser(20000, 4, 0.8, 0, 1.0, torch.device("cpu"))
    seeds = torch.arange(20000)
    share = choose.choose(logits, seeds, torch.zeros_like(seeds)).bincount(minlength=4) / 20000
    expected = (logits[0, :4] / 0.8).softmax(0)
    # four standard deviations of a share of 20000
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 20000) ** 0.5).all()
    later = choose.choose(logits[:1], seeds[:1], torch.tensor([5]))
    assert torch.equal(later, choose.choose(logits[:1], seeds[:1], torch.tensor([5])))


@pytest.mark.parametrize(("top_k", "top_p", "allowed"), [(2, 1.0, {0, 2}), (0, 0.5, {0})])
def test_sampling_is_narrowed_down(top_k, top_p, allowed):
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).expand(500, -1)
    choose = RowChooser(500, 4, 1.0, top_k, top_p, torch.device("cpu"))
    chosen = choose.choose(logits, torch.arange(500), torch.zeros(500, dtype=torch.long))
    assert set(chosen.tolist()) == allowed


def test_a_request_longer_than_a_slot():
    slots = Slots(small_model(), 2, 20)
    with pytest.raises(UserError, match=r"request 7 needs 90 \+ 40 positions, a slot has 63"):
        list(slots.run([Request([1] * 90, 40, 0, 7)]))
    with pytest.raises(UserError, match="request 3 has no prompt"):
        list(slots.run([Request([], 4, 0, 3)]))


def test_request_files(tmp_path):
    file = tmp_path / "requests.jsonl"
    lines = [{"prompt": "ab"}, {"prompt": "c", "max_new_tokens": 3, "seed": 9}]
    file.write_text(json.dumps(lines[0]) + "\n\n" + json.dumps(lines[1]) + "\n")
    first, second = read_requests(file, lambda text: [ord(c) for c in text], 20, 50)
    assert (first.ids, first.max_new_tokens, first.seed, first.number) == ([97, 98], 20, 51, 1)
    assert (second.ids, second.max_new_tokens, second.seed, second.number) == ([99], 3, 9, 3)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", 'line 2: needs an object with a "prompt"'),
        ('{"prompt": 3}', 'line 2: needs an object with a "prompt"'),
        ('{"prompt": "a", "tokens": 3}', "line 2: 'tokens' is not one of"),
        ('{"prompt": "a", "max_new_tokens": 0}', "line 2: max_new_tokens must be a whole number"),
        ('{"prompt": "a", "seed": true}', "line 2: seed must be a whole number"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
    ],
)
def test_bad_request_lines(tmp_path, line, says):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=says):
        read_requests(file, lambda text: [ord(c) for c in text], 20, 0)


def test_request_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_requests(tmp_path / "none", list, 20, 0)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="has no requests"):
        read_requests(tmp_path / "empty", list, 20, 0)
