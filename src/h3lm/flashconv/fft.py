"""Long convolution by torch.fft: the path of every device without a block-FFT kernel."""

import torch
from torch import Tensor


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
    wide = torch.promote_types(u.dtype, f.dtype)
    with torch.autocast(u.device.type, enabled=False):
        x = u.to(wide) if pre_gate is None else u.to(wide) * pre_gate.to(wide)
        reach = f.shape[1] if f_reverse is None else f.shape[1] + f_reverse.shape[1] - 1
        n = L if mode == "circular" else _fast_length(L + reach - 1)
        spectrum = torch.fft.rfft(f.to(wide), n=n)
        if f_reverse is not None:
            # lag -s sits at the end of a period: the spectrum of a real filter run backwards
            spectrum = spectrum + torch.fft.rfft(f_reverse.to(wide), n=n).conj()
        y = torch.fft.irfft(torch.fft.rfft(x, n=n) * spectrum, n=n)[..., :L]
        if skip is not None:
            y = y + skip[:, None] * x
        if post_gate is not None:
            y = y * post_gate.to(wide)
        return y.to(u.dtype)


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
