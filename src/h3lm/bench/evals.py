"""How fast the prefix tree is against the harness's own path, and what a long document costs.

    python -m h3lm.bench.evals --data-dir DIR --gpt2 DIR --output DIR

Run on an otherwise idle GPU. Nothing is timed unless answers agree first.
"""

import argparse
import gc
import json
import logging
import lzma
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.profiler import ProfilerActivity, profile

from h3lm.bench.measure import environment
from h3lm.bench.report import Row, write
from h3lm.data.tokenizers import gpt2_tokenizer
from h3lm.errors import UserError
from h3lm.evals.harness import load_tasks, quiet
from h3lm.evals.prefix_tree import Request
from h3lm.evals.scorer import Limits, TreeScorer
from h3lm.evals.tree_lm import TreeLM
from h3lm.layers import H3
from h3lm.models import H3Config, H3ForCausalLM

SUPERGLUE = ("boolq", "cb", "copa", "multirc", "sglue_rte", "wic", "wsc")  # those with data
PRESETS = {"hybrid": "hybrid", "Transformer": "attention"}
LONG_PRESETS = {"H3": "h3", **PRESETS}
PLAIN_BATCHES = (32, 128, 512)
MOST_KERNELS = 16
KERNEL_NOTES = "Kernels that the tree spends most of the GPU's time in."
SAMPLE = 384  # requests that the plain path's batch size is chosen on
GATE_NATS = 1e-4  # float32 without tensor cores, against the plain path
GATE_REQUESTS = 40  # of each set
NOTES = """Random weights: the time does not depend on them. Time is that of answering the requests
of a set, tokenising included; building prompts and metrics is the same for both and is not in it.
`plain` is lm-eval's own `hf` model at the best of the batch sizes tried, on the same requests;
before it is timed it has run an eighth of them. `tree` is the second of two runs; what the first
compiled once and for all is under `first`, what a run compiles anew under `compiled`.
`asked` and `computed` are input tokens of the requests and of the tree, `run` with padding.
Of the tree's time, tokenising, building the tree and waiting for the GPU are given; the rest is
the host launching kernels. `kernels s`, where it is there, is the GPU's own time, in a third run
under a profiler."""


@dataclass(frozen=True)
class Set:
    """A set of tasks that is measured as one.

    Attributes:
        name: As in the table.
        tasks: The harness's names.
        shots: Few-shot examples, the same for all documents.
        limits: First documents of each task; all where it is not named.
    """

    name: str
    tasks: tuple[str, ...]
    shots: int
    limits: dict[str, int]


SETS = (
    Set("MultiRC, zero-shot", ("multirc",), 0, {}),
    Set("HellaSwag, fixed 3-shot", ("hellaswag",), 3, {"hellaswag": 2000}),
    Set("seven SuperGLUE sets, zero-shot", SUPERGLUE, 0, {}),
)


def main() -> None:
    """Check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="evaluation sets")
    parser.add_argument("--gpt2", type=Path, required=True, help="files of GPT-2's tokenizer")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--device", default="cuda", help="cpu only to try the script out")
    parser.add_argument("--size", default="125m")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the limits of sets")
    parser.add_argument("--prompts", type=Path, help="file that keeps the requests of the sets")
    parser.add_argument("--models", nargs="*", default=[*PRESETS], choices=PRESETS)
    parser.add_argument(
        "--long", type=int, default=2**18, help="tokens of the long document, 0 for none"
    )
    parser.add_argument("--state-cost", type=int, help="see h3lm.evals.PrefixTree")
    parser.add_argument("--profile", action="store_true", help="time kernels too, in a third run")
    parser.add_argument("--seconds", type=float, default=240, help="start nothing new after this")
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        _run(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


def _run(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    torch.set_grad_enabled(False)
    # the gate below is of float32, not of the ten bits of TF32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(arguments.device)
    tokenizer = gpt2_tokenizer(arguments.gpt2)

    def make(mixers: str, dtype: torch.dtype) -> H3ForCausalLM:
        torch.manual_seed(0)
        config = H3Config.from_preset(arguments.size, mixers=mixers)
        return H3ForCausalLM(config).to(device, dtype).eval()

    instances = _kept_instances(arguments.prompts, arguments.data_dir, arguments.scale)
    sample = [x for every in instances.values() for x in _stretch(every)]
    _say(f"prompts built after {time.monotonic() - began:.0f} s")
    where = environment(" ".join(sys.argv)) if device.type == "cuda" else {"device": "cpu"}
    agreed: list[str] = []
    races: list[Row] = []
    kernels: list[Row] = []
    for name in arguments.models:
        if time.monotonic() - began > arguments.seconds:
            _say(f"no time left for {name}")
            continue
        agreed.append(_check(name, make, PRESETS[name], tokenizer, sample))
        _say(f"answers agree after {time.monotonic() - began:.0f} s")
        notes = f"{NOTES}\n\nBefore anything was timed: {'; '.join(agreed)}."
        model = make(PRESETS[name], torch.bfloat16)
        for s in SETS:
            if time.monotonic() - began > arguments.seconds:
                _say(f"no time left for {name} on {s.name}")
                continue
            title, requests = f"{name}, {s.name}", instances[s.name]
            tree, row = _race(title, model, tokenizer, requests, arguments.state_cost)
            races.append(row)
            if arguments.profile:
                kernels += _kernels(title, tree, requests, row)
                write("prefix_tree_kernels", arguments.output, where, KERNEL_NOTES, kernels)
            _say(f"{row} after {time.monotonic() - began:.0f} s")
            # as they come: a kill loses nothing
            write("prefix_tree", arguments.output, where, notes, races)
        del model
        _forget()
    long: list[Row] = []
    about_long = f"One document of {arguments.long:,} tokens, all of them scored, in bfloat16."
    for name, mixers in LONG_PRESETS.items() if arguments.long else ():
        model = make(mixers, torch.bfloat16)
        long.append(_long_document(name, model, arguments.long))
        _say(long[-1])
        write("long_document", arguments.output, where, about_long, long)
        del model
        _forget()
    for path in sorted(arguments.output.glob("*.md")):
        _say(path.read_text())


def _kept_instances(path: Path | None, data_dir: Path, scale: float) -> dict[str, list[Any]]:
    """`_every_instance`, from a file where it is there; else it is written."""
    if path is None:
        return _every_instance(data_dir, scale)
    if not path.exists():
        every = {
            name: [x.args for x in some] for name, some in _every_instance(data_dir, scale).items()
        }
        with lzma.open(path, "wt", encoding="utf-8", preset=1) as file:
            json.dump(every, file)
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return {
            name: [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]
            for name, pairs in json.load(file).items()
        }


def _every_instance(data_dir: Path, scale: float) -> dict[str, list[Any]]:
    """The harness's requests of each set; what two sets share is built once."""
    built: dict[tuple[str, int, int | None], list[Any]] = {}
    every: dict[str, list[Any]] = {}
    for s in SETS:
        keys = [(name, s.shots, s.limits.get(name)) for name in s.tasks]
        for key in keys:
            if key not in built:
                built[key] = _instances(*key, data_dir, scale)
        every[s.name] = [x for key in keys for x in built[key]]
    return every


def _instances(name: str, shots: int, limit: int | None, data_dir: Path, scale: float) -> list[Any]:
    """The harness's requests of a task."""
    loaded = load_tasks([name], data_dir=data_dir, num_fewshot=shots, fixed_fewshot=bool(shots))
    task = loaded.tasks[name]
    with quiet():
        task.build_all_requests(limit=max(1, int((limit or len(task.task_docs)) * scale)))
    return list(task.instances)


def _stretch(every: list[Any]) -> list[Any]:
    """Requests beside each other, which share prefixes, from the middle of a set."""
    first = max(0, len(every) // 2 - GATE_REQUESTS)
    return every[first : first + GATE_REQUESTS]


def _check(
    name: str, make: Callable[..., H3ForCausalLM], mixers: str, tokenizer: Any, sample: list[Any]
) -> str:
    """Compare the paths; the tree may be twice as wrong in bfloat16 as the plain path.

    In float32 they are compared in plain PyTorch, so that the tree is held to what it must be
    without waiting for kernels that nothing times; in bfloat16 by the kernels that are timed.
    """
    model = make(mixers, torch.float32)
    for module in model.modules():
        if isinstance(module, H3):
            module.backend = "torch"
    exact = _answer(TreeLM(model, tokenizer), sample)
    plain = _answer(_plain(model, tokenizer, 16), sample)
    apart = _farthest(exact, plain)
    flags = sum(a[1] != b[1] for a, b in zip(exact, plain, strict=True))
    if apart > GATE_NATS or flags:
        raise UserError(f"{name}: tree and plain path are {apart} nats and {flags} flags apart")
    del model
    _forget()
    half = make(mixers, torch.bfloat16)
    wrong = [
        _mean_error(_answer(lm, sample), exact)
        for lm in (TreeLM(half, tokenizer), _plain(half, tokenizer, 16))
    ]
    if wrong[0] > 2 * wrong[1]:
        raise UserError(f"{name}: in bfloat16 the tree is off by {wrong[0]}, plain by {wrong[1]}")
    said = (
        f"{name}: {len(sample)} requests at most {apart:.1e} nats apart in plain PyTorch and "
        f"float32, greedy flags the same; by the kernels in bfloat16 the tree is off by "
        f"{wrong[0]:.1e} on average, the plain path by {wrong[1]:.1e}"
    )
    _say(said)
    return said


def _race(
    name: str, model: H3ForCausalLM, tokenizer: Any, requests: list[Any], state_cost: int | None
) -> tuple[TreeLM, Row]:
    """Time of both paths on the same requests, and the tree.

    The tree runs twice: the first time shapes are new to kernels that are compiled for them and
    to the libraries' choices, as the plain path's are while its batch size is tried.
    """
    _forget()
    limits = Limits.of(model.device)  # once: later, less is free
    part = requests[:: max(1, len(requests) // SAMPLE)]
    speeds = {}
    for batch in PLAIN_BATCHES:
        lm = _plain(model, tokenizer, batch)
        _answer(lm, part[:batch])
        try:
            speeds[batch], _ = _timed(lm, part)
        except torch.OutOfMemoryError:
            _forget()
    best = min(speeds, key=lambda batch: speeds[batch])
    plain = _plain(model, tokenizer, best)
    _answer(plain, requests[::8])
    plain_s, plain_gb = _timed(plain, requests)
    _forget()

    def make() -> TreeLM:
        return TreeLM(model, tokenizer, limits=limits, state_cost_tokens=state_cost)

    with _compilations() as once:
        first_s, _ = _timed(make(), requests)
    tree = make()
    with _compilations() as anew:
        tree_s, tree_gb = _timed(tree, requests)
    work = tree.scorer.work
    return tree, {
        "model and set": name,
        "requests": len(requests),
        "plain s": plain_s,
        "plain batch": best,
        "tree s": tree_s,
        "times faster": plain_s / tree_s,
        "first s": first_s,
        "first compiled": len(once),
        "first compiling s": sum(once),
        "compiled": len(anew),
        "asked": work.asked,
        "computed": work.computed,
        "asked / computed": work.asked / work.computed,
        "run": work.run,
        "calls": work.calls,
        "tokenising s": tree_s - work.seconds,
        "building s": work.building,
        "launching s": work.seconds - work.building - work.waiting,
        "waiting s": work.waiting,
        "plain peak GB": plain_gb,
        "tree peak GB": tree_gb,
    }


def _kernels(name: str, tree: TreeLM, requests: list[Any], race: Row) -> list[Row]:
    """The kernels that the GPU spends most time in; their sum goes into the row of the race."""
    if not torch.cuda.is_available():
        return [{"model and set": name}]
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        _answer(tree, requests)
        _synchronise()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    race["kernels s"] = sum(event.self_device_time_total for event in events) / 1e6
    race["launched"] = sum(event.count for event in events)
    return [
        {
            "model and set": name,
            "kernel": event.key[:80].replace("|", " "),
            "count": event.count,
            "ms": event.self_device_time_total / 1e3,
        }
        for event in events[:MOST_KERNELS]
    ]


@contextmanager
def _compilations() -> Iterator[list[float]]:
    """Seconds of each kernel that Triton makes meanwhile, or takes from its cache on disk."""
    seconds: list[float] = []
    if not torch.cuda.is_available():
        yield seconds
        return
    from triton import knobs

    def heard(*, times: Any, **_: Any) -> None:
        seconds.append(times.total / 1e6)

    with knobs.compilation.scope():
        knobs.compilation.listener = heard
        yield seconds


def _long_document(name: str, model: H3ForCausalLM, length: int) -> Row:
    """Score every token of one document."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50257, (length + 1,), generator=draw).tolist()
    scorer = TreeScorer(model)
    scorer.score([Request(ids[:1], ids[1:8192])])
    _synchronise()
    _reset_peak()
    began = time.perf_counter()
    (answer,) = scorer.score([Request(ids[:1], ids[1:])])
    _synchronise()
    return {
        "model": name,
        "tokens": length,
        "s": time.perf_counter() - began,
        "peak GB": _peak_gb(),
        "nats per token": -answer.log_likelihood / length,
    }


def _plain(model: H3ForCausalLM, tokenizer: Any, batch: int) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)


def _answer(lm: HFLM, requests: list[Any]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests, disable_tqdm=True)


def _timed(lm: HFLM, requests: list[Any]) -> tuple[float, float]:
    """Seconds, and peak memory in GB, the model's weights included."""
    gc.collect()
    _synchronise()
    _reset_peak()
    began = time.perf_counter()
    _answer(lm, requests)
    _synchronise()
    return time.perf_counter() - began, _peak_gb()


def _farthest(a: list[tuple[float, bool]], b: list[tuple[float, bool]]) -> float:
    return max(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True))


def _mean_error(a: list[tuple[float, bool]], b: list[tuple[float, bool]]) -> float:
    return sum(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True)) / len(a)


def _say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


if __name__ == "__main__":
    main()
