"""One token at a time: the recurrence of the H3 core, in plain PyTorch."""

import torch
from torch import Tensor

from h3lm.flashconv.state import H3State, as_real_pairs, from_real_pairs
from h3lm.ssm.operators import DiagonalSystem


def h3_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    system: DiagonalSystem,
    state: H3State,
    *,
    head_dim: int = 1,
) -> tuple[Tensor, H3State]:
    """Advance `h3_core` by one position.

        s = sum_j taps_j k_{t-j};  w_ij = s_i v_j;  x = a x + b w;  y = 2 Re(c x) + skip w;
        o_j = sum_i q_i y_ij

    Args:
        q, k, v: (B, D), float32, bfloat16, float16 or float64. Accumulated in float32.
        taps: (D, n_taps), skip included.
        system: The diagonal SSM of each head.
        state: State before this position.
        head_dim: Channels of a head.

    Returns:
        `o`, (B, D) in the dtype of q, and the state after this position.
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = system.skip.dtype
        B, D = q.shape
        window = torch.cat([state.shift, k[..., None]], -1)  # oldest first
        s = (window.to(wide) * taps.flip(-1)).sum(-1)
        # Complex numbers as real pairs: half of the memory traffic of complex temporaries, and
        # the compiler fuses it
        a, b, c = (as_real_pairs(z)[:, None, None] for z in (system.a, system.b, system.c))
        x = as_real_pairs(state.diagonal).reshape(B, D // head_dim, head_dim, head_dim, -1, 2)
        w = s.view(B, -1, head_dim, 1) * v.to(wide).view(B, -1, 1, head_dim)
        re, im = x[..., 0], x[..., 1]
        new_re = a[..., 0] * re - a[..., 1] * im + b[..., 0] * w[..., None]
        new_im = a[..., 0] * im + a[..., 1] * re + b[..., 1] * w[..., None]
        y = 2 * (c[..., 0] * new_re - c[..., 1] * new_im).sum(-1)
        y = y + system.skip[:, None, None] * w
        o = (q.to(wide).view(B, -1, head_dim, 1) * y).sum(2).reshape(B, D)
        diagonal = from_real_pairs(torch.stack([new_re, new_im], -1))
        return o.to(q.dtype), H3State(window[..., 1:], diagonal.view(state.diagonal.shape))
