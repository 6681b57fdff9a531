"""One token of the H3 core in Triton where diagonal states lag behind; see `flashconv.lagging`.

A program owns a group of channels of some rows, whose blocks begin together, and a thread one of
each: channels lie innermost everywhere, and nothing crosses threads. Seven times of eight it
touches no state: it adds a few numbers for each channel. Else it moves the states over the last
block and makes what they will answer in the next one. Nearly all of it needs nothing of this step,
and is done in front of the wait for q, k and v, while the product that makes them runs. The
programs that move states come first.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.kernels.overlap import launch_options, wait_for_inputs
from h3lm.flashconv.lagging import BLOCK, GROUP
from h3lm.flashconv.step import rows_class


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
def load_pair(pointer, at, D, mask):
    """A complex number of each channel: real parts of all, then imaginary ones."""
    return tl.load(pointer + at, mask=mask), tl.load(pointer + at + D, mask=mask)


@triton.jit
def move_states(
    diagonal, here, a, b, c, far, D, channel, count, slot, renew,
    MODES: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Take the last `count` inputs into states; leave their answers to the next block at `here`."""
    inputs, uses = none_yet(), none_yet()
    for j in tl.static_range(BLOCK):
        use = (renew & (j >= BLOCK - count))[:, None]
        inputs += (tl.load(here + j * D, mask=use, other=0.0)[None],)
        uses += (use[None],)
    sums = zeros(BLOCK, [SPLIT, ROWS, GROUP])
    part = tl.arange(0, SPLIT) * (MODES // SPLIT)
    wanted = renew[None, :, None]
    moved = wanted & (count > 0)[None, :, None]
    for begin in range(0, MODES // SPLIT, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            mode = part + begin + i
            at = (far[None, :] * MODES + mode[:, None]) * (2 * D)
            at = at[:, :, None] + channel[None, None, :]
            of_mode = mode[:, None, None] * (2 * D) + channel[None, None, :]
            re, im = load_pair(diagonal, at, D, wanted)
            a_re, a_im = load_pair(a, of_mode, D, None)
            b_re, b_im = load_pair(b, of_mode, D, None)
            c_re, c_im = load_pair(c, of_mode, D, None)
            for j in tl.static_range(BLOCK):
                new_re = a_re * re - a_im * im + b_re * inputs[j]
                new_im = a_re * im + a_im * re + b_im * inputs[j]
                re = tl.where(uses[j], new_re, re)
                im = tl.where(uses[j], new_im, im)
            tl.store(diagonal + at, re, mask=moved)
            tl.store(diagonal + at + D, im, mask=moved)
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
    tl.debug_barrier()  # all have read the inputs that are written over
    for m in tl.static_range(BLOCK):
        inside = (renew & (slot + m < BLOCK))[:, None]
        tl.store(here + (slot[:, None] + m) * D, 2 * tl.sum(sums[m], 0), mask=inside)


@triton.jit
def shift_ahead(
    values, here, taps, D, channel, newest, slot, renew,
    N_TAPS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """What values of k before this step add to the shift SSM in this step and the next ones."""
    sums = zeros(BLOCK, [ROWS, GROUP])
    window = none_yet()
    for m in tl.static_range(BLOCK):
        window += (tl.load(taps + m * D + channel)[None, :],)
    for begin in range(1, N_TAPS, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            age = begin + i
            place = newest - (age - 1)
            place = tl.where(place < 0, place + N_TAPS, place)
            known = (renew & (age < N_TAPS))[:, None]
            value = tl.load(values + place[:, None] * D, mask=known, other=0.0).to(tl.float32)
            last = age + BLOCK - 1
            there = channel < (N_TAPS - last) * D  # all of them, or none behind the last tap
            window = window[1:]
            window += (tl.load(taps + last * D + channel, mask=there, other=0.0)[None, :],)
            more = none_yet()
            for m in tl.static_range(BLOCK):
                more += (sums[m] + window[m] * value,)
            sums = more
    for m in tl.static_range(BLOCK):
        inside = (renew & (slot + m < BLOCK))[:, None]
        tl.store(here + (slot[:, None] + m) * D, sums[m], mask=inside)


@triton.jit(do_not_specialize=["first"])
def h3_step_kernel(
    q, k, v, o, ring, position, diagonal, recent, taps, a, b, c, response, B, D, groups,
    q_stride, k_stride, v_stride, first,
    N_TAPS: tl.constexpr, MODES: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, MODES_AT_ONCE: tl.constexpr,
    TAPS_AT_ONCE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Advance a group of channels of ROWS rows."""
    # groups that are at the beginning of a block where row 0 is come first
    begins = (BLOCK - (tl.load(position) % BLOCK).to(tl.int32)) % BLOCK
    blocks = tl.num_programs(0) // groups
    group = (tl.program_id(0) // blocks + tl.cdiv(begins * groups, BLOCK)) % groups
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    live = row < B
    far = row.to(tl.int64)  # states pass 2^31 elements
    steps = tl.load(position + row, mask=live, other=1)
    slot = ((steps + group * BLOCK // groups) % BLOCK).to(tl.int32)
    write = (steps % N_TAPS).to(tl.int32)
    newest = tl.where(write == 0, N_TAPS - 1, write - 1)
    steps = tl.minimum(steps, BLOCK).to(tl.int32)
    renew = live & ((slot == 0) | (steps == 0))
    channel = group * GROUP + tl.arange(0, GROUP)
    shifts = recent + far[:, None] * (2 * BLOCK * D) + channel[None, :]
    here = shifts + BLOCK * D
    values = ring + far[:, None] * (N_TAPS * D) + channel[None, :]
    if tl.max(renew.to(tl.int32), 0) > 0:
        move_states(
            diagonal, here, a, b, c, far, D, channel, steps, slot, renew,
            MODES, ROWS, GROUP, BLOCK, SPLIT, MODES_AT_ONCE,
        )  # fmt: skip
        shift_ahead(
            values, shifts, taps, D, channel, newest, slot, renew,
            N_TAPS, ROWS, GROUP, BLOCK, TAPS_AT_ONCE,
        )  # fmt: skip
        tl.debug_barrier()  # other threads may read what these have written

    seen = tl.minimum(steps, slot)
    mask = live[:, None]
    s = tl.load(shifts + slot[:, None] * D, mask=mask, other=0.0)
    y = tl.load(here + slot[:, None] * D, mask=mask, other=0.0)
    for j in tl.static_range(1, BLOCK):
        use = mask & (j <= seen)[:, None]
        place = write - j
        place = tl.where(place < 0, place + N_TAPS, place)
        old = tl.load(values + place[:, None] * D, mask=use, other=0.0).to(tl.float32)
        s += tl.load(taps + j * D + channel)[None, :] * old
        w = tl.load(here + (slot[:, None] - j) * D, mask=use, other=0.0)
        y += tl.load(response + j * D + channel)[None, :] * w
    now_k = tl.load(taps + channel)[None, :]
    now_w = tl.load(response + channel)[None, :]
    wait_for_inputs(first, EARLY)
    gate = tl.load(q + far[:, None] * q_stride + channel[None, :], mask=mask, other=0.0)
    new = tl.load(k + far[:, None] * k_stride + channel[None, :], mask=mask, other=0.0)
    value = tl.load(v + far[:, None] * v_stride + channel[None, :], mask=mask, other=0.0)
    w = (s + now_k * new.to(tl.float32)) * value.to(tl.float32)
    y += now_w * w
    out = o + far[:, None] * D + channel[None, :]
    tl.store(out, (gate.to(tl.float32) * y).to(o.dtype.element_ty), mask=mask)
    tl.store(values + write[:, None] * D, new, mask=mask)
    tl.store(here + slot[:, None] * D, w, mask=mask)


@dataclass(frozen=True)
class LaggingSize:
    """Sizes of the kernel; `h3lm.bench.generate_tune` times them.

    Attributes:
        rows: Rows of a program.
        warps: Warps of a program.
        split: Parts of the modes that it takes at the same time.
        modes: Modes that each takes at once.
        taps: Taps that it takes at once.
        registers: Of a thread at most; as many as it wants if 0.
        first: Whether the next kernel may start before this one waits.
    """

    rows: int = 4
    warps: int = 4
    split: int = 1
    modes: int = 4
    taps: int = 8
    registers: int = 0
    first: bool = False


SIZES = {  # by `rows_class`; the last for more
    1: LaggingSize(rows=1, split=4),
    16: LaggingSize(),
    64: LaggingSize(),
}


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
    """Launch the kernel; see `flashconv.h3_step_in_place` for shapes; one of `SIZES` if None.

    q, k and v have contiguous channels and any row stride; in all else channels lie innermost.
    """
    B, D = q.shape
    modes, n_taps, groups = a.shape[1], taps.shape[1], D // GROUP
    size = size or SIZES[rows_class(B)]
    rows = min(size.rows, triton.next_power_of_2(B))
    split = math.gcd(size.split, modes)
    limit = {"maxnreg": size.registers} if size.registers else {}
    o = torch.empty((B, D), dtype=q.dtype, device=q.device)
    h3_step_kernel[(groups * triton.cdiv(B, rows),)](
        q, k, v, o, ring, position, diagonal, recent, taps, a, b, c, response, B, D, groups,
        q.stride(0), k.stride(0), v.stride(0),
        N_TAPS=n_taps, MODES=modes, ROWS=rows, GROUP=GROUP, BLOCK=BLOCK, SPLIT=split,
        MODES_AT_ONCE=math.gcd(size.modes, modes // split), TAPS_AT_ONCE=size.taps,
        # as many threads as channels: two with the same would write what the other still reads
        num_warps=min(size.warps, rows * split), **limit, **launch_options(early, size.first),
    )  # fmt: skip
    return o
