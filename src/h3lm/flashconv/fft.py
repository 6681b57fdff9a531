"""Long convolution by torch.fft: the path of every device without a block-FFT kernel.

`fft_conv` is this path. Below it are its parts in the form of the kernels' modules, without
autograd, which `fft_library` runs in the place of kernels that fail on a machine.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from h3lm.flashconv.filters import Filter, FilterGradients


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
    """`flashconv.fft_conv` in float32 (float64 for float64 inputs), padded against wrap-around."""
    L = u.shape[-1]
    wide = torch.promote_types(torch.promote_types(u.dtype, f.dtype), torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        x = u.to(wide) if pre_gate is None else u.to(wide) * pre_gate.to(wide)
        taps_reverse = None if f_reverse is None else f_reverse.shape[1]
        n = L if mode == "circular" else transform_length(L, f.shape[1], taps_reverse)
        spectrum = filter_spectrum(f.to(wide), f_reverse, n)
        y = torch.fft.irfft(torch.fft.rfft(x, n=n) * spectrum, n=n)[..., :L]
        if skip is not None:
            y = y + skip[:, None] * x
        if post_gate is not None:
            y = y * post_gate.to(wide)
        return y.to(u.dtype)


class Prepared(NamedTuple):
    """What `prepare` makes: half of the spectrum as real pairs, (D, n / 2 + 1, 2)."""

    pairs: Tensor


def prepare(u: Tensor, filter: Filter, size: int, backward: bool = False) -> Prepared:
    """The filter's spectrum for transforms of `size` points."""
    spectrum = filter_spectrum(*filter.folded(), size)
    return Prepared(torch.view_as_real(spectrum).contiguous())


def forward(
    u: Tensor, spectrum: Prepared, size: int, pre: Tensor | None, post: Tensor | None
) -> Tensor:
    """Convolve rows."""
    y = _convolved(_gated(u, pre), torch.view_as_complex(spectrum.pairs), size)
    return (y if post is None else y * post.to(y.dtype)).to(u.dtype)


def backward(
    dy: Tensor,
    u: Tensor,
    spectrum: Prepared,
    size: int,
    pre: Tensor | None,
    post: Tensor | None,
    *,
    data: bool,
    filters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of rows and first gate (`data`), of the filter of all lags (`filters`)."""
    g = _gated(dy, post)
    du, dpre, moved = None, None, None
    if data:
        turned = torch.conj_physical(torch.view_as_complex(spectrum.pairs))
        dx = _convolved(g, turned, size)
        dpre = None if pre is None else (dx * u.to(dx.dtype)).to(u.dtype)
        du = (dx if pre is None else dx * pre.to(dx.dtype)).to(u.dtype)
    if filters:
        x = torch.conj_physical(torch.fft.rfft(_gated(u, pre), n=size))
        moved = torch.fft.irfft((x * torch.fft.rfft(g, n=size)).sum(0), n=size)
    return du, dpre, moved


def filter_gradients(u: Tensor, moved: Tensor, filter: Filter, size: int) -> FilterGradients:
    """Gradients of the filter's parts from that of all lags, (D, n); lag -s stands at n - s."""
    df, dback = moved[:, : filter.taps], None
    if filter.taps_reverse is not None:
        ahead = moved[:, moved.shape[1] - filter.taps_reverse + 1 :].flip(1)
        dback = torch.cat([df[:, :1], ahead], 1)
    return filter.gradients(df, dback)


def filter_spectrum(f: Tensor, f_reverse: Tensor | None, points: int) -> Tensor:
    """Prepared of a filter that reaches both ways, (D, points / 2 + 1), complex."""
    spectrum = torch.fft.rfft(f, n=points)
    if f_reverse is not None:
        # lag -s sits at the end of a period: the spectrum of a real filter run backwards.
        # conj() is only a mark, which a custom operator ignores in its first call under compile
        back = torch.fft.rfft(f_reverse.to(f.dtype), n=points)
        spectrum = spectrum + torch.conj_physical(back)
    return spectrum


def transform_length(L: int, taps: int, taps_reverse: int | None) -> int:
    """Points with which nothing wraps around in rows of length L.

    A lag s and its other self, s - n, must not both move a position of the row to another of it,
    and all lags need a place of their own: 2 L - 1 points for two filters of L taps, not 3 L - 2.
    """
    reverse = taps_reverse or 1
    return _fast_length(max(L + taps, L + reverse, taps + reverse) - 1)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if gate is None else x * gate.to(x.dtype)


def _convolved(x: Tensor, spectrum: Tensor, n: int) -> Tensor:
    y = torch.fft.irfft(torch.fft.rfft(x, n=n) * spectrum, n=n)
    return y[..., : x.shape[-1]].contiguous()


def _fast_length(n: int) -> int:
    """The smallest even 2^i 3^j 5^k that is not below n."""
    best = 1 << max(1, (n - 1).bit_length())
    five = 1
    while five < best:
        three = five
        while three < best:
            rest = -(-n // three)
            candidate = three << max(1, (rest - 1).bit_length())
            best = min(best, candidate)
            three *= 3
        five *= 5
    return best
