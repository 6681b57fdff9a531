"""Reading a filter that reaches both ways from its parts, see `flashconv.filters`."""

from typing import Any

import triton
import triton.language as tl

from h3lm.flashconv.filters import Filter


@triton.jit
def load_lags(
    f, reverse, skip, f_channel, reverse_channel, taps, taps_reverse, period, channel, lag, inside
):  # fmt: skip
    """A tile of lags of a channel's h, float32; 0 outside, and beyond what h reaches."""
    f += channel * f_channel
    value = tl.load(f + lag, inside & (lag >= 0) & (lag < taps), 0.0).to(tl.float32)
    wraps = inside & (lag < period) & (lag > -period)
    around = lag + period
    value += tl.load(f + around, wraps & (lag < 0) & (around < taps), 0.0).to(tl.float32)
    if skip is not None:
        value += tl.where(lag == 0, tl.load(skip + channel).to(tl.float32), 0.0)
    if reverse is not None:
        reverse += channel * reverse_channel
        ahead = inside & (lag <= 0) & (lag > -taps_reverse)
        value += tl.load(reverse - lag, ahead, 0.0).to(tl.float32)
        around = period - lag
        ahead = wraps & (lag > 0) & (around < taps_reverse)
        value += tl.load(reverse + around, ahead, 0.0).to(tl.float32)
    return value


def parts(filter: Filter) -> tuple[Any, ...]:
    """A filter as the first arguments of `load_lags`."""
    f, reverse, skip, period = filter
    back = (0, 0) if reverse is None else (reverse.stride(0), reverse.shape[1])
    return f, reverse, skip, f.stride(0), back[0], f.shape[1], back[1], period
