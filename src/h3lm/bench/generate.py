"""`h3lm bench generate`: tokens per second through plain `generate`, against the Transformer.

Four models of one size: the hybrid, pure H3, our Transformer preset, which decodes by the same
loop, and an independent Transformer (`TunedTransformer`) that no code of ours slows down. The
library's GPT-2 through the library's loop is the baseline of the paper.
Source: Fu et al. 2023 (arXiv 2212.14052v3), section 6.2 and table 6.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.generation.streamers import BaseStreamer

from h3lm.bench import measure, report
from h3lm.errors import UserError
from h3lm.flashconv import h3_step_in_place, lagging
from h3lm.layers import H3
from h3lm.layers.step import Stream, add_norm, attend_step, product, product_in_parts
from h3lm.models import H3Config, H3ForCausalLM, decoding, kept
from h3lm.models.cache import DecodingCache, SlotLayer
from h3lm.models.capture import capturing
from h3lm.models.sampling import Chooser

NEW_TOKENS = 128
# rows and prompt length, the most telling first
SHAPES = ((64, 1536), (64, 512), (64, 1024), (1, 512), (16, 8192), (4, 65536))
LIBRARY_SHAPES = ((64, 1536), (64, 1024), (64, 512))  # up to its 2048 positions
FITTING = 8192  # positions of which as many rows as fit are run
LONG = 2**18  # tokens of prompts from which they are read once
CONTEXTS = ((1, 1024), (1, 2**20))  # of pure H3 alone: its step must not care
MODELS: dict[str, dict[str, Any]] = {
    "hybrid": {"mixers": "hybrid"},
    "Transformer": {"mixers": "attention"},
    "pure H3": {"mixers": "h3", "h3_head_dim": 1},
}
INDEPENDENT, LIBRARY = "independent Transformer", "GPT-2 of transformers"
NOTES = (
    "Random weights in bfloat16, SSMs in float32; greedy. tokens/s: {new} tokens for each row "
    "through `model.generate`, between the first token and the last, prompt not included. The "
    "independent Transformer is plain PyTorch: keys of exact length, cuDNN attention, a CUDA "
    "graph, one step at prompt + {half}. Floor: weights and keys and values read once, diagonal "
    "states read and written, shift states read, over the copy bandwidth of this run, "
    "{bandwidth:.2f} TB/s. From {from_rows} rows on diagonal states lag behind where heads have "
    "one channel, and are moved once in {block} steps: such a step may take less than this floor. "
    "Memory of a sequence: what the cache keeps for prompt and new tokens."
)


def run(
    folder: Path,
    say: Callable[[str], None],
    *,
    preset: str = "1.3b",
    minutes: float = 5.0,
    parts: bool = True,
) -> Path:
    """Check, measure, and write a report into a folder after every row.

    Args:
        folder: Where it goes.
        say: Is given a line for each result.
        preset: Size of the models.
        minutes: No new measurement begins after that.
        parts: Whether to time the parts of a step at the first shape, too.

    Raises:
        UserError: without a CUDA device.
        RuntimeError: if our loop is wrong: then nothing is timed.
    """
    if not torch.cuda.is_available():
        raise UserError("bench generate times a GPU, and there is no CUDA device here")
    deadline = time.monotonic() + 60 * minutes
    check(say)
    bandwidth = copy_bandwidth()
    notes = NOTES.format(
        new=NEW_TOKENS, half=NEW_TOKENS // 2, bandwidth=bandwidth / 1e12, block=lagging.BLOCK,
        from_rows=lagging.FROM_ROWS,
    )  # fmt: skip
    models = {name: make_model(preset, **fields) for name, fields in MODELS.items()}
    say(f"models are made; {bandwidth / 1e12:.2f} TB/s")
    rows: list[report.Row] = []
    name = f"generate_{measure.gpu_name()}"
    path = folder / f"{name}.md"
    environment = measure.environment("h3lm bench generate")
    for job in _jobs(models, preset, bandwidth, parts):
        if time.monotonic() > deadline:
            say(f"{minutes} minutes are over: the rest is left out")
            break
        for row in job():
            rows.append(row)
            say("  ".join(f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in row.items()))
        _add_ratios(rows)
        path = report.write(name, folder, environment, notes, rows)
    _plot(folder, name, rows)
    return path


def _jobs(
    models: dict[str, H3ForCausalLM], preset: str, bandwidth: float, parts: bool
) -> Iterator[Callable[[], Iterable[report.Row]]]:
    for rows, prompt in SHAPES:
        for name, model in models.items():
            yield partial(_row, name, model, rows, prompt, bandwidth)
        yield partial(_independent, models["Transformer"].config, rows, prompt, bandwidth)
    yield partial(_steps_by_turns, "pure H3", models["pure H3"], bandwidth)
    for rows, prompt in CONTEXTS:
        yield partial(_row, "pure H3", models["pure H3"], rows, prompt, bandwidth)
    if parts:
        yield partial(_parts, models, bandwidth)
    for rows, prompt in LIBRARY_SHAPES:
        yield partial(_library, preset, rows, prompt)
    for name, model in models.items():
        yield partial(_fitting, name, model, bandwidth)


class Clock(BaseStreamer):
    """Notes when tokens arrive on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time; the first call is the prompt's."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more will come."""

    @property
    def first_s(self) -> float:
        """Time from the prompt to the first new token."""
        return self.times[1] - self.times[0]

    @property
    def step_s(self) -> float:
        """Mean time of a step, from the first new token to the last."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def make_model(preset: str, **fields: Any) -> H3ForCausalLM:
    """A model of random weights, made on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = H3ForCausalLM(H3Config.from_preset(preset, **fields))
    return model.bfloat16().eval()


def timed_generate(model: Any, rows: int, prompt: int, new_tokens: int = NEW_TOKENS) -> Clock:
    """Generate from random prompts, greedily, and never stop early."""
    ids = torch.randint(0, 50000, (rows, prompt), device="cuda")
    clock = Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
        max_new_tokens=new_tokens + 1, eos_token_id=None, streamer=clock,
    )  # fmt: skip
    return clock


def prefill_s(model: H3ForCausalLM, rows: int, prompt: int) -> float:
    """Time of reading prompts, kernels and libraries warm."""
    ids = torch.randint(0, 50000, (rows, prompt), device="cuda")
    cache = decoding.new_cache(model, rows, prompt)
    torch.cuda.synchronize()
    start = time.perf_counter()
    decoding.read_prompt(model, cache, ids)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def floor_bytes(model: H3ForCausalLM, rows: int, context: int) -> int:
    """The least that a step moves through memory at a context."""
    config = model.config
    total = rows * len(config.attention_layers) * 2 * context * config.hidden_size * 2
    ssm = {id(p) for m in model.modules() if isinstance(m, H3) for p in _ssm_parameters(m)}
    weights = {id(p): p for p in model.parameters() if id(p) not in ssm}
    total += sum(p.nbytes for p in weights.values())
    for module in model.modules():
        if isinstance(module, H3):
            total += sum(x.nbytes for x in module.step_operators().tensors())
            diagonal = module.d_model * module.head_dim * module.d_state * 4
            total += rows * (2 * diagonal + module.d_model * module.shift_ssm.d_state * 2)
    return total


def _ssm_parameters(layer: H3) -> list[nn.Parameter]:
    return [*layer.shift_ssm.parameters(), *layer.diagonal_ssm.parameters()]


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    x = torch.randn(2**30, device="cuda").bfloat16()
    y = torch.empty_like(x)
    return 2 * x.nbytes / (measure.median_ms(lambda: y.copy_(x)) / 1e3)


def check(say: Callable[[str], None]) -> None:
    """Our loop under graphs against the library's loop, tokens in float32 and logits in bfloat16.

    Raises:
        RuntimeError: if they differ: a fast wrong loop is not timed.
    """
    for name, fields in MODELS.items():
        sizes: dict[str, Any] = {
            "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2,
            "vocab_size": 512, "tokenizer_vocab_size": None,
        }  # fmt: skip
        if fields["mixers"] == "attention":
            sizes["rotary_dim"] = 128
        torch.manual_seed(0)
        model = H3ForCausalLM(H3Config(**sizes, **fields)).cuda().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "_ssm" not in key:  # larger, so that no two tokens are nearly alike
                    parameter.add_(0.05 * torch.randn_like(parameter))
        ids = torch.randint(0, 512, (lagging.FROM_ROWS + 1, 200), device="cuda")
        options = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        fast = model.generate(ids, attention_mask=mask, **options)
        slow = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
        if not torch.equal(fast, slow.sequences):
            raise RuntimeError(f"{name}: our loop gives other tokens than the library's")
        error = _half_error(model.bfloat16(), ids)
        say(f"{name}: both loops give the same tokens; bfloat16 logits of steps off by {error:.1e}")
        if not error < 5e-2:
            raise RuntimeError(f"{name}: steps in bfloat16 are wrong: nothing is timed")


@torch.no_grad()
def _half_error(model: H3ForCausalLM, ids: Tensor) -> float:
    """Relative difference of logits by steps from those of the whole text at once."""
    start = ids.shape[1] - 20
    whole = model(ids).logits[:, start:].float()
    cache = decoding.new_cache(model, *ids.shape)
    decoding.read_prompt(model, cache, ids[:, :start])
    cache.start_steps(start)
    steps = []
    for t in range(start, ids.shape[1]):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        steps.append(out.logits.float())
        cache.advance()
    return float((torch.cat(steps, 1) - whole).norm() / whole.norm())


def _row(
    name: str, model: H3ForCausalLM, rows: int, prompt: int, bandwidth: float
) -> Iterator[report.Row]:
    _clean()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    clock = timed_generate(model, rows, prompt)
    peak = torch.cuda.max_memory_allocated() - before
    step = clock.step_s
    floor = floor_bytes(model, rows, prompt + NEW_TOKENS // 2) / bandwidth
    _clean()
    # of long prompts the first reading counts, into which a capture of the step went
    prefill = clock.first_s if rows * prompt >= LONG else prefill_s(model, rows, prompt)
    yield {
        "model": name, "batch": rows, "prompt": prompt, "tokens/s": rows / step,
        "step ms": 1e3 * step, "floor ms": 1e3 * floor, "% of floor": 100 * floor / step,
        "prefill ms": 1e3 * prefill,
        "MiB a sequence": decoding.bytes_of_row(model, prompt + NEW_TOKENS, rows) / 2**20,
        "peak GiB": peak / 2**30,
    }  # fmt: skip


@torch.no_grad()
def _steps_by_turns(name: str, model: H3ForCausalLM, bandwidth: float) -> Iterator[report.Row]:
    """The step alone at all of `CONTEXTS`, by turns: clocks fall behind a long prompt."""
    _clean()
    decoders = []
    for rows, prompt in CONTEXTS:
        decoder = filled_decoder(model, rows, prompt + NEW_TOKENS)
        decoder.cache.start_steps(prompt)
        decoder.graph = decoder.record()
        decoders.append(decoder)
    turns = [
        [measure.median_ms(decoder.graph.replay, 15) for decoder in decoders] for _ in range(9)
    ]
    for (rows, prompt), times in zip(CONTEXTS, zip(*turns, strict=True), strict=True):
        step = sorted(times)[len(times) // 2] / 1e3
        floor = floor_bytes(model, rows, prompt) / bandwidth
        yield {
            "model": name + ", the step alone, by turns", "batch": rows, "prompt": prompt,
            "tokens/s": rows / step, "step ms": 1e3 * step, "floor ms": 1e3 * floor,
            "% of floor": 100 * floor / step,
        }  # fmt: skip


@torch.no_grad()
def _fitting(name: str, model: H3ForCausalLM, bandwidth: float) -> Iterator[report.Row]:
    """As many rows of 8K positions as fit beside the weights, and a step of them all."""
    _clean()
    rows = decoding.largest_batch(model, decoding.capacity_for(FITTING - 1))
    decoder = filled_decoder(model, rows, FITTING - 1)
    decoder.graph = decoder.record()
    decoder.cache.start_steps(FITTING - 64)
    step = measure.median_ms(decoder.graph.replay, 9) / 1e3
    floor = floor_bytes(model, rows, FITTING - 64) / bandwidth
    yield {
        "model": name + ", the largest batch that fits", "batch": rows, "prompt": FITTING,
        "tokens/s": rows / step, "step ms": 1e3 * step, "floor ms": 1e3 * floor,
        "% of floor": 100 * floor / step,
        "MiB a sequence": decoding.bytes_of_row(model, FITTING) / 2**20,
        "peak GiB": torch.cuda.memory_allocated() / 2**30,
    }  # fmt: skip


def _library(preset: str, rows: int, prompt: int) -> Iterator[report.Row]:
    """GPT-2 of transformers through its own loop and cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    _clean()
    size = H3Config.from_preset(preset, "attention")
    config = GPT2Config(
        vocab_size=size.vocab_size, n_positions=2048, n_embd=size.hidden_size,
        n_layer=size.num_hidden_layers, n_head=size.num_attention_heads,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPT2LMHeadModel(config).bfloat16().eval()
    step = timed_generate(model, rows, prompt, NEW_TOKENS // 4).step_s
    yield {
        "model": LIBRARY, "batch": rows, "prompt": prompt, "tokens/s": rows / step,
        "step ms": 1e3 * step,
    }  # fmt: skip


def _independent(
    config: H3Config, rows: int, prompt: int, bandwidth: float
) -> Iterator[report.Row]:
    _clean()
    peer = TunedTransformer(config, rows, prompt + NEW_TOKENS // 2)
    step = graph_ms(peer.step) / 1e3
    floor = peer.bytes() / bandwidth
    yield {
        "model": INDEPENDENT, "batch": rows, "prompt": prompt, "tokens/s": rows / step,
        "step ms": 1e3 * step, "floor ms": 1e3 * floor, "% of floor": 100 * floor / step,
    }  # fmt: skip


class TunedTransformer:
    """One decoding step of a Transformer in plain PyTorch, as fast as it goes there.

    Keys and values have exactly the length of the context, which ends with the new position: no
    mask, no slots, no rotation. Products take biases, GELU and the residual sum with them; the
    attention is cuDNN's.

    Args:
        config: Sizes.
        rows: Rows of the batch.
        context: Positions, the new one included.
    """

    def __init__(self, config: H3Config, rows: int, context: int) -> None:
        D, inner = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
        self.heads = config.num_attention_heads

        def weights(*shape: int) -> Tensor:
            return 0.02 * torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        shapes = {"qkv": (3 * D, D), "out": (D, D), "up": (inner, D), "down": (D, inner)}
        self.layers = [
            {
                **{name: weights(*shape) for name, shape in shapes.items()},
                **{f"{name}_bias": weights(shape[0]) for name, shape in shapes.items()},
                "norm1": weights(2, D), "norm2": weights(2, D),
                "kv": weights(2, rows, self.heads, context, D // self.heads),
            }
            for _ in range(config.num_hidden_layers)
        ]  # fmt: skip
        self.norm, self.embedding = weights(2, D), weights(config.vocab_size, D)
        self.token = torch.zeros(rows, dtype=torch.int64, device="cuda")
        self.add_norm = torch.compile(_add_norm, dynamic=False)

    def bytes(self) -> int:
        """What a step has to read."""
        tensors = [self.embedding, *(x for layer in self.layers for x in layer.values())]
        return sum(x.nbytes for x in tensors)

    @torch.no_grad()
    def step(self) -> None:
        """Read the newest token and choose the next."""
        r = self.embedding[self.token]
        pending = torch.zeros_like(r)
        for layer in self.layers:
            r, u = self.add_norm(r, pending, layer["norm1"])
            mixed = F.linear(self._attend(u, layer), layer["out"], layer["out_bias"])
            r, u = self.add_norm(r, mixed, layer["norm2"])
            hidden = torch._addmm_activation(layer["up_bias"], u, layer["up"].T, use_gelu=True)
            pending = F.linear(hidden, layer["down"], layer["down_bias"])
        _, u = self.add_norm(r, pending, self.norm)
        self.token.copy_(F.linear(u, self.embedding).argmax(-1))

    def _attend(self, u: Tensor, layer: dict[str, Tensor]) -> Tensor:
        qkv = F.linear(u, layer["qkv"], layer["qkv_bias"])
        q, k, v = qkv.view(len(u), 3, self.heads, -1).unbind(1)
        keys, values = layer["kv"]
        keys[:, :, -1], values[:, :, -1] = k, v
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q[:, :, None], keys, values).reshape(len(u), -1)


def _add_norm(r: Tensor, x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    r = r + x
    return r, F.layer_norm(r, r.shape[-1:], norm[0], norm[1])


def graph_ms(call: Callable[[], object], launches: int = 1) -> float:
    """Median time of a call under a CUDA graph, divided by what it launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream=stream):
        call()
    return measure.median_ms(graph.replay) / launches


@dataclass(frozen=True)
class _Part:
    """A part of a step, run once for each of its layers.

    Attributes:
        name: Of the part.
        call: Runs it in one layer.
        layers: How many there are; together they exceed the L2 cache.
        bytes: What it has to move in one layer.
    """

    name: str
    call: Callable[[int], object]
    layers: int
    bytes: int


@torch.no_grad()
def _parts(models: dict[str, H3ForCausalLM], bandwidth: float) -> Iterator[report.Row]:
    """Time of each kind of kernel of a step at the first shape, in one layer."""
    rows, prompt = SHAPES[0]
    context = prompt + NEW_TOKENS // 2
    for part in (
        *_core_parts(models["pure H3"], rows, context),
        *_product_parts(models["pure H3"], rows),
        *_attention_parts(models["Transformer"], rows, context),
    ):
        ms = graph_ms(partial(_everywhere, part), part.layers)
        floor = 1e3 * part.bytes / bandwidth
        yield {
            "model": "part of a step: " + part.name, "batch": rows, "prompt": prompt,
            "step ms": ms, "floor ms": floor, "% of floor": 100 * floor / ms,
        }  # fmt: skip


def _everywhere(part: _Part) -> None:
    for i in range(part.layers):
        part.call(i)


def _core_parts(pure: H3ForCausalLM, rows: int, context: int) -> Iterator[_Part]:
    _clean()
    D, d_state = pure.config.hidden_size, pure.config.d_state
    states = _filled(pure, rows, context)
    operators = [layer.operators for layer in states.layers]
    q, k, v = _random(rows, 3 * D).chunk(3, -1)
    total = rows * D * (2 * d_state * 4 + d_state * 2 + 8) + sum(
        x.nbytes for x in operators[0].tensors()
    )

    def core(i: int) -> None:
        h3_step_in_place(q, k, v, operators[i], states.layers[i].ring())
        if i + 1 == len(operators):  # other states move in the next step
            states.ring.move()

    yield _Part("H3 core", core, len(operators), total)


def _attention_parts(transformer: H3ForCausalLM, rows: int, context: int) -> Iterator[_Part]:
    _clean()
    D, heads = transformer.config.hidden_size, transformer.config.num_attention_heads
    slots = _filled(transformer, rows, context)
    layers = transformer.model.layers
    qkv = _random(rows, 3 * D)
    rotation = layers[0].mixer.rotation(slots.lengths[:, None])
    query = qkv[:, :D].view(rows, heads, 1, D // heads)

    def ours(i: int) -> Tensor:
        layer = slots.layers[i]
        return attend_step(qkv, layer.keys, layer.values, slots.lengths, rotation)

    def cudnn(i: int) -> Tensor:
        layer = slots.layers[i]
        known = layer.keys[:, :, :context], layer.values[:, :, :context]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(query, *known)

    total = rows * 2 * context * D * 2
    yield _Part("attention, ours", ours, len(layers), total)
    yield _Part("attention, cuDNN", cudnn, len(layers), total)


def _product_parts(pure: H3ForCausalLM, rows: int) -> Iterator[_Part]:
    D = pure.config.hidden_size
    blocks, count = pure.model.layers, len(pure.model.layers)
    u, r, hidden = _random(rows, D), _random(rows, D), _random(rows, 4 * D)
    mixer, mlp = blocks[0].mixer, blocks[0].mlp

    def behind(i: int) -> Stream:
        """A block but for its core: as `Block.advance` has it."""
        return blocks[i].advance(Stream(r), lambda qkv: u)

    kinds: list[tuple[str, Callable[[int], object], int]] = [
        ("q, k, v product", lambda i: product(blocks[i].mixer.qkv_proj, u), _bytes(mixer.qkv_proj)),
        (
            "output product", lambda i: product_in_parts(blocks[i].mixer.output_proj, u),
            _bytes(mixer.output_proj),
        ),
        (
            "up product with GELU", lambda i: product(blocks[i].mlp.up_proj, u, gelu=True),
            _bytes(mlp.up_proj),
        ),
        (
            "down product", lambda i: product_in_parts(blocks[i].mlp.down_proj, hidden),
            _bytes(mlp.down_proj),
        ),
        ("sum and norm", lambda i: add_norm(Stream(r, u[None]), blocks[i].norm1), 8 * rows * D),
        (
            "block without its core", behind,
            sum(map(_bytes, (mixer.qkv_proj, mixer.output_proj, mlp.up_proj, mlp.down_proj))),
        ),
    ]  # fmt: skip
    for name, call, size in kinds:
        yield _Part(name, call, count, size)
    yield _Part(
        "head and choice", lambda i: product(pure.lm_head, u).argmax(-1), 1, _bytes(pure.lm_head)
    )


def _bytes(linear: Any) -> int:
    return int(linear.weight.nbytes)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _filled(model: H3ForCausalLM, rows: int, context: int) -> DecodingCache:
    """A cache in the middle of decoding, with random keys and values."""
    cache = filled_decoder(model, rows, context).cache
    cache.start_steps(context - 1)
    return cache


def filled_decoder(model: H3ForCausalLM, rows: int, positions: int) -> decoding.Decoder:
    """A decoder whose memory is in its place, with random keys and values."""
    cache = decoding.new_cache(model, rows, positions)
    device = cache.lengths.device
    chooser = Chooser([], False, rows, model.config.vocab_size, device)
    decoder = decoding.Decoder(model, cache, chooser)
    decoder.allocate()
    for layer in cache.layers:
        if isinstance(layer, SlotLayer):
            layer.keys.normal_()
            layer.values.normal_()
    return decoder


def _add_ratios(rows: list[report.Row]) -> None:
    """Speed over that of our Transformer preset and of the independent one, where it is known."""
    for column, peer in (("x Transformer", "Transformer"), ("x independent", INDEPENDENT)):
        speeds = {
            (row["batch"], row["prompt"]): row["tokens/s"]
            for row in rows
            if row["model"] == peer and "tokens/s" in row
        }
        for row in rows:
            base = speeds.get((row["batch"], row["prompt"]))
            if base is not None and "tokens/s" in row:
                row[column] = float(row["tokens/s"]) / float(base)


def _plot(folder: Path, name: str, rows: list[report.Row]) -> None:
    """Speed and memory of a sequence against the prompt's length."""
    shapes = {shape for shape in SHAPES if shape[0] > 1}
    for column, label in (
        ("tokens/s", "tokens/s (batch 64; 16 at 8K, 4 at 64K)"),
        ("MiB a sequence", "MiB of cache for a sequence"),
    ):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if column in row and (row["batch"], row["prompt"]) in shapes:
                point = float(row["prompt"]), float(row[column])
                curves.setdefault(str(row["model"]), []).append(point)
        if curves:
            file = folder / f"{name}_{'speed' if column == 'tokens/s' else 'memory'}.png"
            report.plot_log_log(file, curves, "prompt length", label)


def _clean() -> None:
    kept.forget()
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Run from the command line, `python -m h3lm.bench.generate --out DIR`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--preset", default="1.3b")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--no-parts", dest="parts", action="store_false")
    arguments = parser.parse_args()
    path = run(
        arguments.out, lambda line: print(line, flush=True),  # noqa: T201
        preset=arguments.preset, minutes=arguments.minutes, parts=arguments.parts,
    )  # fmt: skip
    print(path)  # noqa: T201


if __name__ == "__main__":
    main()
