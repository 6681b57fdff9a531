"""The operations by definition: one position at a time, one tap at a time.

These are what every faster path is tested against. They compute in the widest dtype of their
inputs, at least float32, and take float64.
"""

import torch
from torch import Tensor

from h3lm.flashconv.state import H3State, diagonal_shape
from h3lm.ssm.dplr import DPLRSystem
from h3lm.ssm.operators import DiagonalSystem


def h3_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    system: DiagonalSystem,
    *,
    head_dim: int = 1,
    initial_state: H3State | None = None,
) -> tuple[Tensor, H3State]:
    """One row of `flashconv.h3_core` after the other positions, left to right.

    s_t = sum_j taps_j k_{t-j};   w_ij = s_i v_j;   x = a x + b w;
    y = 2 Re(c x) + skip w;       o_j = sum_i q_i y_ij
    """
    B, D, L = q.shape
    H, wide = D // head_dim, torch.promote_types(torch.promote_types(q.dtype, taps.dtype), _F32)
    per_pair = (B, H, head_dim, head_dim, system.num_modes)
    if initial_state is None:
        window = q.new_zeros(B, D, taps.shape[1] - 1, dtype=wide)
        x = system.a.new_zeros(per_pair)
    else:
        window = initial_state.shift.to(wide)
        x = initial_state.diagonal.to(system.a.dtype).reshape(per_pair)
    a, b, c = (z[:, None, None, :] for z in (system.a, system.b, system.c))
    outputs = []
    for t in range(L):
        window = torch.cat([window, k[:, :, t, None].to(wide)], -1)  # oldest first
        s = (window.flip(-1) * taps).sum(-1).reshape(B, H, head_dim, 1)
        w = s * v[:, :, t].to(wide).reshape(B, H, 1, head_dim)
        x = a * x + b * w[..., None]
        y = 2 * (c * x).real.sum(-1) + system.skip[:, None, None] * w
        outputs.append((q[:, :, t].to(wide).reshape(B, H, head_dim, 1) * y).sum(2).reshape(B, D))
        window = window[..., 1:]
    o = torch.stack(outputs, -1) if outputs else q.new_zeros(B, D, 0)
    shape = diagonal_shape(B, H, head_dim, system.num_modes)
    return o.to(q.dtype), H3State(window.to(k.dtype), x.reshape(shape))


def ssm_conv(
    u: Tensor,
    system: DiagonalSystem | DPLRSystem,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`flashconv.ssm_conv`, left to right."""
    wide = torch.promote_types(torch.promote_types(u.dtype, system.skip.dtype), _F32)
    w = u.to(wide) if pre_gate is None else u.to(wide) * pre_gate.to(wide)
    if initial_state is None:
        x = system.c.new_zeros(*u.shape[:2], system.num_modes)
    else:
        x = initial_state.to(system.c.dtype)
    outputs = []
    for t in range(u.shape[2]):
        y, x = system.step(w[:, :, t], x)
        outputs.append(y)
    y = torch.stack(outputs, -1) if outputs else w
    if post_gate is not None:
        y = y * post_gate.to(wide)
    return y.to(u.dtype), x


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
    """`flashconv.fft_conv` as a sum over taps; no transform."""
    wide = torch.promote_types(torch.promote_types(u.dtype, f.dtype), _F32)
    x = u.to(wide) if pre_gate is None else u.to(wide) * pre_gate.to(wide)
    y = torch.zeros_like(x) if skip is None else skip[:, None] * x
    for taps, direction in ((f, 1), (f_reverse, -1)):
        for lag in range(0 if taps is None else taps.shape[1]):
            assert taps is not None
            moved = torch.roll(x, direction * lag, -1)
            if mode == "causal" and lag:
                edge = slice(0, lag) if direction > 0 else slice(-lag, None)
                moved = moved.clone()
                moved[..., edge] = 0
            y = y + taps[:, lag, None] * moved
    if post_gate is not None:
        y = y * post_gate.to(wide)
    return y.to(u.dtype)


_F32 = torch.float32
