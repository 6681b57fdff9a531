"""One token at a time: the recurrence of the H3 core.

`h3_step` is a function of a state. `h3_step_in_place` advances a state where it lies, so that a
captured CUDA graph keeps its addresses: by a kernel on a GPU, in plain PyTorch elsewhere. Where
the state is large, it may lag behind (`lagging`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from h3lm.flashconv import lagging, library
from h3lm.flashconv.checks import check_h3_state, check_heads, check_like
from h3lm.flashconv.dispatch import KERNELS, Problem, announce, capability, choose
from h3lm.flashconv.state import H3State, as_real_pairs, from_real_pairs
from h3lm.ssm.operators import DiagonalSystem


class RingState(NamedTuple):
    """An `H3State` that is advanced in place; contiguous for kernels.

    Attributes:
        ring: The last n_taps values of k, (B, D, n_taps), in k's dtype; the value of step p lies
            in slot p % n_taps.
        position: Steps so far, (B,), int64; the next value of k goes to slot position % n_taps.
            The caller advances it, once for all layers that share it.
        diagonal: `H3State.diagonal` as real pairs, (B, H, N/2, 2) or
            (B, H, head_dim, head_dim, N/2, 2), float32.
        recent: With it the diagonal state lags behind by up to `lagging.BLOCK` steps, what they
            brought is here, (B, 2, BLOCK, D), float32, and nothing at position 0. Heads of one
            channel alone; ring and diagonal state have their channels innermost in memory
            (`lagging.innermost`).
    """

    ring: Tensor
    position: Tensor
    diagonal: Tensor
    recent: Tensor | None = None


class StepOperators(NamedTuple):
    """What a step needs of the parameters: contiguous and real.

    Attributes:
        taps: (D, n_taps), skip included, float32.
        a, b, c: The diagonal system as real pairs, (H, N/2, 2), float32.
        skip: (H,), float32.
        response: For states that lag behind, `lagging.response`; taps, a, b and c have their
            channels innermost in memory then.
    """

    taps: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    skip: Tensor
    response: Tensor | None = None

    @classmethod
    def of(cls, taps: Tensor, system: DiagonalSystem, *, lags: bool = False) -> "StepOperators":
        """From what `h3_core` takes, for states that lag behind or for others."""
        taps, a, b, c = (
            lagging.innermost(x, 0) if lags else x.contiguous()
            for x in (taps, *map(as_real_pairs, (system.a, system.b, system.c)))
        )
        answers = lagging.response(system) if lags else None
        return cls(taps, a, b, c, system.skip.contiguous(), answers)

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [x for x in self if x is not None]


def h3_step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operators: StepOperators,
    state: RingState,
    *,
    head_dim: int = 1,
    backend: str = "auto",
    early: bool = False,
) -> Tensor:
    """`h3_step` that writes the new state over the old one; no gradients.

    Args:
        q, k, v: (B, D), float32, bfloat16 or float16 (float64 in plain PyTorch); channels
            contiguous. Accumulated in float32.
        operators: The parameters.
        state: Changed in place but for its `position`.
        head_dim: Channels of a head.
        backend: "auto", "torch" or "triton".
        early: Promises that what was launched before this call since the last plain kernel (one
            that lets nothing start before it ends) neither reads nor writes the state, nor writes
            the operators: then the state may be read and written while that still runs.

    Returns:
        `o`, (B, D) in the dtype of q.

    Raises:
        ValueError: if the backend is unknown or cannot do this, a kernel gets a state that is not
            contiguous, or the state lags behind and cannot (`lagging.takes`), or the operators are
            for one that does not.
    """
    problem = Problem(
        length=1,
        capability=capability(q.device),
        head_dim=head_dim,
        num_modes=operators.a.shape[1],
        n_taps=operators.taps.shape[1],
        complex64=operators.a.dtype == torch.float32,
    )
    choice = choose("h3_step", q.device, q.dtype, backend, problem)
    announce("h3_step", choice)
    lags = state.recent is not None
    if lags and not lagging.takes(head_dim, q.shape[1], state.ring.shape[2]):
        raise ValueError(
            f"states lag behind where heads have one channel, channels are a multiple of "
            f"{lagging.GROUP} and taps at least {lagging.BLOCK}: not with head_dim {head_dim}, "
            f"{q.shape[1]} channels and {state.ring.shape[2]} taps"
        )
    if lags != (operators.response is not None):
        raise ValueError("a state that lags behind takes operators made with lags=True, no others")
    if choice.backend in KERNELS:
        stored = [state.ring, state.diagonal]
        if not all(x.movedim(1, -1 if lags else 1).is_contiguous() for x in stored):
            raise ValueError("a state that is advanced in place by a kernel must be contiguous")
        if lags:
            taps, a, b, c, _, response = operators  # the response holds the skip
            return library.h3_step_lagging(q, k, v, taps, a, b, c, response, *state, early)
        return library.h3_step(q, k, v, *operators[:5], *state[:3], head_dim, early)
    if lags:
        return lagging.h3_step(q, k, v, operators, state)
    old = H3State(unrolled(state.ring, state.position), from_real_pairs(state.diagonal))
    a, b, c = (from_real_pairs(z) for z in (operators.a, operators.b, operators.c))
    system = DiagonalSystem(a, b, c, operators.skip)
    o, new = _step(q, k, v, operators.taps, system, old, head_dim)
    slot = (state.position % state.ring.shape[2])[:, None, None].expand(*k.shape, 1)
    state.ring.scatter_(2, slot, k[..., None].to(state.ring.dtype))
    state.diagonal.copy_(as_real_pairs(new.diagonal))
    return o


def unrolled(ring: Tensor, position: Tensor) -> Tensor:
    """The last n_taps - 1 values of a ring, oldest first: `H3State.shift`, (B, D, n_taps - 1)."""
    return ring.gather(2, _slots(ring, position))


def roll_in_place(ring: Tensor, position: Tensor, shift: Tensor) -> None:
    """Store `H3State.shift` as the last values of a ring that goes on at `position`."""
    ring.scatter_(2, _slots(ring, position), shift)


def _slots(ring: Tensor, position: Tensor) -> Tensor:
    """Slots of the last n_taps - 1 values, oldest first."""
    n_taps = ring.shape[2]
    age = torch.arange(n_taps - 1, 0, -1, device=ring.device)
    slots = (position[:, None] - age) % n_taps
    return slots[:, None].expand(-1, ring.shape[1], -1)


def rows_class(rows: int) -> int:
    """Which sizes the kernels of a step take for so many rows: those for 1, 16 or 64 of them."""
    return 1 if rows == 1 else 16 if rows <= 16 else 64


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

    Raises:
        ValueError: if shapes, dtypes or devices do not belong together, or there is no state
            (`zero_state` makes the first).
    """
    check_like("q", q, {"k": k, "v": v}, "(B, D)")
    check_heads(k, taps, system, head_dim)
    if not isinstance(system, DiagonalSystem):
        raise ValueError(f"a step needs the system itself, not a {type(system).__name__}")
    if state is None:
        raise ValueError("a step needs a state; zero_state makes the one before anything was seen")
    check_h3_state(state, len(k), k, taps, system, head_dim)
    return _step(q, k, v, taps, system, state, head_dim)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    system: DiagonalSystem,
    state: H3State,
    head_dim: int,
) -> tuple[Tensor, H3State]:
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
