"""One token of the H3 core in Triton where diagonal states lag behind; see `flashconv.lagging`.

Two kernels. The first moves the states whose blocks begin, and makes what they and the shift SSM
will answer in the block; it needs nothing of this step and runs while the product makes q, k and v.
The second adds a few numbers for each channel. Channels lie innermost everywhere, and nothing
crosses threads but sums over modes and taps, in the first kernel alone.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.kernels.overlap import launch_options, let_next_start, wait_for_inputs
from h3lm.flashconv.lagging import BLOCK, GROUP
from h3lm.flashconv.step import rows_class


@dataclass(frozen=True)
class LaggingSize:
    """Sizes of the kernels; `h3lm.bench.generate_tune` times them.

    Attributes:
        split: Warps of the first kernel, which share modes and taps of a group of channels.
        modes: Modes that each takes at once.
        rows: Rows of a program of the second.
        wide: Channels of it.
        warps: Warps of it.
        first: Whether the next kernel may start before this one waits.
    """

    split: int = 4
    modes: int = 4
    rows: int = 4
    wide: int = 32
    warps: int = 4
    first: bool = False


SIZES = {  # by `rows_class`, the last for more; the first for one row, too
    16: LaggingSize(modes=8, first=True),
    64: LaggingSize(split=2, first=True),
}


@triton.jit
def none_yet():
    """A tuple to which tensors are added."""
    return ()


@triton.jit
def zeros(COUNT: tl.constexpr, shape: tl.constexpr):
    """So many sums of nothing."""
    sums = none_yet()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros(shape, tl.float32),)
    return sums


@triton.jit
def load_pair(at, D: tl.constexpr):
    """A complex number of each channel: real parts of all, then imaginary ones."""
    return tl.load(at), tl.load(at + D)


@triton.jit
def move_states(
    diagonal, a, b, c, inputs, channel, count,
    D: tl.constexpr, MODES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Take the last `count` inputs into the states of a row; what they answer in the next block."""
    sums = zeros(BLOCK, [SPLIT, GROUP])
    PAIR: tl.constexpr = 2 * D
    first = tl.arange(0, SPLIT)[:, None] * (MODES // SPLIT * PAIR) + channel[None, :]
    # distances that the compiler knows cost neither registers nor instructions
    at, at_a, at_b, at_c = diagonal + first, a + first, b + first, c + first
    for _ in range(0, MODES // SPLIT, AT_ONCE):
        loaded = none_yet()  # all of them in front of the first that is stored
        for i in tl.static_range(AT_ONCE):
            loaded += load_pair(at + i * PAIR, D)
            loaded += load_pair(at_a + i * PAIR, D)
            loaded += load_pair(at_b + i * PAIR, D)
            loaded += load_pair(at_c + i * PAIR, D)
        for i in tl.static_range(AT_ONCE):
            re, im = loaded[8 * i], loaded[8 * i + 1]
            a_re, a_im = loaded[8 * i + 2], loaded[8 * i + 3]
            b_re, b_im = loaded[8 * i + 4], loaded[8 * i + 5]
            c_re, c_im = loaded[8 * i + 6], loaded[8 * i + 7]
            for j in tl.static_range(BLOCK):
                use = j >= BLOCK - count
                new_re = a_re * re - a_im * im + b_re * inputs[j]
                new_im = a_re * im + a_im * re + b_im * inputs[j]
                re = tl.where(use, new_re, re)
                im = tl.where(use, new_im, im)
            tl.store(at + i * PAIR, re)
            tl.store(at + (i * PAIR + D), im)
            # from here on c x, whose real parts are half of the answers
            x_re = c_re * re - c_im * im
            x_im = c_re * im + c_im * re
            more = none_yet()
            for m in tl.static_range(BLOCK):
                re = a_re * x_re - a_im * x_im
                x_im = a_re * x_im + a_im * x_re
                x_re = re
                more += (sums[m] + x_re,)
            sums = more
        at += AT_ONCE * PAIR
        at_a += AT_ONCE * PAIR
        at_b += AT_ONCE * PAIR
        at_c += AT_ONCE * PAIR
    return sums


@triton.jit
def shift_ahead(
    values, taps, channel, write,
    D: tl.constexpr, N_TAPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """What a row's values of k before this step add to the shift SSM in the steps of a block."""
    OF_PART: tl.constexpr = (N_TAPS + SPLIT - 1) // SPLIT
    sums = zeros(BLOCK, [SPLIT, GROUP])
    age = tl.arange(0, SPLIT)[:, None] * OF_PART + 1
    at = taps + age * D + channel[None, :]
    window = none_yet()
    for m in tl.static_range(BLOCK):
        window += (tl.load(at + (m - 1) * D, mask=age + m - 1 < N_TAPS, other=0.0),)
    for i in tl.static_range(OF_PART):
        place = write - age
        place = tl.where(place < 0, place + N_TAPS, place)
        value = tl.load(values + place * D + channel[None, :], mask=age < N_TAPS, other=0.0)
        value = value.to(tl.float32)
        window = window[1:]
        there = age + BLOCK - 1 < N_TAPS
        window += (tl.load(at + (i + BLOCK - 1) * D, mask=there, other=0.0),)
        more = none_yet()
        for m in tl.static_range(BLOCK):
            more += (sums[m] + window[m] * value,)
        sums = more
        age += 1
    return sums


@triton.jit
def eight_of(x):
    """Eight tensors as one with an axis more, the last."""
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    both = tl.join(even, odd)
    return tl.reshape(both, (both.shape[0], both.shape[1], 8))


@triton.jit
def leave(sums, here, slot, channel, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store sums [channels, steps] for the steps from `slot` on to the end of the block."""
    tl.debug_barrier()  # all have read what is written over
    step = slot + tl.arange(0, BLOCK)[None, :]
    tl.store(here + step * D + channel[:, None], sums, mask=step < BLOCK)


@triton.jit(do_not_specialize=["first"])
def renew_kernel(
    ring, position, diagonal, recent, taps, a, b, c, groups, first,
    D: tl.constexpr, N_TAPS: tl.constexpr, MODES: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, AT_ONCE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Begin the blocks of a group of channels of a row that begin with this step.

    Programs 0 of the last axis move states, programs 1 look after the shift SSM.
    """
    let_next_start(EARLY)
    row = tl.program_id(0).to(tl.int64)  # states pass 2^31 elements
    steps = tl.load(position + row)
    write = (steps % N_TAPS).to(tl.int32)
    count = tl.minimum(steps, BLOCK).to(tl.int32)
    begins = (BLOCK - (steps % BLOCK).to(tl.int32)) % BLOCK  # the eighth of the channels
    eighths = 1
    if count == 0:
        eighths = BLOCK
    for slot in range(eighths):  # of a row at its first step all begin, somewhere in a block
        eighth = (begins + slot) % BLOCK
        group = tl.cdiv(eighth * groups, BLOCK) + tl.program_id(1)
        if group < tl.cdiv((eighth + 1) * groups, BLOCK):
            channel = group * GROUP + tl.arange(0, GROUP)
            shifts = recent + row * (2 * BLOCK * D)
            answers = shifts + BLOCK * D
            if tl.program_id(2) == 0:
                inputs = none_yet()
                for j in tl.static_range(BLOCK):
                    known = channel < (j + count - BLOCK + 1) * D  # all of them, or none
                    w = tl.load(answers + j * D + channel, mask=known, other=0.0)
                    inputs += (w[None],)
                sums = move_states(
                    diagonal + row * (2 * MODES * D), a, b, c, inputs, channel, count,
                    D, MODES, GROUP, BLOCK, SPLIT, AT_ONCE,
                )  # fmt: skip
                leave(2 * tl.sum(eight_of(sums), 0), answers, slot, channel, D, BLOCK)
            else:
                sums = shift_ahead(
                    ring + row * (N_TAPS * D), taps, channel, write, D, N_TAPS, GROUP, BLOCK, SPLIT
                )
                leave(tl.sum(eight_of(sums), 0), shifts, slot, channel, D, BLOCK)
    wait_for_inputs(first, EARLY)


@triton.jit(do_not_specialize=["first"])
def h3_step_kernel(
    q, k, v, o, ring, position, recent, taps, response, B, groups,
    q_stride, k_stride, v_stride, first,
    D: tl.constexpr, N_TAPS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Advance WIDE channels of one eighth, of ROWS rows."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    eighth = tl.program_id(0) * WIDE // GROUP * BLOCK // groups
    mask = (row < B)[:, None]
    far = row.to(tl.int64)
    steps = tl.load(position + row, mask=row < B, other=0)
    slot = ((steps + eighth) % BLOCK).to(tl.int32)
    write = (steps % N_TAPS).to(tl.int32)
    seen = tl.minimum(steps.to(tl.int32), slot)  # steps of the block so far
    shifts = recent + (far * (2 * BLOCK) + slot)[:, None] * D + channel[None, :]
    here = shifts + BLOCK * D
    values = ring + (far * N_TAPS)[:, None] * D + channel[None, :]
    s = tl.zeros((ROWS, WIDE), tl.float32)
    y = tl.zeros((ROWS, WIDE), tl.float32)
    for j in tl.static_range(1, BLOCK):
        use = mask & (j <= seen)[:, None]
        place = write - j
        place = tl.where(place < 0, place + N_TAPS, place)
        old = tl.load(values + place[:, None] * D, mask=use, other=0.0).to(tl.float32)
        s += tl.load(taps + j * D + channel)[None, :] * old
        w = tl.load(here - j * D, mask=use, other=0.0)
        y += tl.load(response + j * D + channel)[None, :] * w
    now_k = tl.load(taps + channel)[None, :]
    now_w = tl.load(response + channel)[None, :]
    wait_for_inputs(first, EARLY)
    s += tl.load(shifts, mask=mask, other=0.0)
    y += tl.load(here, mask=mask, other=0.0)
    gate = tl.load(q + far[:, None] * q_stride + channel[None, :], mask=mask, other=0.0)
    new = tl.load(k + far[:, None] * k_stride + channel[None, :], mask=mask, other=0.0)
    value = tl.load(v + far[:, None] * v_stride + channel[None, :], mask=mask, other=0.0)
    w = (s + now_k * new.to(tl.float32)) * value.to(tl.float32)
    y += now_w * w
    out = o + far[:, None] * D + channel[None, :]
    tl.store(out, (gate.to(tl.float32) * y).to(o.dtype.element_ty), mask=mask)
    tl.store(values + write[:, None] * D, new, mask=mask)
    tl.store(here, w, mask=mask)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    response: Tensor,
    ring: Tensor,
    position: Tensor,
    diagonal: Tensor,
    recent: Tensor,
    early: bool = False,
    size: LaggingSize | None = None,
) -> Tensor:
    """Launch the kernels; see `flashconv.h3_step_in_place` for shapes; one of `SIZES` if None.

    q, k and v have contiguous channels and any row stride; in all else channels lie innermost.
    """
    B, D = q.shape
    modes, n_taps, groups = a.shape[1], taps.shape[1], D // GROUP
    size = size or SIZES[max(rows_class(B), 16)]
    split = math.gcd(size.split, modes)  # a warp for each: none may read what another one writes
    renew_kernel[(B, triton.cdiv(groups, BLOCK), 2)](
        ring, position, diagonal, recent, taps, a, b, c, groups,
        D=D, N_TAPS=n_taps, MODES=modes, GROUP=GROUP, BLOCK=BLOCK, SPLIT=split,
        AT_ONCE=math.gcd(size.modes, modes // split), num_warps=split,
        **launch_options(early, first=False),
    )  # fmt: skip
    # no program goes beyond an eighth of the channels
    wide = GROUP if groups % BLOCK else math.gcd(size.wide, D // BLOCK)
    rows = min(size.rows, triton.next_power_of_2(B))
    o = torch.empty((B, D), dtype=q.dtype, device=q.device)
    h3_step_kernel[(D // wide, triton.cdiv(B, rows))](
        q, k, v, o, ring, position, recent, taps, response, B, groups,
        q.stride(0), k.stride(0), v.stride(0),
        D=D, N_TAPS=n_taps, ROWS=rows, WIDE=wide, GROUP=GROUP, BLOCK=BLOCK,
        num_warps=min(size.warps, max(1, rows * wide // 32)), **launch_options(early, size.first),
    )  # fmt: skip
    return o
