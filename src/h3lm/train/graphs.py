"""Forward and backward passes replayed as CUDA graphs.

A step is hundreds of launches from Python, which a GPU waits for. Batches of one form (names,
shapes, dtypes) run as they are a few times and are then captured; from there on a step is a copy of
its inputs and one launch. Dropout draws from the same generator either way. What follows, clipping
and the optimiser, is launched as ever: the host has the time while the graph runs.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from h3lm.models.capture import capturing
from h3lm.train.recipe import Recipe

logger = logging.getLogger("h3lm.train")
WARM_STEPS = 2  # of a form before it is captured: kernels compile, libraries take their memory
MAX_FORMS = 128  # that are captured; others run as they are
MAX_GRADIENT_BYTES = 1 << 32  # of all forms: each leaves its gradients in memory of its own

Inputs = dict[str, Tensor]
Step = Callable[[Inputs], Tensor]


def wants_graphs(recipe: Recipe, recomputed: bool) -> bool:
    """Whether one process with a GPU replays its steps, which is what the recipe leaves open.

    Not where the host looks at numbers within a step: at positions, for documents that are kept
    apart, and at the state of the random numbers, for blocks that are recomputed.

    Args:
        recipe: The run.
        recomputed: Whether blocks are recomputed.
    """
    if recipe.graphs is not None:
        return recipe.graphs
    return not (recipe.reset_state_at_documents or recomputed) and recipe.profile_steps is None


@dataclass(frozen=True)
class _Captured:
    """A graph, and the tensors that it reads and writes."""

    graph: Any
    inputs: Inputs
    loss: Tensor
    grads: list[Tensor | None]


class GraphedSteps:
    """Runs a step, a forward and a backward pass, by a graph where it can.

    Gradients are in `grad` of the parameters behind it. Where they are None before it they are
    new, else the step adds to them: that is another graph.

    Args:
        parameters: What gets gradients.
        capture: Records what a function launches, into a given memory pool; `capture` of this
            module.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        capture: Callable[..., tuple[Any, Tensor]] | None = None,
    ) -> None:
        self._parameters = list(parameters)
        size = sum(p.numel() * p.element_size() for p in self._parameters)
        # at least a step that makes gradients and one that adds to them
        self._most = max(2, min(MAX_FORMS, MAX_GRADIENT_BYTES // max(size, 1)))
        self._capture = capture or record
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._pool: Any = None
        self._off = False

    @property
    def captured(self) -> bool:
        """Whether there is a graph to replay."""
        return bool(self._captured)

    def __call__(self, inputs: Inputs, step: Step) -> Tensor:
        """The loss, detached, of a step on inputs that lie on the device.

        Args:
            inputs: Of the step.
            step: Forward and backward pass; must not wait for the device.
        """
        shapes = tuple((name, x.shape, x.dtype) for name, x in sorted(inputs.items()))
        adds = any(parameter.grad is not None for parameter in self._parameters)
        form = adds, shapes
        found = self._captured.get(form)
        if found is None:
            # a graph that adds does so where a first one has left its gradients
            early = adds and (False, shapes) not in self._captured
            self._seen[form] += not early
            full = len(self._captured) >= self._most
            if self._off or full or early or self._seen[form] <= WARM_STEPS:
                return step(inputs)
            found = self._record(inputs, step)
            if found is None:
                return step(inputs)
            self._captured[form] = found
        for name, x in inputs.items():
            found.inputs[name].copy_(x)
        if adds:
            self._bring(found.grads)
        found.graph.replay()
        for parameter, grad in zip(self._parameters, found.grads, strict=True):
            parameter.grad = grad
        return found.loss.clone()

    def _record(self, inputs: Inputs, step: Step) -> _Captured | None:
        held = {name: x.clone() for name, x in inputs.items()}
        before = [parameter.grad for parameter in self._parameters]
        try:
            graph, loss = self._capture(lambda: step(dict(held)), self._pool)
        except RuntimeError as error:
            self._off = True
            for parameter, grad in zip(self._parameters, before, strict=True):
                parameter.grad = grad
            reason = str(error).splitlines()[0]
            logger.warning("steps cannot be captured and are launched one by one: %s", reason)
            return None
        self._pool = graph.pool()
        grads = [parameter.grad for parameter in self._parameters]
        return _Captured(graph, held, loss, grads)

    def _bring(self, places: list[Tensor | None]) -> None:
        """Copy gradients to where a graph adds to them, if a step without one has left them."""
        for parameter, place in zip(self._parameters, places, strict=True):
            if parameter.grad is not place and place is not None:
                place.zero_() if parameter.grad is None else place.copy_(parameter.grad)


def record(run: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture what a function launches; it has not run when this returns."""
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    try:
        # a thread that pins memory for the data loader may call CUDA meanwhile
        with capturing(graph, pool=pool, capture_error_mode="thread_local"):
            loss = run()
    except RuntimeError:
        generator.graphsafe_set_state(before)  # else it would wait for the graph for ever
        raise
    return graph, loss
