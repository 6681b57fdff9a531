from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from h3lm import H3Config, H3ForCausalLM, flashconv
from h3lm.evals.prefix_tree import Request
from h3lm.evals.scorer import Limits, TreeScorer
from h3lm.flashconv import dispatch, op

VOCABULARY = 24
ROOMY = Limits(2048, 1024, 512, 2**30, 2**27, 1)
TIGHT = Limits(12, 5, 4, 3000, 2**9, 1)
PADDED = Limits(64, 50, 16, 40000, 2**14, 16)


def h3(mixers, **fields):
    return H3ForCausalLM(
        H3Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            d_state=8,
            initializer_range=0.4,
            mixers=mixers,
            **fields,
        )
    )


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            initializer_range=0.4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


MODELS = {
    "h3": lambda: h3("h3"),
    "h3 with heads": lambda: h3("h3", h3_head_dim=2),
    "hybrid": lambda: h3("hybrid"),
    "rotary": lambda: h3("attention", rotary_dim=8),
    "learned positions": lambda: h3("hybrid", num_learned_positions=64),
    "h3, learned positions": lambda: h3("h3", num_learned_positions=64),
    "s4d": lambda: h3("s4d"),
    "s4": lambda: h3("s4"),
    "gss": lambda: h3("gss"),
    "linear attention": lambda: h3("linear_attention"),
    "gpt2": gpt2,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.fixture(scope="module")
def requests():
    """Documents, some cut short, some with short questions, with answers of up to 5 tokens."""
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, VOCABULARY, n).tolist() for n in (5, 17, 38)]
    found = []
    for i in range(12):
        document = documents[i % 3]
        if i % 4 == 0:
            document = document[: draw.integers(1, len(document))]
        question = draw.integers(0, 3, draw.integers(0, 6)).tolist()
        answer = draw.integers(0, VOCABULARY, draw.integers(1, 6)).tolist()
        found.append(Request([*document, *question], answer))
    return found


def brute_force(model, request):
    """One forward pass from the beginning for each token, nothing shared, nothing padded."""
    total, greedy = 0.0, True
    sequence = list(request.context)
    for token in request.continuation:
        with torch.no_grad():
            logits = model(torch.tensor([sequence]), use_cache=False).logits[0, -1].double()
        total += float(logits[token] - logits.exp().sum().log())
        greedy &= int(logits.argmax()) == token
        sequence.append(token)
    return total, greedy


def test_the_tree_is_brute_force(model, requests):
    expected = [brute_force(model, r) for r in requests]
    for limits, cost in ((ROOMY, 0), (ROOMY, 8), (TIGHT, 2), (PADDED, 2)):
        scorer = TreeScorer(model, limits=limits, state_cost_tokens=cost)
        for found, (log_likelihood, greedy) in zip(scorer.score(requests), expected, strict=True):
            assert found.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
            assert found.is_greedy == greedy


def test_requests_are_handed_over_once_when_they_are_done(requests):
    torch.manual_seed(0)
    handed = []
    scorer = TreeScorer(h3("hybrid").eval(), limits=TIGHT, state_cost_tokens=0)
    answers = scorer.score(
        requests, finished=lambda i, a: handed.append(list(zip(i, a, strict=True)))
    )
    assert len(handed) > 3
    flat = [pair for some in handed for pair in some]
    assert len(flat) == len(requests)
    assert dict(flat) == dict(enumerate(answers))


def test_states_stay_within_the_budget_whatever_the_size_of_the_tree():
    torch.manual_seed(0)
    model = h3("hybrid").eval()
    # every prefix of one document branches: kept level by level this would grow with its length
    document = np.random.default_rng(1).integers(0, VOCABULARY, 64).tolist()
    peaks = []
    for length in (16, 64):
        many = [Request(document[:n], [1, 2]) for n in range(1, length)]
        scorer = TreeScorer(
            model, limits=Limits(64, 64, 16, 1, 2**20, 1), state_cost_tokens=0
        )  # a budget of one byte: one state at a time
        scorer.score(many)
        peaks.append(scorer.work.peak_state_bytes / scorer.shape.row_bytes(length))
    assert peaks[1] <= peaks[0] * 2


def test_asked_and_computed_tokens_are_counted():
    torch.manual_seed(0)
    scorer = TreeScorer(h3("h3").eval())
    scorer.score([Request([*range(VOCABULARY)] * 2, [a, b]) for a in (1, 2) for b in (3, 4)])
    assert scorer.work.requests == 4
    assert scorer.work.asked == 196  # 4 times 48 + 1
    assert scorer.work.computed == 50  # 48 shared, and the two first answers
    assert scorer.work.run >= scorer.work.computed


def test_bf16_is_no_worse_than_the_plain_path():
    torch.manual_seed(0)
    exact, half = h3("hybrid").eval(), h3("hybrid").eval()
    half.load_state_dict(exact.state_dict())
    half = half.to(torch.bfloat16)
    draw = np.random.default_rng(0)
    document = draw.integers(0, VOCABULARY, 40).tolist()
    many = [Request(document, draw.integers(0, VOCABULARY, 4).tolist()) for _ in range(12)]
    truth = np.array([brute_force(exact, r)[0] for r in many])
    plain = np.array([brute_force(half, r)[0] for r in many])
    tree = np.array([a.log_likelihood for a in TreeScorer(half).score(many)])
    assert abs(tree - truth).mean() <= 2 * abs(plain - truth).mean() + 1e-3


def test_a_long_document_is_read_without_a_mask_and_with_its_keys_in_one_place():
    torch.manual_seed(0)
    model = h3("hybrid").eval()
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 300).tolist()
    request = Request(ids[:1], ids[1:])
    masks, keys, sizes = [], set(), []

    def spy(module, arguments, options):
        mask = options.get("attention_mask")
        masks.append(None if mask is None else mask["full_attention"])
        for layer in options["past_key_values"].layers:
            if hasattr(layer, "room"):
                keys.add(layer.room[0].data_ptr())
        sizes.append(options["input_ids"].shape[1] * (len(ids) - 1) * 4)

    hook = model.register_forward_pre_hook(spy, with_kwargs=True)
    limits = Limits(64, 64, 32, 2**20, 2**13, 1)
    (found,) = TreeScorer(model, limits=limits).score([request])
    hook.remove()
    assert found.log_likelihood == pytest.approx(brute_force(model, request)[0], rel=1e-5)
    own = masks[1:]  # the first call is the probe's
    assert len(own) > 20
    assert own == [None] * len(own)
    assert len(keys) == 1  # of the one attention layer
    # torch makes masks on the CPU: stretches get shorter, so that those stay within the limit
    assert max(sizes[-5:]) <= 2 * 2**13
    assert max(sizes) > 2 * 2**13


def test_every_call_of_the_walk_suits_the_hopper_kernel(monkeypatch):
    """With a GPU's limits no stretch, leaf or state falls to a slower path or many variants."""
    asked = []

    def spy(op_name, device, dtype, backend="auto", problem=None):
        hopper = replace(problem, capability=(9, 0), has_triton=True)
        choice = dispatch.choose(op_name, torch.device("cuda"), torch.bfloat16, backend, hopper)
        asked.append((choice.backend, problem.length))
        return dispatch.choose(op_name, device, dtype, backend, problem)

    def no_steps(*_, **__):
        raise AssertionError("a single step has no chunk kernel")

    torch.manual_seed(0)
    model = H3ForCausalLM(
        H3Config(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            mixers="hybrid",
        )
    ).eval()  # fmt: skip
    gpu = replace(Limits.of(torch.device("cpu")), align=16, call_tokens=4096)
    scorer = TreeScorer(model, limits=gpu)
    monkeypatch.setattr(op, "choose", spy)
    monkeypatch.setattr(flashconv, "h3_step", no_steps)
    draw = np.random.default_rng(0)
    document = draw.integers(0, VOCABULARY, 117).tolist()
    many = []
    for _ in range(12):
        question = [*document, *draw.integers(0, VOCABULARY, draw.integers(5, 40)).tolist()]
        for _ in range(4):
            answer = draw.integers(0, VOCABULARY, draw.integers(1, 30)).tolist()
            many.append(Request(question, answer))
    scorer.score(many)
    assert scorer.work.asked > 3 * scorer.work.computed
    assert {backend for backend, _ in asked} == {"gluon"}
    assert not any(length % 16 for _, length in asked)
    assert len({length for _, length in asked}) <= 6


@pytest.mark.gpu
@pytest.mark.parametrize("mixers", ["h3", "hybrid", "attention"])
def test_on_a_gpu_the_tree_is_brute_force_on_the_cpu(mixers):
    """Through the kernels, with stretches, shared branches and padded leaves of several lengths."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = H3ForCausalLM(
        H3Config(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
            mixers=mixers, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    draw = np.random.default_rng(0)
    document = draw.integers(0, VOCABULARY, 117).tolist()
    many = []
    for _ in range(6):
        question = [*document, *draw.integers(0, VOCABULARY, draw.integers(5, 90)).tolist()]
        for _ in range(3):
            answer = draw.integers(0, VOCABULARY, draw.integers(1, 30)).tolist()
            many.append(Request(question, answer))
    exact = [brute_force(model, r) for r in many]
    scorer = TreeScorer(model.cuda())
    for found, (log_likelihood, greedy) in zip(scorer.score(many), exact, strict=True):
        assert found.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
        assert found.is_greedy == greedy
    assert scorer.work.asked > 3 * scorer.work.computed
    half = model.to(torch.bfloat16)
    truth = np.array([x for x, _ in exact])
    tree = np.array([a.log_likelihood for a in TreeScorer(half).score(many)])
    plain = np.array([brute_force(half.cpu(), r)[0] for r in many])
    assert abs(tree - truth).mean() <= 2 * abs(plain - truth).mean() + 1e-3
