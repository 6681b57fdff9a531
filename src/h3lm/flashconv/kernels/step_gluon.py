"""One token of the H3 core in Gluon, for heads of one channel, 32 modes and 64 taps.

The mathematics is that of `step_triton`. Eight threads share a channel: each has four of its modes
and eight slots of its ring, so a row costs a thread three loads and two stores of 16 bytes, and
nothing but two sums crosses threads, within a warp. A program walks over rows with its channels'
operators in registers; the states of the next AHEAD rows are on their way to registers, those of
the first ones before q, k and v are there. There is no barrier and no shared memory.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from h3lm.flashconv.kernels.overlap import wait_for_inputs

TAPS, MODES, PER_WARP = 64, 32, 4  # of a channel, and channels of a warp


@gluon.jit
def no_rows():
    """What is on its way at first."""
    return ()


@gluon.jit
def load_state(ring, diagonal, position, row, B, D, at):
    """Ring, diagonal state and next slot of the program's channels in a row."""
    last = gl.minimum(row, B - 1)
    there = last.to(gl.int64) * D * 64 + at
    write = (gl.load(position + last) % 64).to(gl.int32)
    return gl.load(ring + there), gl.load(diagonal + there), write


@gluon.jit
def load_inputs(q, k, v, row, B, channel, q_stride, k_stride, v_stride):
    """q, k and v of the program's channels in a row."""
    far = gl.minimum(row, B - 1).to(gl.int64)
    return (
        gl.load(q + far * q_stride + channel), gl.load(k + far * k_stride + channel),
        gl.load(v + far * v_stride + channel),
    )  # fmt: skip


@gluon.jit
def load_taps(taps, channel, slot, write):
    """Taps [channels, slots] in the order of a ring that goes on at slot `write`."""
    age = write - slot
    age = gl.where(age < 0, age + 64, age)
    return gl.load(taps + channel[:, None] * 64 + age[None, :])


@gluon.jit
def load_pairs(pointer, at, CHANNELS: gl.constexpr):
    """Complex numbers of each channel, real and imaginary parts [channels, modes]."""
    return gl.split(gl.reshape(gl.load(pointer + at), (CHANNELS, 32, 2)))


@gluon.jit(do_not_specialize=["first"])
def h3_step_kernel(
    q, k, v, o, ring, position, diagonal, taps, a, b, c, skip, B, D, q_stride, k_stride, v_stride,
    first, ROWS: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Advance 4 WARPS channels of ROWS rows by a token; EARLY as in `step_triton`."""
    CHANNELS: gl.constexpr = 4 * WARPS
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    channel = gl.program_id(0) * CHANNELS + gl.arange(0, CHANNELS, gl.SliceLayout(1, tile))
    slot = gl.arange(0, 64, gl.SliceLayout(0, tile))
    at = channel[:, None] * 64 + slot[None, :]
    begin = gl.program_id(1) * ROWS
    coming = no_rows()
    for i in gl.static_range(AHEAD):
        coming += (load_state(ring, diagonal, position, begin + i, B, D, at),)
    kept_write = coming[0][2]
    kept = load_taps(taps, channel, slot, kept_write)
    a_re, a_im = load_pairs(a, at, CHANNELS)
    b_re, b_im = load_pairs(b, at, CHANNELS)
    c_re, c_im = load_pairs(c, at, CHANNELS)
    direct = gl.load(skip + channel)
    wait_for_inputs(first, EARLY)
    inputs = no_rows()
    for i in gl.static_range(min(2, ROWS)):
        inputs += (load_inputs(q, k, v, begin + i, B, channel, q_stride, k_stride, v_stride),)
    for i in gl.static_range(ROWS):
        row = begin + i
        window, old, write = coming[0]
        coming = coming[1:]
        if i + AHEAD < ROWS:
            coming += (load_state(ring, diagonal, position, row + AHEAD, B, D, at),)
        gate, new, value = inputs[0]
        inputs = inputs[1:]
        if i + 2 < ROWS:
            inputs += (load_inputs(q, k, v, row + 2, B, channel, q_stride, k_stride, v_stride),)
        if row < B:
            far = row.to(gl.int64)
            weight = kept
            if write != kept_write:
                weight = load_taps(taps, channel, slot, write)
            # the oldest value makes room for the new one
            window = gl.where((slot == write)[None, :], new[:, None], window)
            gl.store(ring + (far * D + channel) * 64 + write, new)
            w = gl.sum(window.to(gl.float32) * weight, 1) * value.to(gl.float32)
            re, im = gl.split(gl.reshape(old, (CHANNELS, 32, 2)))
            wide = gl.convert_layout(w, gl.SliceLayout(1, re.type.layout))[:, None]
            new_re = a_re * re - a_im * im + b_re * wide
            new_im = a_re * im + a_im * re + b_im * wide
            joined = gl.reshape(gl.join(new_re, new_im), (CHANNELS, 64))
            gl.store(diagonal + far * D * 64 + at, gl.convert_layout(joined, tile))
            y = gl.sum(c_re * new_re - c_im * new_im, 1)
            y = 2 * gl.convert_layout(y, gl.SliceLayout(1, tile)) + direct * w
            gl.store(o + far * D + channel, (gate.to(gl.float32) * y).to(o.dtype.element_ty))


def takes(head_dim: int, channels: int, modes: int, n_taps: int, warps: int) -> bool:
    """Whether the kernel is made for an SSM."""
    return (head_dim, modes, n_taps) == (1, MODES, TAPS) and channels % (PER_WARP * warps) == 0


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    ring: Tensor,
    position: Tensor,
    diagonal: Tensor,
    rows: int,
    ahead: int,
    warps: int,
    options: dict[str, Any],
) -> Tensor:
    """Launch the kernel; arguments as of `step_triton.step`, options of a launch."""
    B, D = q.shape
    o = torch.empty((B, D), dtype=q.dtype, device=q.device)
    h3_step_kernel[(D // (PER_WARP * warps), -(-B // rows))](
        q, k, v, o, ring, position, diagonal, taps, a, b, c, skip,
        B, D, q.stride(0), k.stride(0), v.stride(0),
        ROWS=rows, AHEAD=min(ahead, rows), WARPS=warps, num_warps=warps, **options,
    )  # fmt: skip
    return o
