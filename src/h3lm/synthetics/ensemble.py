"""Many small models trained side by side: one program, an axis of models, a rate for each.

The models of an ensemble share their shape and differ in seed, data and learning rate. Their
parameters are rows of one matrix, so that the optimiser is a handful of elementwise operations,
and on a GPU the whole training step is captured once and replayed.

A training is the same in every run on a device, whatever trains beside it: each ensemble has a
stream and a source of random numbers of its own. Only answers at chosen positions, as in MQAR,
sum their gradient on a GPU in an order that varies.
"""

import copy
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from h3lm.layers import Block, CausalAttention
from h3lm.models.capture import capturing
from h3lm.models.configuration_h3 import H3Config
from h3lm.models.modeling_h3 import H3ForCausalLM
from h3lm.ssm import SSMModule
from h3lm.synthetics.fused_step import fuse
from h3lm.synthetics.short_rows import attend, shorten
from h3lm.synthetics.tasks import IGNORED, Dataset, Split

Schedule = Literal["cosine", "linear"]
_SMALL_VOCABULARY = 64
_AT_ONCE = 12  # steps of a CUDA graph: 13 graphs and a single step are one of the paper's epochs
_FEW = 8  # models: fewer would take hardly less time on a GPU

# Of threads that train ensembles side by side, one at a time makes models, operates eagerly or
# writes files: the generator of new models and much of what they are made with is common to all
TURN = threading.RLock()


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        epochs: Passes over the training rows.
        schedule: "cosine": warm-up from 1e-6, then half a cosine to a tenth of the peak, counted
            from step 0; "linear": warm-up from 0, then straight to 0.
        learning_rate: Peak rate.
        batch_size: Rows of a step; the last one of an epoch may have fewer.
        warmup: Share of the steps that warm up.
        weight_decay: Of everything but what a state space model exempts.
        stop_at: Test accuracy at which a model's rate begins to fall to 0, over a tenth of its
            steps, after which it stops; None to train to the end. Stopping at once would leave
            models that solve the task at its own length, but other lengths much worse.
    """

    epochs: int = 200
    schedule: Schedule = "linear"
    learning_rate: float = 5e-4
    batch_size: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.1
    stop_at: float | None = 1.0

    def rates(self, steps: int, peak: float) -> np.ndarray:
        """Learning rate of each step."""
        t, warm = np.arange(steps, dtype=np.float64), max(1, round(self.warmup * steps))
        if self.schedule == "cosine":
            floor = 0.1 * peak
            decay = floor + 0.5 * (peak - floor) * (1 + np.cos(math.pi * t / steps))
            return np.where(t < warm, 1e-6 + t * (peak - 1e-6) / warm, decay)
        return peak * np.minimum(t / warm, (steps - t) / (steps - warm))


@dataclass
class Member:
    """One model of an ensemble and what became of it.

    Attributes:
        seed: Of its data, its start and its dropout.
        recipe: How it is trained.
        data: Its rows.
        curve: Step, mean training loss since the last entry and test accuracy, at each look.
        steps: Steps taken.
        finished: Whether it took all steps that it was to take.
        model: The trained model, at the end.
        test_loss: Mean loss of the answers, at the end.
    """

    seed: int
    recipe: Recipe
    data: Dataset
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    steps: int = 0
    finished: bool = False
    model: H3ForCausalLM | None = None
    test_loss: float = math.nan

    @property
    def last(self) -> float:
        """Test accuracy at the end."""
        return self.curve[-1][2] if self.curve else math.nan

    @property
    def best(self) -> float:
        """Best test accuracy at any look; the test rows chose it."""
        return max((accuracy for _, _, accuracy in self.curve), default=math.nan)

    @property
    def solved(self) -> bool:
        """Whether it reached the accuracy at which it stops early."""
        return self.recipe.stop_at is not None and self.best >= self.recipe.stop_at


@dataclass(frozen=True)
class Look:
    """Where a training stands.

    Attributes:
        step: Steps taken.
        total: Steps of the longest recipe.
        taken: Steps of this call.
        elapsed_s: Seconds of this call.
        losses: Mean training loss of each model since the last look.
        accuracies: Test accuracy of each model.
    """

    step: int
    total: int
    taken: int
    elapsed_s: float
    losses: list[float]
    accuracies: list[float]


class Standing(NamedTuple):
    """Where trainings stand that were given up: what it takes to go on with them.

    All have taken the same number of steps. Rows are the models'.
    """

    step: int
    stops: list[int]  # step at which each stops
    curves: list[list[tuple[int, float, float]]]
    flat: Tensor  # parameters, [models, P]
    mean: Tensor  # AdamW's, as the parameters
    square: Tensor
    falls: Tensor  # step at which a rate is 0; infinite where no early stop has begun, [models, 1]

    def of(self, rows: list[int]) -> "Standing":
        """Of some of the models, in this order."""
        stops, curves = [self.stops[row] for row in rows], [self.curves[row] for row in rows]
        tensors = (x[rows] for x in (self.flat, self.mean, self.square, self.falls))
        return Standing(self.step, stops, curves, *tensors)


def sizes_on_a_gpu(models: int) -> list[int]:
    """Numbers of places that an ensemble may have on a GPU, where each is a program of its own."""
    sizes = [models]
    while sizes[-1] > _FEW:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


class Ensemble:
    """Models of one shape, as rows of a parameter matrix.

    Args:
        make: Makes a model from a seed, a dropout of its own included.
        members: What to train; their rows have one shape, their batches one size.
        device: Where to train.
    """

    def __init__(
        self, make: Callable[[int], H3ForCausalLM], members: list[Member], device: torch.device
    ) -> None:
        self.members, self.device = members, device
        models = {seed: make(seed) for seed in dict.fromkeys(member.seed for member in members)}
        first = models[members[0].seed]
        self.config: H3Config = first.config
        if self.config.residual_dropout:
            raise ValueError("ensembles know dropout of the embedding and of attention only")
        rows = {seed: _flatten(_Logits(model)) for seed, model in models.items()}
        self._template = _Logits(first).to(device)
        shorten(first)
        named = dict(self._template.named_parameters())
        self._names = list(named)
        self._shapes = [parameter.shape for parameter in named.values()]
        self._sizes = [parameter.numel() for parameter in named.values()]
        self.flat = torch.stack([rows[m.seed] for m in members]).to(device)
        self.max_rate, self.decayed = (x.to(device) for x in _hints(self._template))
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.unfinished: list[int] = []  # members that were given up
        self.standing: Standing | None = None  # and where they stand

    def __len__(self) -> int:
        return len(self.members)

    def logits(
        self, flat: Tensor, inputs: Tensor, positions: Tensor, keep: dict[str, Tensor]
    ) -> Tensor:
        """Logits of each model for its rows, at some positions of each row.

        Args:
            flat: Parameters, (models, P).
            inputs: Ids, (models, B, L).
            positions: (models, B, Q), 0 <= positions < L.
            keep: Factors of dropout, see `dropout`; empty for none.

        Returns:
            (models, B, Q, vocab).
        """
        parts = [
            part.unflatten(1, shape) if len(shape) else part[:, 0]
            for part, shape in zip(flat.split(self._sizes, 1), self._shapes, strict=True)
        ]
        stacked = dict(zip(self._names, parts, strict=True))

        def one(parameters: dict[str, Tensor], *args: Any) -> Tensor:
            return functional_call(self._template, parameters, args)

        if len(flat) > 1:
            return vmap(one)(stacked, inputs, positions, keep)
        # an axis of one would cost a CPU a quarter of its step
        alone, factors = ({name: x[0] for name, x in d.items()} for d in (stacked, keep))
        return one(alone, inputs[0], positions[0], factors)[None]

    def dropout(
        self, models: int, rows: int, length: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """New factors of dropout, zero or 1/(1 - p), for one step."""
        config, found = self.config, {}

        def draw(name: str, rate: float, *shape: int) -> None:
            if rate:
                kept = torch.empty(models, rows, *shape, device=self.device)
                found[name] = kept.bernoulli_(1 - rate, generator=generator).div_(1 - rate)

        draw("embedding", config.embedding_dropout, length, config.hidden_size)
        for i in config.attention_layers or ():
            heads = config.num_attention_heads
            draw(f"attention {i}", config.attention_dropout, heads, length, length)
        return found

    def score(
        self, splits: list[Split], rows_at_once: int | None = None
    ) -> tuple[list[float], list[float]]:
        """Accuracy and loss of each model over the answers of its rows."""
        with TURN, _GATE.alone(), self.on_stream():
            scorer = _Scorer(self, self.flat, splits, rows_at_once)
            scorer.run()
            return scorer.read()

    def train(
        self,
        report: Callable[[Look], None] | None = None,
        looks_per_epoch: int = 1,
        stop: Callable[[], bool] = lambda: False,
        start: Standing | None = None,
    ) -> bool:
        """Train every model by its recipe, until all have stopped.

        Args:
            report: Called after each look at the test rows.
            looks_per_epoch: How often to look; a model may stop at a look only.
            stop: Asked at each look whether to give up. The models are then what they are,
                `Member.finished` says of each whether its own training was over, and `standing`
                holds what it takes to go on with those that were not.
            start: Where the members' trainings stood when they were given up. They go on as they
                would have, but for their dropout, which is drawn anew.

        Returns:
            Whether there is a model that was looked at: False where it was given up before.
        """
        with TURN, self.on_stream():
            trainer = _Trainer(self, start)
        begun, first = time.perf_counter(), trainer.step
        every = max(1, trainer.steps_per_epoch // looks_per_epoch)
        while not trainer.done and not stop():
            with self.on_stream():
                with _GATE.together():
                    count = trainer.run(every)
                    trainer.score()
                losses, accuracies = trainer.record(count)
            if report is not None:
                taken, elapsed = trainer.step - first, time.perf_counter() - begun
                report(Look(trainer.step, trainer.total_steps, taken, elapsed, losses, accuracies))
            if trainer.idle:
                with TURN, self.on_stream():
                    trainer.shrink()
        if trainer.step == first:
            return False
        with TURN, self.on_stream():
            trainer.put_back()
            for i, member in enumerate(self.members):
                member.model = self.model(i)
            self.unfinished, self.standing = trainer.standing()
        return True

    def prepare(self) -> None:
        """Compile and capture its step, as training does first, for the compiler's cache."""
        with TURN, self.on_stream():
            _Trainer(self)

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Work on the ensemble's stream of its GPU; nothing on a CPU."""
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            yield

    def model(self, index: int) -> H3ForCausalLM:
        """One of the models, on its own, on the CPU."""
        model = H3ForCausalLM(copy.deepcopy(self.config))
        parts = self.flat[index].detach().cpu().split(self._sizes)
        state = {
            name.removeprefix("model."): part.view(shape)
            for name, part, shape in zip(self._names, parts, self._shapes, strict=True)
        }
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(state[name])
        return model.eval()


class _Gate:
    """Lets threads replay graphs together, but none while one captures or works eagerly.

    A replay that waits for room in its stream holds the driver's lock, for which each of the
    thousands of launches of eager work would have to queue: it would take minutes.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            self._changed.wait_for(lambda: self._inside == 0)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


_GATE = _Gate()


class _Rows(NamedTuple):
    """Rows of each model, and where they have targets: the same number in each row."""

    inputs: Tensor  # [models, rows, L]
    positions: Tensor  # [models, rows, Q]
    targets: Tensor  # [models, rows, Q]

    @classmethod
    def of(cls, splits: list[Split], where: str, device: torch.device) -> "_Rows":
        """Rows with the answers only (`where` = "answers"), or with all targets."""
        parts = []
        for split in splits:
            mask = split.answers if where == "answers" else split.targets != IGNORED
            positions = np.nonzero(mask)[1].reshape(len(mask), -1)
            targets = np.take_along_axis(split.targets, positions, 1)
            parts.append((split.inputs, positions, targets))
        stacked = (torch.from_numpy(np.stack(same)).to(device) for same in zip(*parts, strict=True))
        return cls(*stacked)


class _StepTensors(NamedTuple):
    """What a training step reads, of `models` places; it changes the first five.

    The rows are those of `_Rows`.
    """

    flat: Tensor  # parameters, [models, P]
    mean: Tensor  # AdamW's, as the parameters
    square: Tensor
    loss: Tensor  # sum of training losses since the last look, [models]
    counter: Tensor  # steps taken, an integer
    inputs: Tensor
    positions: Tensor
    targets: Tensor
    order: Tensor  # rows of each step of an epoch, [steps, models, batch]
    present: Tensor  # 1 where a batch has a row, [steps, batch]
    rates: Tensor  # [steps, models, 2], see `_Trainer._rate_table`
    falls: Tensor  # step at which a model's rate is 0, [models, 1]
    fall_length: Tensor  # over so many steps, [models, 1]
    decay: Tensor  # of weights, as the parameters
    max_rate: Tensor  # infinite for most, [P]


class _Scorer:
    """Accuracy and loss of each model over the answers of some rows, in tensors of fixed place."""

    def __init__(
        self,
        ensemble: Ensemble,
        flat: Tensor,
        splits: list[Split],
        rows_at_once: int | None = None,
    ) -> None:
        self.ensemble, self.flat = ensemble, flat
        self.rows = _Rows.of(splits, "answers", ensemble.device)
        self.rows_at_once = rows_at_once or (100 if ensemble.device.type == "cpu" else 500)
        self.sums = torch.zeros(2, len(flat), device=ensemble.device)

    @torch.no_grad()
    def run(self) -> None:
        ensemble = self.ensemble
        self.sums.zero_()
        for start in range(0, self.rows.inputs.shape[1], self.rows_at_once):
            inputs, positions, targets = (
                x[:, start : start + self.rows_at_once] for x in self.rows
            )
            logits = ensemble.logits(self.flat, inputs, positions, {})
            nll = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
            right = logits.argmax(-1) == targets
            self.sums[0] += right.flatten(1).sum(1)
            self.sums[1] += nll.view_as(targets).flatten(1).sum(1)

    def read(self) -> tuple[list[float], list[float]]:
        count = self.rows.targets[0].numel()
        right, loss = ([x / count for x in sums] for sums in self.sums.tolist())
        return right, loss


class _Trainer:
    """The optimiser, the order of the rows, and the captured step, of the models that still train.

    Tensors of a place for each model hold those of `live` only, in its order.
    """

    def __init__(self, ensemble: Ensemble, start: Standing | None = None) -> None:
        self.ensemble, members, device = ensemble, ensemble.members, ensemble.device
        first = members[0]
        rows, self.batch = len(first.data.train.inputs), first.recipe.batch_size
        self.rows = rows
        self.steps_per_epoch = -(-rows // self.batch)
        self.lengths = [m.recipe.epochs * self.steps_per_epoch for m in members]
        self.total_steps, self.step = max(self.lengths), 0
        self.stops: list[int] = list(self.lengths)
        self.live = list(range(len(members)))
        self.flat = ensemble.flat.detach().clone()
        self.data = _Rows.of([m.data.train for m in members], "targets", device)
        self.falls = torch.full((len(members), 1), math.inf, device=device)  # from a stop on
        self.fall_length = torch.tensor(
            [[max(1.0, length // 10)] for length in self.lengths], device=device
        )
        self.rates = self._rate_table(members).to(device)
        self.counter = torch.zeros((), dtype=torch.long, device=device)
        self.order = torch.zeros(
            self.steps_per_epoch, len(members), self.batch, dtype=torch.long, device=device
        )
        self.present = torch.ones(self.steps_per_epoch, self.batch, device=device)
        if rows % self.batch:
            self.present[-1, rows % self.batch :] = 0
        seeds = list(dict.fromkeys(m.seed for m in members))
        self.shuffle = [np.random.default_rng([seed, 1]) for seed in seeds]
        self.owner = torch.tensor([seeds.index(m.seed) for m in members], device=device)
        self.mean, self.square = (torch.zeros_like(ensemble.flat) for _ in range(2))
        self.decay = ensemble.decayed * torch.tensor(
            [[m.recipe.weight_decay] for m in members], device=device
        )
        self.loss = torch.zeros(len(members), device=device)
        self.advance_many: Callable[[], None] | None = None
        self.reached: deque[torch.cuda.Event] = deque()  # on the stream, every `_AT_ONCE` steps
        self.unmarked = 0  # steps behind the last of these
        self.known = [(math.nan, math.nan)] * len(members)  # loss and accuracy, of all models
        if start is not None:
            self._go_on_from(start)
        self._make_ready()

    def _go_on_from(self, start: Standing) -> None:
        self.step, self.stops = start.step, list(start.stops)
        self.counter.fill_(start.step)
        for name in ("flat", "mean", "square", "falls"):
            getattr(self, name).copy_(getattr(start, name))
        for i, (member, curve) in enumerate(zip(self.ensemble.members, start.curves, strict=True)):
            member.curve, member.steps = list(curve), start.step
            self.known[i] = curve[-1][1:]
        done, within = divmod(start.step, self.steps_per_epoch)
        for rng in self.shuffle:
            for _ in range(done):
                rng.permutation(self.rows)
        if within:
            self._reorder()

    def standing(self) -> tuple[list[int], Standing | None]:
        """Members whose training is not over, and where they stand; None if there are none."""
        places = [place for place, more in enumerate(self._going_on()) if more]
        if not places:
            return [], None
        left = [self.live[place] for place in places]
        tensors = (x[places].cpu() for x in (self.flat, self.mean, self.square, self.falls))
        members = self.ensemble.members
        stops, curves = [self.stops[i] for i in left], [members[i].curve for i in left]
        return left, Standing(self.step, stops, curves, *tensors)

    def _make_ready(self) -> None:
        """The step and the look for the tensors of now, captured on a GPU."""
        tests = [self.ensemble.members[i].data.test for i in self.live]
        self.scorer = _Scorer(self.ensemble, self.flat, tests)
        self.generator = torch.Generator(self.ensemble.device)
        self.advance, self.advance_many = self._advance, None
        self.score = self.scorer.run
        dropout = self._dropout()
        self.generator.manual_seed(self.ensemble.members[0].seed + self.step)
        self.kept_names, self.update = list(dropout), self._update
        if (stream := self.ensemble.stream) is not None:
            self.update = fuse(self._update, (*self._tensors(), *dropout.values()))
            self.advance = self._captured(stream, 1)
            self.advance_many = self._captured(stream, _AT_ONCE)
            self.score = capture(self.scorer.run, stream)

    @property
    def done(self) -> bool:
        return self.step >= max(self.stops)

    @property
    def idle(self) -> bool:
        """Whether it is worth it to go on without the models that have stopped."""
        return any(self._going_on()) and self._places() < len(self.live)

    def _going_on(self) -> list[bool]:
        """Of each place, whether its model still trains."""
        return [self.step < self.stops[i] for i in self.live]

    def _places(self) -> int:
        """How many places the models that still train are best given."""
        left = sum(self._going_on())
        if self.ensemble.stream is None:
            return left
        return min(size for size in sizes_on_a_gpu(len(self.live)) if size >= left)

    def run(self, count: int) -> int:
        """Take up to `count` steps; how many."""
        self.loss.zero_()
        count = min(count, max(self.stops) - self.step)
        end = self.step + count
        while self.step < end:
            if self.step % self.steps_per_epoch == 0:
                self._reorder()
            left = min(end - self.step, -self.step % self.steps_per_epoch or self.steps_per_epoch)
            if self.advance_many is not None and left >= _AT_ONCE:
                self.advance_many()
                taken = _AT_ONCE
            else:
                self.advance()
                taken = 1
            self.step += taken
            self._keep_pace(taken)
        return count

    def _keep_pace(self, taken: int) -> None:
        """Stay a few times `_AT_ONCE` steps ahead of the GPU: no launch has to wait."""
        stream = self.ensemble.stream
        self.unmarked += taken
        if stream is None or self.unmarked < _AT_ONCE:
            return
        self.unmarked = 0
        self.reached.append(stream.record_event())
        if len(self.reached) > 2:
            self.reached.popleft().synchronize()

    def record(self, count: int) -> tuple[list[float], list[float]]:
        """Note where each model stands after `count` steps, and begin to stop those that are done.

        Returns:
            Mean training loss since the last look and test accuracy of every model; of those that
            have left, as they left.
        """
        losses, (accuracies, test_losses) = self.loss.tolist(), self.scorer.read()
        for place, i in enumerate(self.live):
            member = self.ensemble.members[i]
            self.known[i] = losses[place] / count, accuracies[place]
            if member.steps >= self.stops[i]:
                continue
            before = member.solved
            member.steps = min(self.step, self.stops[i])
            member.curve.append((member.steps, *self.known[i]))
            member.test_loss = test_losses[place]
            if member.solved and not before:
                stop = self.step + int(self.fall_length[place])
                if stop < self.stops[i]:
                    self.stops[i] = stop
                    self.falls[place] = stop
            member.finished = member.steps >= self.stops[i]
        return [loss for loss, _ in self.known], [accuracy for _, accuracy in self.known]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the ensemble the parameters of those that train here."""
        self.ensemble.flat[self.live] = self.flat

    def shrink(self) -> None:
        """Go on without the models that have stopped."""
        self.put_back()
        going_on = self._going_on()
        # places left over are filled by models that have stopped, whose rate is zero
        first = sorted(range(len(going_on)), key=lambda place: not going_on[place])
        places = sorted(first[: self._places()])
        self.live = [self.live[p] for p in places]
        kept = torch.tensor(places, device=self.ensemble.device)
        self.flat = self.flat[kept]
        self.data = _Rows(*(x[kept] for x in self.data))
        for name in ("falls", "fall_length", "owner", "mean", "square", "decay", "loss"):
            setattr(self, name, getattr(self, name)[kept])
        self.rates, self.order = self.rates[:, kept], self.order[:, kept]
        self._make_ready()

    def _reorder(self) -> None:
        width = self.steps_per_epoch * self.batch
        orders = [np.resize(rng.permutation(self.rows), width) for rng in self.shuffle]
        stacked = torch.from_numpy(np.stack(orders)).view(len(orders), -1, self.batch)
        self.order.copy_(stacked.to(self.order.device)[self.owner].transpose(0, 1))

    def _rate_table(self, members: list[Member]) -> Tensor:
        """(steps, models, 2): of common parameters, and of those with a largest rate."""
        table = np.zeros((self.total_steps, len(members), 2), dtype=np.float32)
        cap = float(self.ensemble.max_rate.min())
        for i, (member, length) in enumerate(zip(members, self.lengths, strict=True)):
            peak = member.recipe.learning_rate
            table[:length, i, 0] = member.recipe.rates(length, peak)
            table[:length, i, 1] = member.recipe.rates(length, min(peak, cap))
        return torch.from_numpy(table)

    @torch.no_grad()
    def _advance(self) -> None:
        """One step of every model; reads and writes tensors of fixed place only."""
        self.update(*self._tensors(), *self._dropout().values())

    def _tensors(self) -> "_StepTensors":
        return _StepTensors(
            self.flat, self.mean, self.square, self.loss, self.counter,
            *self.data, self.order, self.present,
            self.rates, self.falls, self.fall_length, self.decay, self.ensemble.max_rate,
        )  # fmt: skip

    def _dropout(self) -> dict[str, Tensor]:
        length = self.data.inputs.shape[2]
        return self.ensemble.dropout(len(self.flat), self.batch, length, self.generator)

    def _update(self, *tensors: Tensor) -> None:
        """One step as a function of tensors: `_StepTensors`, and the factors of dropout."""
        count = len(_StepTensors._fields)
        of = _StepTensors(*tensors[:count])
        kept = dict(zip(self.kept_names, tensors[count:], strict=True))
        order, present = (_at(x, of.counter % self.steps_per_epoch) for x in (of.order, of.present))
        model = torch.arange(len(of.flat), device=of.flat.device)[:, None]
        inputs, positions, targets = (
            x[model, order] for x in (of.inputs, of.positions, of.targets)
        )
        with torch.enable_grad():
            parameters = of.flat.detach().requires_grad_()
            logits = self.ensemble.logits(parameters, inputs, positions, kept)
            nll = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
            loss = nll.view_as(targets).mean(2) @ present / present.sum()
            (gradient,) = torch.autograd.grad(loss.sum(), parameters)
        with torch.no_grad():
            of.loss.add_(loss)
            fall = ((of.falls - of.counter) / of.fall_length).clamp(0, 1)
            now = _at(of.rates, of.counter.clamp(max=self.total_steps - 1)) * fall
            rate = torch.where(of.max_rate.isfinite(), now[:, 1:], now[:, :1])
            of.counter.add_(1)
            _adamw(of.flat, of.mean, of.square, gradient, of.counter, rate, of.decay)

    def _captured(self, stream: torch.cuda.Stream, steps: int) -> Callable[[], None]:
        """Steps as a CUDA graph; what they changed on the way is taken back."""

        def advance() -> None:
            for _ in range(steps):
                self._advance()

        changed = (self.flat, self.mean, self.square, self.counter, self.loss)
        before = [x.detach().clone() for x in changed]
        replay = capture(advance, stream, self.generator)
        self.generator.manual_seed(self.ensemble.members[0].seed + self.step)
        with torch.no_grad():
            for x, old in zip(changed, before, strict=True):
                x.copy_(old)
        return replay


def _adamw(
    flat: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    count: Tensor,
    rate: Tensor,
    decay: Tensor,
) -> None:
    """Step `count` of AdamW, betas 0.9 and 0.999, epsilon 1e-8, a rate for each element."""
    mean.lerp_(gradient, 0.1)
    square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    count = count.to(torch.float32)
    size = (square / (1 - 0.999**count)).sqrt_().add_(1e-8)
    update = mean / (1 - 0.9**count) / size + decay * flat
    flat.sub_(rate * update)


def capture(
    work: Callable[[], None], stream: torch.cuda.Stream, generator: torch.Generator | None = None
) -> Callable[[], None]:
    """Capture work as a CUDA graph, after doing it a few times.

    Args:
        work: Reads and writes tensors of fixed place only.
        stream: The current stream.
        generator: What it draws random numbers from.

    Returns:
        What replays it.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    # other threads wait for their own work meanwhile, which the strictest mode forbids
    thread_local = capturing(graph, stream=stream, capture_error_mode="thread_local")
    with _GATE.alone():
        for _ in range(3):
            work()
        with thread_local:
            work()
    return graph.replay


class _Logits(nn.Module):
    """A model as a plain function of ids, without masks, positions to check or a cache."""

    def __init__(self, model: H3ForCausalLM) -> None:
        super().__init__()
        self.model = model.eval()  # dropout comes as an argument

    def forward(self, ids: Tensor, positions: Tensor, keep: dict[str, Tensor]) -> Tensor:
        core: Any = self.model.model
        weight = core.embed_tokens.weight
        r = _embed(ids, weight)
        if core.config.num_learned_positions:
            r = r + core.embed_positions.weight[: ids.shape[1]]
        if "embedding" in keep:
            r = r * keep["embedding"]
        for i, layer in enumerate(core.layers):
            if isinstance(layer.mixer, CausalAttention):
                mixed = attend(layer.mixer, layer.norm1(r), keep.get(f"attention {i}"))
                r = layer.finish(r, mixed)
            else:
                r, _ = Block.forward(layer, r)
        if positions.shape[1] < ids.shape[1]:
            r = r.gather(1, positions[..., None].expand(-1, -1, r.shape[2]))
        return core.norm(r) @ weight.T


def _embed(ids: Tensor, weight: Tensor) -> Tensor:
    # The gradient of a look-up sorts the ids; few rows are faster picked by a product
    if weight.shape[0] > _SMALL_VOCABULARY:
        return F.embedding(ids, weight)
    known = torch.arange(weight.shape[0], device=ids.device)
    return (ids[..., None] == known).to(weight.dtype) @ weight


def _flatten(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def _hints(model: nn.Module) -> tuple[Tensor, Tensor]:
    """For each parameter element: the largest rate (infinite if none), and whether it decays."""
    capped, decayed = {}, {}
    for module in model.modules():
        if isinstance(module, SSMModule):
            for name, hint in module.training_hints.items():
                parameter = getattr(module, name)
                if hint.max_learning_rate is not None:
                    capped[id(parameter)] = hint.max_learning_rate
                if hint.weight_decay == 0:
                    decayed[id(parameter)] = 0.0

    def spread(values: dict[int, float], default: float) -> Tensor:
        return torch.cat(
            [torch.full((p.numel(),), values.get(id(p), default)) for p in model.parameters()]
        )

    return spread(capped, math.inf), spread(decayed, 1.0)


def _at(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for an index on the device, without looking at it from the host."""
    return table.index_select(0, index[None])[0]
