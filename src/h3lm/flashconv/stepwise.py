"""The operations as one writes them in PyTorch: what errors in half precision are measured against.

Each step is computed in float32, convolutions by `torch.fft`, and leaves its result in the dtype of
the inputs; autograd does the same on the way back. Nothing runs by it: it serves tests, reports
and `h3lm doctor`. Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 1.
"""

from itertools import pairwise

import torch
from torch import Tensor

from h3lm.flashconv import fft
from h3lm.flashconv.state import H3State, diagonal_shape
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
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, H3State]:
    """`flashconv.h3_core`, left to right, in steps that round; the final state is always made.

    s = taps * k;   w_ij = s_i v_j;   y = filter * w + what the initial state brings;
    o_j = sum_i q_i y_ij

    The diagonal states are float32, as everywhere (float64 for float64 inputs). Memory grows with
    L N: no path for long rows.
    """
    if cu_seqlens is not None:
        outputs, ends = [], []
        for s, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
            before = initial_state and H3State(*(x[s : s + 1] for x in initial_state))
            o, end = h3_core(
                q[..., a:b], k[..., a:b], v[..., a:b], taps, system,
                head_dim=head_dim, initial_state=before,
            )  # fmt: skip
            outputs.append(o)
            ends.append(end)
        shifts, diagonals = zip(*ends, strict=True)
        return torch.cat(outputs, -1), H3State(torch.cat(shifts), torch.cat(diagonals))
    with torch.autocast(q.device.type, enabled=False):
        (B, D, L), reach = q.shape, taps.shape[1] - 1
        history = k.new_zeros(B, D, reach) if initial_state is None else initial_state.shift
        seen = torch.cat([history, k], -1)
        filtered = fft.fft_conv(seen, taps)[..., reach:]
        q, filtered, v = (x.unflatten(1, (-1, head_dim)) for x in (q, filtered, v))
        w = filtered[:, :, :, None] * v[:, :, None]  # (B, H, head_dim, head_dim, L)
        y, diagonal = _diagonal(w, system, initial_state and initial_state.diagonal)
        o = (q[:, :, :, None].to(system.skip.dtype) * y.to(system.skip.dtype)).sum(2)
        return o.flatten(1, 2).to(q.dtype), H3State(seen[..., L:], diagonal)


def ssm_conv(
    u: Tensor,
    system: DiagonalSystem,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`flashconv.ssm_conv`, left to right, in steps that round; the final state is always made.

    w = pre_gate u;   y = filter * w + what the initial state brings;   out = post_gate y

    Shapes and dtypes as there. Memory grows with L N.
    """
    with torch.autocast(u.device.type, enabled=False):
        w = u if pre_gate is None else pre_gate * u
        y, end = _diagonal(w[:, :, None, None], system, initial_state)
        y = y[:, :, 0, 0]
        return y if post_gate is None else post_gate * y, end


def fft_conv(
    u: Tensor,
    f: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """`flashconv.fft_conv`, causal, in steps that round; shapes and dtypes as there.

    x = pre_gate u;   y = f * x + skip x;   out = post_gate y
    """
    y = fft.fft_conv(u if pre_gate is None else pre_gate * u, f, skip=skip)
    return y if post_gate is None else post_gate * y


def _diagonal(w: Tensor, system: DiagonalSystem, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """The diagonal SSM over (B, H, head_dim, head_dim, L), and the state that it leaves."""
    B, H, i, j, L = w.shape
    x = w.permute(0, 2, 3, 1, 4).flatten(0, 2).to(system.skip.dtype)  # (rows, H, L)
    y = fft.fft_conv(x, system.filter(L), skip=system.skip)
    powers = system.powers(torch.arange(L, device=w.device)).to(system.a.dtype)  # (H, N/2, L)
    into = system.b[..., None] * powers.flip(-1)
    rows = x.transpose(0, 1)  # (H, rows, L)
    end = torch.complex(rows @ into.real.mT, rows @ into.imag.mT).transpose(0, 1)
    if start is not None:
        first = system.a * start.reshape(B, H, i, j, -1).permute(0, 2, 3, 1, 4).flatten(0, 2)
        out = (first * system.c).transpose(0, 1)  # (H, rows, N/2)
        y = y + 2 * (out.real @ powers.real - out.imag @ powers.imag).transpose(0, 1)
        end = end + powers[..., -1] * first
    y, end = (z.unflatten(0, (B, i, j)).permute(0, 3, 1, 2, 4) for z in (y, end))
    return y.to(w.dtype), end.reshape(diagonal_shape(B, H, i, system.num_modes))
