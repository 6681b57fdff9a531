"""What a training run takes of memory, before any of it is allocated, and what follows from it.

Weights, gradients and optimiser are counted. What a block keeps for its backward pass is measured,
on a block of each kind and a few positions: it depends on which kernels run.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from h3lm.errors import UserError
from h3lm.evals.perplexity import windows_at_once
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.models.loss import CHUNK_LOGITS
from h3lm.models.modeling_h3 import H3DecoderLayer, Where
from h3lm.train.graphs import wants_graphs
from h3lm.train.mesh import Mesh
from h3lm.train.processes import world_size
from h3lm.train.recipe import Recipe

BYTES = {"weights": 4, "gradients": 4, "optimizer": 8}  # of a parameter: fp32, AdamW's two moments
GB = 1e9
USABLE = 0.9  # of a GPU's memory; the rest is the driver's, the kernels', and lost between pieces
PROBE = (1024, 2048)  # positions on a GPU
PROBE_CPU = (64, 128)
BLOCK_GRADIENTS = 0.4  # of what a block keeps, at most at once; measured at 512 K positions
LOGIT_BYTES = 12  # of a logit and its gradient, each in bfloat16 and float32


@dataclass(frozen=True)
class Kept:
    """What a block keeps from its forward pass for its backward pass, in bytes.

    Attributes:
        whatever: However long the rows are: its operators, its weights in another dtype.
        of_token: For each position.
    """

    whatever: float
    of_token: float

    def bytes(self, tokens: int) -> float:
        """Of a call."""
        return self.whatever + self.of_token * tokens


@dataclass(frozen=True)
class Estimate:
    """Memory of a process, in bytes.

    Attributes:
        parameters: Parameters of the whole model.
        width: hidden_size.
        vocab: Rows of the embedding.
        kept: What each block keeps.
        tokens: Positions that a process takes through the model at once.
        parts: Among how many processes weights, gradients and optimiser are divided.
        total: What the device has, or None if that is not known.
        accumulated: Whether gradients are there beside all that blocks keep: those of several parts
            of a batch are summed, or DDP holds them in its buckets all along.
        half: Whether under bfloat16 autocast.
        share: Rows that a process takes of each batch; the whole batch if None.
        evaluation: What an evaluation takes beside a step that is captured as a CUDA graph, and so
            keeps its memory; 0 where steps are launched, which is where blocks are recomputed.
    """

    parameters: int
    width: int
    vocab: int
    kept: tuple[Kept, ...]
    tokens: int
    parts: int = 1
    total: int | None = None
    accumulated: bool = True
    half: bool = True
    share: int | None = None
    evaluation: float = 0.0

    @classmethod
    def of(
        cls, config: H3Config, recipe: Recipe, mesh: Mesh, device: torch.device, half: bool
    ) -> "Estimate":
        """The estimate for a model that is not there yet.

        Args:
            config: The model.
            recipe: How it is trained.
            mesh: On which processes.
            device: Where blocks are tried out.
            half: Whether under bfloat16 autocast.
        """
        with torch.device("meta"):
            parameters = H3ForCausalLM(config).num_parameters()
        share = max(1, recipe.batch_size // mesh.readers)
        rows = recipe.micro_batch_size or share
        # keys and values of the other slices of a row
        gathered = (4.0 if half else 8.0) * config.hidden_size * (mesh.seq - 1)
        kept = tuple(
            replace(kept, of_token=kept.of_token + gathered * (mixer == "attention"))
            for mixer, kept in zip(config.mixers, kept_by_blocks(config, device, half), strict=True)
        )
        captured = device.type == "cuda" and world_size() == 1 and wants_graphs(recipe, False)
        sharded = recipe.parallel == "fsdp"
        in_buckets = mesh.shard * mesh.seq > 1 and not sharded
        return cls(
            parameters=parameters,
            width=config.hidden_size,
            vocab=config.vocab_size,
            kept=kept,
            tokens=rows * -(-recipe.block_length // mesh.seq),
            parts=mesh.shard * mesh.seq if sharded else 1,
            total=device_memory(),
            accumulated=rows < share or in_buckets,
            half=half,
            share=share,
            evaluation=_of_evaluation(config, recipe, rows, kept) if captured else 0.0,
        )

    @property
    def held(self) -> float:
        """Weights, gradients and optimiser, which are there all along."""
        return sum(BYTES.values()) * self._own

    def activations(self, recomputed: int, gathered: bool = False) -> float:
        """What comes on top of all that is held, at the worst moment of a step."""
        beside = self._beside(self._count(recomputed))
        return self.needs(recomputed, gathered) - self.held - beside

    def needs(self, recomputed: int, gathered: bool = False) -> float:
        """All together at the worst moment of a step.

        Args:
            recomputed: How many blocks are recomputed in the backward pass, the first ones; True
                for all.
            gathered: Whether a sharded model's blocks stay whole until then.

        That is when the loss is taken, when the backward pass begins, when it comes to the blocks
        that are recomputed, or when it ends: what blocks keep goes as gradients come, unless
        earlier parts of the batch have left some. A recomputed block keeps its input, and while the
        forward pass runs, autocast a copy of its weights.
        """
        count = self._count(recomputed)
        blocks = [kept.bytes(self.tokens) for kept in self.kept]
        one, part = max(blocks), count / len(blocks)
        inputs = count * 4.0 * self.width * self.tokens
        copies = 2.0 * self.parameters if self.half and self.parts == 1 else 0.0
        kept = inputs + sum(blocks[count:])
        again = (1 + BLOCK_GRADIENTS) * one
        begins = kept + (again if part == 1 else BLOCK_GRADIENTS * one)
        loss = kept + part * copies + self._head()
        gradients = 0 if self.accumulated else BYTES["gradients"] * self._own
        early = self.held - gradients
        turns = self.held - part * gradients + inputs + again if part else 0.0
        ends = self.held + again
        worst = max(early + begins, early + loss, turns, ends) + self._gathered(gathered)
        return worst + self._beside(count)

    def _beside(self, recomputed: int) -> float:
        return 0.0 if recomputed else self.evaluation

    def _count(self, recomputed: int) -> int:
        return len(self.kept) if recomputed is True else int(recomputed)

    def _head(self) -> float:
        """The loss: its part of the logits, the head in bfloat16, a new gradient of the head."""
        logits = min(self.tokens * self.vocab, CHUNK_LOGITS)
        return LOGIT_BYTES * logits + 8.0 * self.vocab * self.width + 8.0 * self.width * self.tokens

    @property
    def _own(self) -> float:
        return self.parameters / self.parts

    def _gathered(self, all_blocks: bool) -> float:
        """What a sharded model gathers: the root with its gradient, and two blocks at a time."""
        if self.parts == 1:
            return 0.0
        root = self.vocab * self.width
        blocks = self.parameters - root
        kept = (2.0 if self.half else 4.0) * blocks if all_blocks else 0.0
        return 8.0 * root + 12.0 * blocks / len(self.kept) + kept

    def choose(self, wanted: bool | None) -> tuple[int, str]:
        """How many blocks to recompute in the backward pass, the first ones, and why.

        The first ones, since they come last there, when what the others kept is gone.

        Args:
            wanted: Whether to recompute all, as the recipe says; None if it leaves it open.
        """
        blocks = len(self.kept)
        if wanted is not None:
            return blocks * wanted, "the recipe says so"
        if self.total is None:
            return 0, "the memory of this device is not known"
        room = USABLE * self.total
        if self.needs(0) <= room:
            return 0, f"they fit {room / GB:.1f}, {USABLE:.0%} of the device's"
        fewest = next((n for n in range(1, blocks) if self.needs(n) <= room), blocks)
        return fewest, f"without that it would take {self.needs(0) / GB:.1f} of {room / GB:.1f}"

    def keeps_gathered(self, recomputed: int) -> bool:
        """Whether a sharded model's blocks may stay whole from forward to backward pass."""
        if self.parts == 1 or self.total is None:
            return False
        return self.needs(recomputed, gathered=True) <= USABLE * self.total

    def check(self, recipe: Recipe) -> None:
        """Refuse what cannot fit even with recomputation.

        Raises:
            UserError: with the nearest setting that fits.
        """
        recomputed = recipe.gradient_checkpointing is not False
        if self.total is None or self.needs(recomputed) < self.total:
            return
        raise UserError(
            f"the model cannot fit: {self.words(recomputed)}. {self._remedy(recipe, recomputed)}"
        )

    def _remedy(self, recipe: Recipe, recomputed: bool) -> str:
        """The nearest setting that fits: what changes least comes first."""
        assert self.total is not None
        if not recomputed:
            if self.evaluation and replace(self, evaluation=0.0).needs(False) < self.total:
                return "graphs=false fits"
            if self.needs(True) < self.total:
                return "gradient_checkpointing=true fits"
        share = self.share or recipe.batch_size
        rows, length = recipe.micro_batch_size or share, recipe.block_length
        fewer = [n for n in range(rows, 0, -1) if n == rows or share % n == 0]
        lengths = [length >> n for n in range(length.bit_length())]
        for shorter, parts, few in product(lengths, (self.parts << n for n in range(12)), fewer):
            smaller = replace(
                self, parts=parts, accumulated=self.accumulated or few < rows,
                tokens=-(-self.tokens * few * shorter // (rows * length)),
            )  # fmt: skip
            if smaller.needs(True) >= self.total:
                continue
            changes = {
                f"parallel=fsdp on {parts} processes of one copy": parts > self.parts,
                f"block_length={shorter} (or rows shared by mesh.seq)": shorter < length,
                f"micro_batch_size={few}": few < rows,
                "gradient_checkpointing=true": not recomputed,
            }
            return " with ".join(words for words, change in changes.items() if change) + " fits"
        return "no setting does: the model is too large for so little memory"

    def words(self, recomputed: int, gathered: bool = False) -> str:
        """The estimate for people; arguments as of `needs`."""
        shares = {name: size * self._own for name, size in BYTES.items()}
        shares["activations"] = self.activations(recomputed, gathered)
        if beside := self._beside(self._count(recomputed)):
            shares["evaluation"] = beside  # the graph of a step keeps its memory meanwhile
        words = "GB of a process: " + ", ".join(f"{n} {b / GB:.2f}" for n, b in shares.items())
        if self.total is None:
            return words
        free = (self.total - self.needs(recomputed, gathered)) / GB
        rest = f"leaves {free:.2f} free" if free > 0 else f"lacks {-free:.2f}"
        return f"{words}; of {self.total / GB:.2f} that {rest}"


def _of_evaluation(config: H3Config, recipe: Recipe, rows: int, kept: tuple[Kept, ...]) -> float:
    """Logits of an evaluation, three times in float32, and what passes through a block, in bytes.

    Nothing is kept there for a backward pass: a block has less than what it would keep.
    """
    if recipe.eval_every is None:
        return 0.0
    stride = recipe.eval_stride or recipe.block_length
    windows = windows_at_once(rows, stride, config.vocab_size)
    tokens = windows * recipe.block_length
    return 12.0 * windows * stride * config.vocab_size + max(block.bytes(tokens) for block in kept)


def keep_activations(model: H3ForCausalLM, first: int) -> None:
    """Have blocks keep what they need for their backward pass, from one on.

    Args:
        model: A model that the library has told to recompute all its blocks.
        first: The number of the first that does not.
    """
    for layer in model.model.layers[first:]:
        layer.gradient_checkpointing = False


def kept_by_blocks(config: H3Config, device: torch.device, half: bool) -> tuple[Kept, ...]:
    """What each block of a model keeps for its backward pass.

    One block of each kind is made and called at two lengths.
    """
    kinds = [(name, config.inner_width(i)) for i, name in enumerate(config.mixers)]
    found: dict[Any, Kept] = {}
    short, long = PROBE if device.type == "cuda" else PROBE_CPU
    for i, kind in enumerate(kinds):
        if kind not in found:
            with torch.device(device), torch.random.fork_rng(_devices(device)):
                block = H3DecoderLayer(config, i).train()
            a, b = (_saved_bytes(block, length, device, half) for length in (short, long))
            slope = (b - a) / (long - short)
            found[kind] = Kept(max(0.0, a - slope * short), slope)
    return tuple(found[kind] for kind in kinds)


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _saved_bytes(block: H3DecoderLayer, length: int, device: torch.device, half: bool) -> int:
    """Bytes that autograd saves in a call of a block, its parameters aside."""
    saved: list[weakref.ref[Tensor]] = []

    def note(x: Tensor) -> Tensor:
        saved.append(weakref.ref(x))
        return x

    rotation = None
    if hasattr(block.mixer, "rotation"):
        rotation = block.mixer.rotation(torch.arange(length, device=device)[None])
    r = torch.zeros(1, length, block.norm1.normalized_shape[0], device=device, requires_grad=True)
    with (
        torch.random.fork_rng(_devices(device)),
        torch.autocast(device.type, torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
    ):
        y = block(r, Where(None, None, None, rotation))
    # what belongs to outputs that nobody wanted is gone by now
    stored = [x.untyped_storage() for ref in saved if (x := ref()) is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in stored}
    for parameter in block.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del y  # which has kept them
    return sum(sizes.values())


@contextmanager
def short_of_memory(recipe: Recipe, rows: int) -> Iterator[None]:
    """Say in one line what to do when a run has no memory left; nothing that was saved is lost.

    Args:
        recipe: The run.
        rows: Blocks that a process takes through the model at once.

    Raises:
        UserError: naming keys that may change in the same run.
    """
    try:
        yield
    except RuntimeError as error:
        on_cpu = "can't allocate memory" in str(error)
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        fewer = next((n for n in range(rows // 2, 0, -1) if rows % n == 0), None)
        ways = [] if fewer is None else [f"micro_batch_size={fewer}"]
        ways += [] if recipe.gradient_checkpointing else ["gradient_checkpointing=true"]
        ways += [] if recipe.parallel == "fsdp" else ["parallel=fsdp on several GPUs"]
        # a captured step keeps its memory while others run, such as an evaluation
        recomputes = recipe.graphs is None and recipe.gradient_checkpointing
        launched = on_cpu or recipe.graphs is False or recomputes
        ways += [] if launched else ["graphs=false"]
        remedy = " or ".join(ways) or "a shorter block_length in another output_dir"
        where = "the machine" if on_cpu else "the GPU"
        raise UserError(
            f"{where} has no memory left for {rows} x {recipe.block_length} tokens at once: "
            f"take {remedy}; checkpoints are kept, and the run goes on from the newest"
        ) from error


def device_memory() -> int | None:
    """Bytes of this process's GPU, or None without one."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
