"""`h3lm bench generate --cpu`: what a token costs on this processor, as the context grows.

Models of the demo's size. A step of pure H3 looks at states of constant size, so its time must not
depend on what was read; attention looks at every key. Contexts take turns, step by step, so that
whatever else the machine does slows all of them alike, and medians are compared.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from h3lm.bench import measure, report
from h3lm.bench.generate import filled_decoder
from h3lm.models import H3Config, H3ForCausalLM, decoding
from h3lm.models.sampling import Chooser
from h3lm.train.recipe import load_recipe

CONTEXTS = (100, 1000, 10_000, 100_000)
STEPS = 200  # of each context
VOCABULARY = 72  # the demo's characters, rounded up
MODELS: dict[str, dict[str, Any]] = {
    "pure H3": {"mixers": "h3"},
    "hybrid": {"mixers": "hybrid"},
    "Transformer": {"mixers": "attention"},
}
NOTES = (
    "Models of `h3lm train demo` with random weights in float32, one row, greedy. ms: median of "
    "{steps} steps at each context, taken in turns (a step at each context, then the next), the "
    "choice of the token and reading it included; CPU ms: the median of what the process got of "
    "the processors, which its neighbours change less. Pure H3 has read a prompt of that length; "
    "of models with attention the keys and values are random numbers, which cost the same to look "
    "at. The last rows are pure H3 by `model.generate`, prompts in turns, medians of the time "
    "between two tokens."
)


def run(
    folder: Path,
    say: Callable[[str], None],
    *,
    contexts: tuple[int, ...] = CONTEXTS,
    steps: int = STEPS,
) -> Path:
    """Measure and write a report and a picture into a folder.

    Args:
        folder: Where it goes.
        say: Is given a line for each result.
        contexts: Tokens before the step.
        steps: Steps of each context.

    Returns:
        The report's path.
    """
    rows: list[report.Row] = []
    for name, fields in MODELS.items():
        model = demo_model(**fields)
        of_all = step_times(model, contexts, steps)
        for context, times in of_all.items():
            size = decoding.bytes_of_row(model, context)
            rows.append(_row(name, context, times, of_all) | {"KiB of cache": size / 2**10})
            say(_line(rows[-1]))
    model = demo_model(**MODELS["pure H3"])
    between = through_generate(model, (contexts[0], contexts[-1]), tokens=max(2, steps // 8))
    rows += [
        _row("pure H3, generate", context, times, between) for context, times in between.items()
    ]
    for row in rows[-len(between) :]:
        say(_line(row))
    environment = measure.environment("h3lm bench generate --cpu", cpu=True)
    path = report.write("generate_cpu", folder, environment, NOTES.format(steps=steps), rows)
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = float(row["context"]), float(row["CPU ms"])
        curves.setdefault(str(row["model"]), []).append(point)
    report.plot_log_log(folder / "generate_cpu.png", curves, "tokens before", "CPU ms for a token")
    return path


def demo_model(**fields: Any) -> H3ForCausalLM:
    """A model of the demo's sizes with random weights."""
    recipe = load_recipe("demo")
    torch.manual_seed(0)
    sizes = {**recipe.model, **fields}
    if sizes["mixers"] != "hybrid":
        sizes.pop("attention_layers", None)
    return H3ForCausalLM(H3Config(vocab_size=VOCABULARY, **sizes)).eval()


def ready(model: H3ForCausalLM, context: int, room: int) -> decoding.Decoder:
    """A decoder of one row that has seen `context` tokens and has room for more."""
    if "attention" in model.config.mixers:
        decoder = filled_decoder(model, 1, context + room)
        decoder.cache.start_steps(context)
        return decoder
    cache = decoding.new_cache(model, 1, context + room)
    chooser = Chooser([], False, 1, model.config.vocab_size, cache.lengths.device)
    decoder = decoding.Decoder(model, cache, chooser)
    decoding.prefill(model, cache, decoder, torch.randint(0, VOCABULARY, (1, context)))
    return decoder


class Times(NamedTuple):
    """Medians of a step in seconds: on the wall's clock, and of the processors."""

    wall: float
    cpu: float


@torch.no_grad()
def step_times(model: H3ForCausalLM, contexts: tuple[int, ...], steps: int) -> dict[int, Times]:
    """Median times of a step behind each context."""
    warm_up = max(3, steps // 10)
    decoders = {context: ready(model, context, steps + warm_up) for context in contexts}
    clocks: dict[int, list[tuple[float, float]]] = {context: [] for context in contexts}
    for i in range(warm_up + steps):
        for context, decoder in decoders.items():
            start = _now()
            decoder.step()
            decoder.token.tolist()
            if i >= warm_up:
                clocks[context].append(_since(start))
    return {context: _medians(x) for context, x in clocks.items()}


@torch.no_grad()
def through_generate(
    model: H3ForCausalLM, contexts: tuple[int, ...], tokens: int, turns: int = 9
) -> dict[int, Times]:
    """Median times between two tokens of `model.generate`, prompts of each length in turns."""
    clocks: dict[int, list[tuple[float, float]]] = {context: [] for context in contexts}
    for _ in range(turns):
        for context in contexts:
            ids, clock = torch.randint(0, VOCABULARY, (1, context)), _Clock()
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                max_new_tokens=tokens + 1, eos_token_id=None, streamer=clock,
            )  # fmt: skip
            # first the prompt comes, then the token behind it
            clocks[context] += clock.gaps[2:]
    return {context: _medians(x) for context, x in clocks.items()}


class _Clock(BaseStreamer):
    """Notes the time since whatever came before."""

    def __init__(self) -> None:
        self.gaps: list[tuple[float, float]] = []
        self.last = _now()

    def put(self, value: Tensor) -> None:
        self.gaps.append(_since(self.last))
        self.last = _now()

    def end(self) -> None:
        pass


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _now()
    return wall - start[0], cpu - start[1]


def _medians(clocks: list[tuple[float, float]]) -> Times:
    return Times(*map(statistics.median, zip(*clocks, strict=True)))


def _row(name: str, context: int, times: Times, of_all: dict[int, Times]) -> report.Row:
    first = of_all[min(of_all)]
    return {
        "model": name, "context": float(context), "ms": 1e3 * times.wall,
        "x shortest": times.wall / first.wall, "CPU ms": 1e3 * times.cpu,
        "CPU x shortest": times.cpu / first.cpu,
    }  # fmt: skip


def _line(row: report.Row) -> str:
    return "  ".join(f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in row.items())
