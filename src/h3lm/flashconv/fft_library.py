"""The kernels of long convolution as operators of PyTorch.

They know one operation only, y = post (h * (pre u)): skip, reverse filter and wrap-around belong
to the filter h, see `filters`.

The operators are defined by hand, not by `torch.library.custom_op`: on short rows its Python around
each call, 0.1 ms forward and backward, took longer than the kernels.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from h3lm.flashconv import fft
from h3lm.flashconv.dispatch import ConvAlgorithm, Problem, capability, conv_algorithm
from h3lm.flashconv.filters import Filter, FilterGradients

KEPT_SHARE = 3  # of the rows' memory, one part in so many, for a filter's spectrum until backward
MAX_KEPT = 8  # lengths of rows for which a kept filter keeps its spectrum


class _Prepared(NamedTuple):
    """What an algorithm reads of a filter, for rows of one length and dtype.

    Attributes:
        algorithm: "torch.fft", or one of `dispatch.ConvAlgorithm`.
        tensors: What it made of the filter.
        taps: Taps of the filter.
        taps_reverse: Taps of the reverse one.
    """

    algorithm: str
    tensors: list[Tensor]
    taps: int
    taps_reverse: int | None


@dataclass(frozen=True)
class KeptFilter:
    """A filter for rows of any length, which keeps what `fft_conv` makes of it.

    Where gradients are off, its spectrum is made once for each length, dtype and device instead of
    in each call. So the tensors must stand still: whoever changes them makes a new object.

    Attributes:
        f, skip, f_reverse, mode: As in `fft_conv`; cut to the length of the row.
        prepared: What was made of it, by what it was made for.

    Raises:
        ValueError: if a filter is not (D, length).
    """

    f: Tensor
    skip: Tensor | None = None
    f_reverse: Tensor | None = None
    mode: str = "causal"
    prepared: dict[tuple[object, ...], _Prepared] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, taps in (("f", self.f), ("f_reverse", self.f_reverse)):
            if taps is not None and taps.dim() != 2:
                raise ValueError(f"{name} is {tuple(taps.shape)}, a KeptFilter needs (D, length)")

    def cut(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Both filters for rows of a length, which at 0 still have a tap."""
        length = max(length, 1)
        back = None if self.f_reverse is None else self.f_reverse[:, :length]
        return self.f[:, :length], back


def fft_conv(
    u: Tensor,
    f: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    f_reverse: Tensor | None = None,
    mode: str = "causal",
) -> Tensor:
    """`flashconv.fft_conv` by the kernels."""
    run: Any = torch.ops.h3lm.fft_conv_fwd
    if not torch.compiler.is_compiling() and _nobody_looks(u):
        run = _with_autograd
    y: Tensor = run(u, f, f_reverse, skip, pre_gate, post_gate, mode == "circular")
    return y


def fft_conv_kept(
    u: Tensor,
    kept: KeptFilter,
    *,
    backend: str,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """`flashconv.fft_conv` with a kept filter, by "torch" or "triton"."""
    f, f_reverse = kept.cut(u.shape[-1])
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        run = fft_conv if backend == "triton" else fft.fft_conv
        return run(
            u, f, skip=kept.skip, f_reverse=f_reverse, mode=kept.mode,
            pre_gate=pre_gate, post_gate=post_gate,
        )  # fmt: skip
    gated = pre_gate is not None or post_gate is not None
    key = (backend, u.shape[-1], u.dtype, u.device, gated)
    if key not in kept.prepared:
        if len(kept.prepared) >= MAX_KEPT:
            kept.prepared.clear()
        filter = _filter(u, f, f_reverse, kept.skip, kept.mode == "circular")
        kept.prepared[key] = _prepare(u, filter, backend, gated)
    prepared = kept.prepared[key]
    run_prepared = torch.ops.h3lm.fft_conv_prepared
    return run_prepared(
        u, prepared.tensors, prepared.algorithm, prepared.taps, prepared.taps_reverse,
        pre_gate, post_gate,
    )  # fmt: skip


def _prepare(u: Tensor, filter: Filter, backend: str, gated: bool) -> _Prepared:
    with _device_of(u):
        algorithm = _algorithms(u, filter, gated)[0] if backend == "triton" else "torch.fft"
        made = _Made.of(algorithm, u, filter, backward=False).prepared
    tensors = [x for x in made if x is not None]
    return _Prepared(algorithm, tensors, filter.taps, filter.taps_reverse)


def _filter(
    u: Tensor, f: Tensor, f_reverse: Tensor | None, skip: Tensor | None, circular: bool
) -> Filter:
    """A filter whose taps are beside each other."""
    back = None if f_reverse is None else _positions_last(f_reverse)
    skip = None if skip is None else skip.contiguous()
    return Filter(_positions_last(f), back, skip, u.shape[-1] if circular else 0)


def _algorithms(u: Tensor, filter: Filter, gated: bool) -> tuple[str, str]:
    """Those for rows like u, forward and backward; torch.fft in the place of one that is faulty."""
    from h3lm.flashconv.kernels.conv_plan import works

    lags = filter.taps + (filter.taps_reverse or 1) - 1
    forward, backward = _fastest(
        conv_algorithm, u.dtype, capability(u.device), u.shape[-1], lags, gated, len(u)
    )
    fine = works(forward, u.device, u.dtype, u.shape[-1])
    if backward == forward:
        return (forward, forward) if fine else ("torch.fft", "torch.fft")
    fine_backward = works(backward, u.device, u.dtype, u.shape[-1])
    return forward if fine else "torch.fft", backward if fine_backward else "torch.fft"


@lru_cache(1024)
def _fastest(
    algorithm: Callable[..., ConvAlgorithm],
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    length: int,
    lags: int,
    gated: bool,
    rows: int,
) -> tuple[ConvAlgorithm, ConvAlgorithm]:
    """What `dispatch.conv_algorithm` says, forward and backward.

    It is asked once for each kind of call; another one in its place is asked anew.
    """
    problem = Problem(length=length, capability=capability, lags=lags, gated=gated, rows=rows)
    return algorithm(dtype, problem, False), algorithm(dtype, problem, True)


class _Made(NamedTuple):
    """What was made of a filter for some rows, forward, that backward takes too.

    Attributes:
        plan: The algorithm's module and size.
        prepared: What its `prepare` returned.
    """

    plan: Any
    prepared: Any

    @classmethod
    def of(cls, algorithm: str, u: Tensor, filter: Filter, backward: bool) -> "_Made":
        """Make it."""
        from h3lm.flashconv.kernels.conv_plan import plan

        made = plan(algorithm, u.device, u.dtype, u.shape[-1], filter.taps, filter.taps_reverse)
        return cls(made, made.kernels.prepare(u, filter, made.size, backward))

    def is_small(self, u: Tensor) -> bool:
        """Whether it may stay until the backward pass: beside the rows it hardly counts."""
        return KEPT_SHARE * sum(x.nbytes for x in self.prepared if x is not None) <= u.nbytes


_FILTER = "Tensor f, Tensor? f_reverse, Tensor? skip"
_GATES = "Tensor? pre, Tensor? post, bool circular"
_library = torch.library.Library("h3lm", "FRAGMENT")
for _schema in (
    f"fft_conv_fwd(Tensor u, {_FILTER}, {_GATES}) -> Tensor",
    f"fft_conv_bwd(Tensor dy, Tensor u, {_FILTER}, {_GATES}, bool data, bool filters, bool gate)"
    " -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _forward(*inputs: Any) -> Tensor:
    return _convolve(*inputs, keep=False)[0]


def _convolve(
    u: Tensor,
    f: Tensor,
    f_reverse: Tensor | None,
    skip: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    circular: bool,
    *,
    keep: bool,
) -> tuple[Tensor, str, _Made | None]:
    """The result, the algorithm of `_backward`, and what that may take over if it is to be kept."""
    with _device_of(u):
        filter = _filter(u, f, f_reverse, skip, circular)
        algorithm, backward = _algorithms(u, filter, pre is not None or post is not None)
        keep = keep and algorithm == backward
        u, pre, post = _positions_last(u), _optional(pre), _optional(post)
        made = _Made.of(algorithm, u, filter, keep)
        kernels, size = made.plan
        y = kernels.forward(u, made.prepared, size, pre, post)
        return y, backward, made if keep and made.is_small(u) else None


def _forward_fake(u: Tensor, *rest: Any) -> Tensor:
    return u.new_empty(u.shape)


def _backward(
    dy: Tensor,
    u: Tensor,
    f: Tensor,
    f_reverse: Tensor | None,
    skip: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    circular: bool,
    data: bool,
    filters: bool,
    gate: bool,
    algorithm: str = "",
    made: _Made | None = None,
) -> list[Tensor]:
    with _device_of(u):
        filter = _filter(u, f, f_reverse, skip, circular)
        if made is None:
            gated = pre is not None or post is not None
            algorithm = algorithm or _algorithms(u, filter, gated)[1]
            made = _Made.of(algorithm, u, filter, backward=True)
        (kernels, size), prepared = made
        dy, u, pre, post = _positions_last(dy), _positions_last(u), _optional(pre), _optional(post)
        du, dpre, sums = kernels.backward(
            dy, u, prepared, size, pre, post, data=data, filters=filters
        )
        parts: tuple[Tensor | None, ...] = (None, None, None)
        if sums is not None:
            parts = _filter_gradients(made, algorithm, sums, filter, dy, u, pre, post)
        # y = post conv, so that its gradient is a forward pass behind another gate
        dpost = kernels.forward(u, prepared, size, pre, dy) if gate and post is not None else None
        return [x for x in (du, *parts, dpre, dpost) if x is not None]


def _filter_gradients(
    made: _Made,
    algorithm: str,
    sums: Any,
    filter: Filter,
    dy: Tensor,
    u: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
) -> FilterGradients:
    """Gradients of a filter's parts; that of a skip by itself where a transform's is not enough."""
    kernels, size = made.plan
    skip = filter.skip
    if skip is None or u.dtype == torch.bfloat16 or not algorithm.startswith("block FFT"):
        found: FilterGradients = kernels.filter_gradients(u, sums, filter, size)
        return found
    from h3lm.flashconv.kernels.skip_gradient import skip_gradient

    found = kernels.filter_gradients(u, sums, filter._replace(skip=None), size)
    return found._replace(skip=skip_gradient(dy, u, skip, pre, post))


def _backward_fake(
    dy: Tensor,
    u: Tensor,
    f: Tensor,
    f_reverse: Tensor | None,
    skip: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    circular: bool,
    data: bool,
    filters: bool,
    gate: bool,
) -> list[Tensor]:
    tensors = (u, f, f_reverse, skip, pre, post)
    given = _present(tensors, data, filters, gate)
    return [x.new_empty(x.shape) for x, wanted in zip(tensors, given, strict=True) if wanted]  # type: ignore[union-attr]


def _present(
    tensors: tuple[Tensor | None, ...], data: bool, filters: bool, gate: bool
) -> tuple[bool, ...]:
    """Which gradients `fft_conv_bwd` returns: u, f, f_reverse, skip, pre, post."""
    wanted = (data, filters, filters, filters, data, gate)
    return tuple(x is not None and want for x, want in zip(tensors, wanted, strict=True))


class _Convolution(torch.autograd.Function):
    """`fft_conv_fwd` with the gradient that `fft_conv_bwd` is."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.circular = inputs
        made, ctx.algorithm = None, ""
        if _nobody_looks(tensors[0]):
            y, ctx.algorithm, made = _convolve(*inputs, keep=True)
        else:
            y = _below_autograd(*inputs)
        ctx.plan = None if made is None else made.plan
        # saved like the others: dropped after the backward pass, and seen by hooks
        ctx.save_for_backward(*tensors, *(() if made is None else made.prepared))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        tensors, prepared = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        wanted = (needs[0] or needs[4], needs[1] or needs[2] or needs[3], needs[5])
        run: Any = torch.ops.h3lm.fft_conv_bwd
        if _nobody_looks(dy):
            made = None
            if ctx.plan is not None:
                made = _Made(ctx.plan, ctx.plan.kernels.Prepared(*prepared))
            run = partial(_backward, algorithm=ctx.algorithm, made=made)
        grads = iter(run(dy, *tensors, ctx.circular, *wanted))
        present = _present(tensors, *wanted)
        return *(next(grads) if there else None for there in present), None


def _nobody_looks(x: Tensor) -> bool:
    """Whether no compiler, mode or transform wants to see operators: then they are plain calls.

    A way through the dispatcher takes as long as a launch.
    """
    return (
        type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _below_autograd(*inputs: Any) -> Tensor:
    if _nobody_looks(inputs[0]):
        return _forward(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        y: Tensor = torch.ops.h3lm.fft_conv_fwd(*inputs)
    return y


def _with_autograd(*inputs: Any) -> Tensor:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:-1]):
        y: Tensor = _Convolution.apply(*inputs)
        return y
    return _below_autograd(*inputs)


for _name, _run, _fake in (
    ("fft_conv_fwd", _forward, _forward_fake),
    ("fft_conv_bwd", _backward, _backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"h3lm::{_name}", _fake, lib=_library)
_library.impl("fft_conv_fwd", _with_autograd, "Autograd")


@torch.library.custom_op("h3lm::fft_conv_prepared", mutates_args=())
def _run_prepared(
    u: Tensor,
    tensors: list[Tensor],
    algorithm: str,
    taps: int,
    taps_reverse: int | None,
    pre: Tensor | None,
    post: Tensor | None,
) -> Tensor:
    from h3lm.flashconv.kernels.conv_plan import plan

    with _device_of(u):
        kernels, size = plan(algorithm, u.device, u.dtype, u.shape[-1], taps, taps_reverse)
        u, pre, post = _positions_last(u), _optional(pre), _optional(post)
        return kernels.forward(u, kernels.Prepared(*tensors), size, pre, post)


@_run_prepared.register_fake
def _(
    u: Tensor,
    tensors: list[Tensor],
    algorithm: str,
    taps: int,
    taps_reverse: int | None,
    pre: Tensor | None,
    post: Tensor | None,
) -> Tensor:
    return u.new_empty(u.shape)


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever its tensors are."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _positions_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _positions_last(x)
