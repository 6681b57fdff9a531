"""The block-FFT kernels as an operator of PyTorch, and what stands around them.

Skip, reverse filter and wrap-around are properties of one filter that reaches both ways. They are
folded into it here, in plain PyTorch with autograd, so that the kernels know one operation only:

    y = post (h * (pre u)),   h_s = f_s (s > 0),  f_0 + f_reverse_0 (s = 0),  f_reverse_{-s} (s < 0)
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from h3lm.flashconv.dispatch import HOPPER_SHARED, MAX_FFT_LENGTH, MAX_FFT_LENGTH_SMALL, capability


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
        f = f.float()
        f_reverse = None if f_reverse is None else f_reverse.float()
        if skip is not None:
            f = torch.cat([f[:, :1] + skip.float()[:, None], f[:, 1:]], 1)
        if mode == "circular":
            f, f_reverse = _unrolled(f, f_reverse, u.shape[-1])
        return torch.ops.h3lm.fft_conv_fwd(u, f, f_reverse, pre_gate, post_gate)


def _unrolled(f: Tensor, f_reverse: Tensor | None, L: int) -> tuple[Tensor, Tensor]:
    """A causal pair of filters that does what a circular one does to rows of length L."""
    ring = torch.nn.functional.pad(f, (0, L - f.shape[1]))
    if f_reverse is not None:
        back = torch.nn.functional.pad(f_reverse, (0, L - f_reverse.shape[1]))
        ring = ring + back.flip(1).roll(1, 1)
    behind = torch.nn.functional.pad(ring[:, 1:].flip(1), (1, 0))  # lag -s is lag L - s
    return ring, behind


def _kernels(u: Tensor) -> tuple[ModuleType, Any]:
    """The kernels for rows like u, and the size of their transform."""
    from h3lm.flashconv.kernels import fft_launch, fft_long

    length, large = u.shape[-1], capability(u.device) in HOPPER_SHARED
    if length <= (MAX_FFT_LENGTH if large else MAX_FFT_LENGTH_SMALL):
        return fft_launch, fft_launch.size_for(length)
    return fft_long, fft_long.long_size_for(length, large)


@torch.library.custom_op("h3lm::fft_conv_fwd", mutates_args=())
def _forward(
    u: Tensor, f: Tensor, f_reverse: Tensor | None, pre: Tensor | None, post: Tensor | None
) -> Tensor:
    kernels, size = _kernels(u)
    u, pre, post = _positions_last(u), _optional(pre), _optional(post)
    spectrum = kernels.make_spectrum(u, f, f_reverse, size)
    return kernels.forward(u, spectrum, size, pre, post)


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
    from h3lm.flashconv.kernels.fft_launch import filter_gradients

    kernels, size = _kernels(u)
    dy, u, pre, post = _positions_last(dy), _positions_last(u), _optional(pre), _optional(post)
    spectrum = kernels.make_spectrum(u, f, f_reverse, size)
    du, dpre, sums = kernels.backward(dy, u, spectrum, size, pre, post, data=data, filters=filters)
    df, dback = None, None
    if sums is not None:
        df, dback = filter_gradients(
            sums, f.shape[1], None if f_reverse is None else f_reverse.shape[1]
        )
    # y = post conv, so that its gradient is a forward pass behind another gate
    dpost = kernels.forward(u, spectrum, size, pre, dy) if gate and post is not None else None
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


def _positions_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _positions_last(x)
