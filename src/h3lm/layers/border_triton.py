# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Kernels at the border between (B, L, D) and (B, D, L): batch norm going in, a gate going out.

Each reads and writes every element once, and turns a tile while it has it. A program takes a tile
of positions of one row and of channels. Sums over positions go through one number for each program
and channel, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.flashconv.kernels.launch import multiprocessors

POSITIONS, CHANNELS = 64, 32  # of a tile
PROGRAMS = 8  # for each multiprocessor, of those that walk over positions


@triton.jit
def place(tile, tiles_of_row, L, lengths, POSITIONS: tl.constexpr):
    """Row and positions of a tile, and which of them count."""
    row = (tile // tiles_of_row).to(tl.int64)
    position = tile % tiles_of_row * POSITIONS + tl.arange(0, POSITIONS)
    length = L
    if lengths is not None:
        length = tl.load(lengths + row)
    return row, position, position < length


@triton.jit
def load_channels(pointer, channel, inside):
    """A number for each channel, [1, C], float32."""
    return tl.load(pointer + channel, inside, 0.0).to(tl.float32)[None, :]


@triton.jit
def sums_kernel(
    x, lengths, sums, L, D, tiles_of_row, tiles,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of x - pilot and of its square over some tiles; the pilot is the first position."""
    program = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    pilot = load_channels(x, channel, inside)
    first = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    second = first
    for tile in range(program, tiles, tl.num_programs(0)):
        row, position, counts = place(tile, tiles_of_row, L, lengths, POSITIONS)
        mask = counts[:, None] & inside[None, :]
        at = (row * L + position)[:, None] * D + channel[None, :]
        value = tl.where(mask, tl.load(x + at, mask, 0.0) - pilot, 0.0)
        first += value
        second += value * value
    sums += program * 2 * D + channel
    tl.store(sums, tl.sum(first, 0), inside)
    tl.store(sums + D, tl.sum(second, 0), inside)


@triton.jit
def statistics_kernel(
    x, lengths, sums, statistics, B, L, D, programs,
    ROWS: tl.constexpr, PART: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean, variance, unbiased variance and count from the sums, (4, D)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    count = (B * L).to(tl.float64)
    if lengths is not None:
        row = tl.arange(0, ROWS)
        count = tl.maximum(tl.sum(tl.load(lengths + row, row < B, 0), 0), 1).to(tl.float64)
    first = tl.zeros((CHANNELS,), tl.float64)
    second = first
    for start in range(0, programs, PART):
        program = start + tl.arange(0, PART)
        mask = (program < programs)[:, None] & inside[None, :]
        at = sums + program[:, None] * 2 * D + channel[None, :]
        first += tl.sum(tl.load(at, mask, 0.0).to(tl.float64), 0)
        second += tl.sum(tl.load(at + D, mask, 0.0).to(tl.float64), 0)
    shift = first / count
    variance = tl.maximum(second / count - shift * shift, 0.0)
    mean = tl.load(x + channel, inside, 0.0).to(tl.float64) + shift
    statistics += channel
    tl.store(statistics, mean.to(tl.float32), inside)
    tl.store(statistics + D, variance.to(tl.float32), inside)
    unbiased = variance * count / tl.maximum(count - 1.0, 1.0)
    tl.store(statistics + 2 * D, unbiased.to(tl.float32), inside)
    tl.store(statistics + 3 * D, tl.zeros_like(shift).to(tl.float32) + count.to(tl.float32), inside)


@triton.jit
def normalise_kernel(
    x, lengths, statistics, weight, bias, y, y_row, y_position, y_channel, L, D, tiles_of_row, eps,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write y = (x - mean) / sqrt(variance + eps) weight + bias; 0 at padding."""
    row, position, counts = place(tl.program_id(0), tiles_of_row, L, lengths, POSITIONS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    mask = counts[:, None] & inside[None, :]
    value = tl.load(x + (row * L + position)[:, None] * D + channel[None, :], mask, 0.0)
    scale = tl.rsqrt(load_channels(statistics + D, channel, inside) + eps)
    scale *= load_channels(weight, channel, inside)
    value = (value - load_channels(statistics, channel, inside)) * scale
    value = tl.where(mask, value + load_channels(bias, channel, inside), 0.0)
    to = y + row * y_row + position[:, None] * y_position + channel[None, :] * y_channel
    tl.store(to, value.to(y.dtype.element_ty), (position < L)[:, None] & inside[None, :])


@triton.jit
def norm_sums_kernel(
    dy, x, lengths, statistics, sums, dy_row, dy_position, dy_channel, L, D, tiles_of_row, tiles,
    eps, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of dy and of dy times the normalised x over some tiles."""
    program = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    mean = load_channels(statistics, channel, inside)
    scale = tl.rsqrt(load_channels(statistics + D, channel, inside) + eps)
    first = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    second = first
    for tile in range(program, tiles, tl.num_programs(0)):
        row, position, counts = place(tile, tiles_of_row, L, lengths, POSITIONS)
        mask = counts[:, None] & inside[None, :]
        value = tl.load(x + (row * L + position)[:, None] * D + channel[None, :], mask, 0.0)
        at = dy + row * dy_row + position[:, None] * dy_position + channel[None, :] * dy_channel
        # a mask that ends at L lets 16 bytes be loaded at once
        g = tl.load(at, (position < L)[:, None] & inside[None, :], 0.0)
        g = tl.where(mask, g.to(tl.float32), 0.0)
        first += g
        second += g * (value - mean)
    sums += program * 2 * D + channel
    tl.store(sums, tl.sum(first, 0), inside)
    tl.store(sums + D, tl.sum(second * scale, 0), inside)


@triton.jit
def norm_backward_kernel(
    dy, residual, x, lengths, statistics, weight, sums, dx, dy_row, dy_position, dy_channel, L, D,
    tiles_of_row, eps, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write dx = residual + weight / sqrt(variance + eps) (dy - (sum dy + x' sum(dy x')) / count).

    With x' the normalised x; the second term is 0 at padding.
    """
    row, position, counts = place(tl.program_id(0), tiles_of_row, L, lengths, POSITIONS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    mask = counts[:, None] & inside[None, :]
    at = (row * L + position)[:, None] * D + channel[None, :]
    scale = tl.rsqrt(load_channels(statistics + D, channel, inside) + eps)
    value = (tl.load(x + at, mask, 0.0) - load_channels(statistics, channel, inside)) * scale
    from_ = dy + row * dy_row + position[:, None] * dy_position + channel[None, :] * dy_channel
    to = (position < L)[:, None] & inside[None, :]
    g = tl.load(from_, to, 0.0).to(tl.float32)
    first = load_channels(sums, channel, inside)
    second = load_channels(sums + D, channel, inside)
    count = tl.maximum(load_channels(statistics + 3 * D, channel, inside), 1.0)
    g = (g - (first + value * second) / count) * (scale * load_channels(weight, channel, inside))
    g = tl.where(mask, g, 0.0)
    if residual is not None:
        g += tl.load(residual + at, to, 0.0)
    tl.store(dx + at, g, to)


@triton.jit
def load_gated(y, bias, row, position, channel, L, D, mask, inside):
    """Both halves of y with their bias, [P, C] float32."""
    at = y + row * 2 * D * L + channel[None, :].to(tl.int64) * L + position[:, None]
    a = tl.load(at, mask, 0.0).to(tl.float32)
    g = tl.load(at + D.to(tl.int64) * L, mask, 0.0).to(tl.float32)
    if bias is not None:
        a += load_channels(bias, channel, inside)
        g += load_channels(bias + D, channel, inside)
    return a, g


@triton.jit(do_not_specialize=["D"])
def gate_kernel(
    y, bias, residual, out, L, D, tiles_of_row, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Write out[b, l, d] = residual + a sigmoid(g), a and g halves of y + bias, (B, 2 D, L)."""
    row, position, counts = place(tl.program_id(0), tiles_of_row, L, None, POSITIONS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    mask = counts[:, None] & inside[None, :]
    a, g = load_gated(y, bias, row, position, channel, L, D, mask, inside)
    at = (row * L + position)[:, None] * D + channel[None, :]
    value = a * tl.sigmoid(g)
    if residual is not None:
        value += tl.load(residual + at, mask, 0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["D"])
def gate_backward_kernel(
    dout, y, bias, dy, sums, dout_row, dout_position, dout_channel, L, D, tiles_of_row,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of y; its sums over the positions of a tile, for that of the bias."""
    row, position, counts = place(tl.program_id(0), tiles_of_row, L, None, POSITIONS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    mask = counts[:, None] & inside[None, :]
    a, g = load_gated(y, bias, row, position, channel, L, D, mask, inside)
    at = row * dout_row + position[:, None] * dout_position + channel[None, :] * dout_channel
    grad = tl.load(dout + at, mask, 0.0).to(tl.float32)
    gate = tl.sigmoid(g)
    da = grad * gate
    dg = da * a * (1.0 - gate)
    to = dy + row * 2 * D * L + channel[None, :].to(tl.int64) * L + position[:, None]
    tl.store(to, da.to(dy.dtype.element_ty), mask)
    tl.store(to + D.to(tl.int64) * L, dg.to(dy.dtype.element_ty), mask)
    if sums is not None:
        sums += tl.program_id(0).to(tl.int64) * 2 * D + channel
        tl.store(sums, tl.sum(da, 0), inside)
        tl.store(sums + D, tl.sum(dg, 0), inside)


SIZES = {"POSITIONS": POSITIONS, "CHANNELS": CHANNELS, "num_warps": 4}


class _Grid:
    """How a tensor (B, L, D) is divided among programs."""

    def __init__(self, B: int, L: int, D: int, device: torch.device) -> None:
        self.of_row = triton.cdiv(L, POSITIONS)
        self.tiles = B * self.of_row
        self.across = triton.cdiv(D, CHANNELS)
        self.walks = min(self.tiles, triton.cdiv(PROGRAMS * multiprocessors(device), self.across))


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor | None, y: Tensor, eps: float
) -> Tensor:
    """Normalise x, (B, L, D) contiguous float32, into y of any strides; returns (4, D).

    Those are mean, variance, unbiased variance and count, float32.
    """
    B, L, D = x.shape
    grid = _Grid(B, L, D, x.device)
    sums = x.new_empty(grid.walks, 2, D)
    sums_kernel[(grid.walks, grid.across)](x, lengths, sums, L, D, grid.of_row, grid.tiles, **SIZES)
    statistics = x.new_empty(4, D)
    statistics_kernel[(grid.across,)](
        x, lengths, sums, statistics, B, L, D, grid.walks,
        ROWS=triton.next_power_of_2(B), PART=32, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    normalise_kernel[(grid.tiles, grid.across)](
        x, lengths, statistics, weight, bias, y, *y.stride(), L, D, grid.of_row, eps, **SIZES
    )
    return statistics


def batch_norm_backward(
    dy: Tensor,
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    lengths: Tensor | None,
    statistics: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; dy has any strides, what is added to dx those of x."""
    B, L, D = x.shape
    grid = _Grid(B, L, D, x.device)
    sums = x.new_empty(grid.walks, 2, D)
    norm_sums_kernel[(grid.walks, grid.across)](
        dy, x, lengths, statistics, sums, *dy.stride(), L, D, grid.of_row, grid.tiles, eps, **SIZES
    )
    total = sums.sum(0)
    dx = torch.empty_like(x)
    norm_backward_kernel[(grid.tiles, grid.across)](
        dy, residual, x, lengths, statistics, weight, total, dx, *dy.stride(), L, D,
        grid.of_row, eps, **SIZES,
    )  # fmt: skip
    return dx, total[1].clone(), total[0].clone()


def gate(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """(B, 2 D, L) to (B, L, D), both contiguous; as the residual, if there is one."""
    B, D, L = y.shape[0], y.shape[1] // 2, y.shape[2]
    grid = _Grid(B, L, D, y.device)
    out = (y if residual is None else residual).new_empty(B, L, D)
    gate_kernel[(grid.tiles, grid.across)](y, bias, residual, out, L, D, grid.of_row, **SIZES)
    return out


def gate_backward(dout: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the bias, which is empty where there is none."""
    B, L, D = dout.shape
    grid = _Grid(B, L, D, y.device)
    dy = torch.empty_like(y)
    sums = None if bias is None else y.new_empty(grid.tiles, 2 * D, dtype=torch.float32)
    gate_backward_kernel[(grid.tiles, grid.across)](
        dout, y, bias, dy, sums, *dout.stride(), L, D, grid.of_row, **SIZES
    )
    if sums is None or bias is None:
        return dy, y.new_empty(0)
    return dy, sums.sum(0).to(bias.dtype)
