"""The kernels of long convolution as operators of PyTorch, and what stands around them.

Skip, reverse filter and wrap-around are properties of one filter that reaches both ways. They are
folded into it here, in plain PyTorch with autograd, so that the kernels know one operation only:

    y = post (h * (pre u)),   h_s = f_s (s > 0),  f_0 + f_reverse_0 (s = 0),  f_reverse_{-s} (s < 0)
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from h3lm.flashconv import fft
from h3lm.flashconv.dispatch import Problem, capability, conv_algorithm

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
    """

    f: Tensor
    skip: Tensor | None = None
    f_reverse: Tensor | None = None
    mode: str = "causal"
    prepared: dict[tuple[object, ...], _Prepared] = field(default_factory=dict)

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
    with torch.autocast(u.device.type, enabled=False):
        f, f_reverse = _folded(f, skip, f_reverse, mode, u.shape[-1])
        return torch.ops.h3lm.fft_conv_fwd(u, f, f_reverse, pre_gate, post_gate)


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
        kept.prepared[key] = _prepare(u, f, f_reverse, kept.skip, kept.mode, backend, gated)
    prepared = kept.prepared[key]
    run_prepared = torch.ops.h3lm.fft_conv_prepared
    return run_prepared(
        u, prepared.tensors, prepared.algorithm, prepared.taps, prepared.taps_reverse,
        pre_gate, post_gate,
    )  # fmt: skip


def _prepare(
    u: Tensor,
    f: Tensor,
    f_reverse: Tensor | None,
    skip: Tensor | None,
    mode: str,
    backend: str,
    gated: bool,
) -> _Prepared:
    from h3lm.flashconv.kernels.conv_plan import plan

    with torch.autocast(u.device.type, enabled=False):
        f, f_reverse = _folded(f, skip, f_reverse, mode, u.shape[-1])
        taps, taps_reverse = _taps(f, f_reverse)
        algorithm = _algorithm(u, taps, taps_reverse, gated) if backend == "triton" else "torch.fft"
        kernels, size = plan(algorithm, u.device, u.shape[-1], taps, taps_reverse)
        tensors = list(kernels.prepare(u, f, f_reverse, size))
    return _Prepared(algorithm, tensors, taps, taps_reverse)


def _folded(
    f: Tensor, skip: Tensor | None, f_reverse: Tensor | None, mode: str, L: int
) -> tuple[Tensor, Tensor | None]:
    """Filters that do what those with a skip, or circular ones, do; at least float32."""
    wide = torch.promote_types(f.dtype, torch.float32)
    f = f.to(wide)
    f_reverse = None if f_reverse is None else f_reverse.to(wide)
    if skip is not None:
        f = torch.cat([f[:, :1] + skip.to(wide)[:, None], f[:, 1:]], 1)
    return _unrolled(f, f_reverse, L) if mode == "circular" else (f, f_reverse)


def _unrolled(f: Tensor, f_reverse: Tensor | None, L: int) -> tuple[Tensor, Tensor]:
    """A causal pair of filters that does what a circular one does to rows of length L."""
    ring = torch.nn.functional.pad(f, (0, L - f.shape[1]))
    if f_reverse is not None:
        back = torch.nn.functional.pad(f_reverse, (0, L - f_reverse.shape[1]))
        ring = ring + back.flip(1).roll(1, 1)
    behind = torch.nn.functional.pad(ring[:, 1:].flip(1), (1, 0))  # lag -s is lag L - s
    return ring, behind


def _taps(f: Tensor, f_reverse: Tensor | None) -> tuple[int, int | None]:
    return f.shape[1], None if f_reverse is None else f_reverse.shape[1]


def _algorithm(
    u: Tensor, taps: int, taps_reverse: int | None, gated: bool, backward: bool = False
) -> str:
    """The algorithm for rows like u; torch.fft in the place of one that fails its check."""
    from h3lm.flashconv.kernels.conv_plan import works

    problem = Problem(
        length=u.shape[-1],
        capability=capability(u.device),
        lags=taps + (taps_reverse or 1) - 1,
        gated=gated,
    )
    algorithm = conv_algorithm(u.dtype, problem, backward)
    return algorithm if works(algorithm, u.device, u.shape[-1]) else "torch.fft"


def _plan(
    u: Tensor,
    f: Tensor,
    f_reverse: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    *,
    backward: bool = False,
) -> Any:
    from h3lm.flashconv.kernels.conv_plan import plan

    taps, taps_reverse = _taps(f, f_reverse)
    gated = pre is not None or post is not None
    algorithm = _algorithm(u, taps, taps_reverse, gated, backward)
    return plan(algorithm, u.device, u.shape[-1], taps, taps_reverse)


@torch.library.custom_op("h3lm::fft_conv_fwd", mutates_args=())
def _forward(
    u: Tensor, f: Tensor, f_reverse: Tensor | None, pre: Tensor | None, post: Tensor | None
) -> Tensor:
    kernels, size = _plan(u, f, f_reverse, pre, post)
    u, pre, post = _positions_last(u), _optional(pre), _optional(post)
    return kernels.forward(u, kernels.prepare(u, f, f_reverse, size), size, pre, post)


@_forward.register_fake
def _(
    u: Tensor, f: Tensor, f_reverse: Tensor | None, pre: Tensor | None, post: Tensor | None
) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("h3lm::fft_conv_bwd", mutates_args=())
def _backward(
    dy: Tensor,
    u: Tensor,
    f: Tensor,
    f_reverse: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    data: bool,
    filters: bool,
    gate: bool,
) -> list[Tensor]:
    kernels, size = _plan(u, f, f_reverse, pre, post, backward=True)
    dy, u, pre, post = _positions_last(dy), _positions_last(u), _optional(pre), _optional(post)
    prepared = kernels.prepare(u, f, f_reverse, size)
    du, dpre, sums = kernels.backward(dy, u, prepared, size, pre, post, data=data, filters=filters)
    df, dback = None, None
    if sums is not None:
        df, dback = kernels.filter_gradients(u, sums, size, *_taps(f, f_reverse))
    # y = post conv, so that its gradient is a forward pass behind another gate
    dpost = kernels.forward(u, prepared, size, pre, dy) if gate and post is not None else None
    return [x for x in (du, df, dback, dpre, dpost) if x is not None]


@_backward.register_fake
def _(
    dy: Tensor,
    u: Tensor,
    f: Tensor,
    f_reverse: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    data: bool,
    filters: bool,
    gate: bool,
) -> list[Tensor]:
    given = _present(f_reverse, pre, post, data, filters, gate)
    shapes = (u, f, f, u, u) if f_reverse is None else (u, f, f_reverse, u, u)
    return [x.new_empty(x.shape) for x, wanted in zip(shapes, given, strict=True) if wanted]


def _present(
    f_reverse: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    data: bool,
    filters: bool,
    gate: bool,
) -> tuple[bool, ...]:
    """Which gradients `fft_conv_bwd` returns: u, f, f_reverse, pre, post."""
    return (
        data,
        filters,
        filters and f_reverse is not None,
        data and pre is not None,
        gate and post is not None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    u, f, f_reverse, pre, post = ctx.saved_tensors
    needs = ctx.needs_input_grad
    data, filters, gate = needs[0] or needs[3], needs[1] or needs[2], needs[4]
    if not (data or filters or gate):
        return None, None, None, None, None
    grads = iter(torch.ops.h3lm.fft_conv_bwd(dy, u, f, f_reverse, pre, post, data, filters, gate))
    present = _present(f_reverse, pre, post, data, filters, gate)
    return tuple(next(grads) if wanted else None for wanted in present)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


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

    kernels, size = plan(algorithm, u.device, u.shape[-1], taps, taps_reverse)
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


def _positions_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _positions_last(x)
