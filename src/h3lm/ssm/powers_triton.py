# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Filters of diagonal-plus-low-rank systems, and their gradients, from powers of the dense step.

In real states (Re x, Im x) a system is a matrix A of N x N, and with d = 1 / (1 - dt lambda / 2),
D the matrix of a product with d, p = (Re P, Im P),

    M = (1 - dt/2 A)^-1 = D - dt (D p) (D^T p)^T / (1 + dt sum_n Re d_n |P_n|^2)
    Abar = 2 M - 1,   Bbar = dt M B

A filter of L = S T taps is the product of two narrow matrices, K[T a + b] = (c Abar^b) (Abar^(T a)
Bbar), whose rows are made by doubling: rows 2^j to 2^(j+1) are those before them times Abar^(2^j),
which is squared from turn to turn. So a long filter costs little more than a short one, and all
of it are products for the matrix units of float64. Abar is a contraction: A + A* <= 0, so that
rounding does not grow from power to power.

Source: Gu et al. 2022 (S4), Appendix C.1 and C.2, for the discrete system.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP = tl.constexpr(16)  # of a product's depth: the matrix units' own
STAGES = tl.constexpr(4)  # of its loads, which go through the second cache


@triton.jit
def load_state(pointer, part, n, modes):
    """A complex vector as a real state, float64; 0 where there is no mode."""
    return tl.load(pointer + 2 * n + part, n < modes, 0.0).to(tl.float64)


@triton.jit
def inverse(eigenvalues, P, dt, h, modes, MODES: tl.constexpr):
    """M, [N, N]."""
    i = tl.arange(0, 2 * MODES)
    part, n = i // MODES, i % MODES
    l_re = tl.load(eigenvalues + 2 * (h * modes + n), n < modes, 0.0).to(tl.float64)
    l_im = tl.load(eigenvalues + 2 * (h * modes + n) + 1, n < modes, 0.0).to(tl.float64)
    p_re = tl.load(P + 2 * (h * modes + n), n < modes, 0.0).to(tl.float64)
    p_im = tl.load(P + 2 * (h * modes + n) + 1, n < modes, 0.0).to(tl.float64)
    x_re, x_im = 1.0 - 0.5 * dt * l_re, -0.5 * dt * l_im
    factor = 1.0 / (x_re * x_re + x_im * x_im)
    d_re, d_im = tl.where(n < modes, x_re * factor, 0.0), tl.where(n < modes, -x_im * factor, 0.0)
    # each mode stands in both halves
    low = dt / (1.0 + 0.5 * dt * tl.sum(d_re * (p_re * p_re + p_im * p_im), 0))
    right = tl.where(part == 0, d_re * p_re - d_im * p_im, d_re * p_im + d_im * p_re)
    left = tl.where(part == 0, d_re * p_re + d_im * p_im, d_re * p_im - d_im * p_re)
    turn = tl.where(part == 0, -d_im, d_im)[:, None]
    same = n[:, None] == n[None, :]
    D = tl.where(same, tl.where(part[:, None] == part[None, :], d_re[:, None], turn), 0.0)
    return D - (low * right)[:, None] * left[None, :]


@triton.jit
def product(
    x, x_row, x_column, y, y_row, y_column, rows, depth, columns, total,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """X Y added to a total, of matrices in memory: operands in registers would push out all else.

    X is `rows` x `depth` and Y `depth` x `columns`, at most as large as the tiles.
    """
    i, n, m = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, STEP)
    left, right = x + i[:, None] * x_row, y + n[None, :] * y_column
    top, side = (i < rows)[:, None], (n < columns)[None, :]
    if DEPTH == STEP:
        a = tl.load(left + m[None, :] * x_column, top & (m < depth)[None, :], 0.0)
        b = tl.load(right + m[:, None] * y_row, (m < depth)[:, None] & side, 0.0)
        total = tl.dot(a, b, total, out_dtype=tl.float64)
    else:
        for start in tl.range(0, DEPTH, STEP, num_stages=STAGES):
            k = start + m
            a = tl.load(left + k[None, :] * x_column, top & (k < depth)[None, :], 0.0)
            b = tl.load(right + k[:, None] * y_row, (k < depth)[:, None] & side, 0.0)
            total = tl.dot(a, b, total, out_dtype=tl.float64)
    return total


@triton.jit
def square_product(x, x_row, x_column, y, y_row, y_column, total, N: tl.constexpr):
    """`product` of two matrices [N, N]."""
    return product(x, x_row, x_column, y, y_row, y_column, N, N, N, total, N, N, N)


@triton.jit
def tile_at(ROWS: tl.constexpr, N: tl.constexpr):
    """Offsets of a contiguous tile [ROWS, N]."""
    return tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def double(
    table, count, power, row, column, N: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Append to the first `count` rows of a table their products with a matrix of these strides."""
    at = tile_at(TILE, N)
    for start in range(0, count, TILE):
        mask = (start + tl.arange(0, TILE) < count)[:, None]
        rows = product(
            table + start * N, N, 1, power, row, column, count - start, N, N,
            tl.zeros((TILE, N), tl.float64), TILE, N, N,
        )  # fmt: skip
        tl.store(table + (count + start) * N + at, rows, mask)


@triton.jit(do_not_specialize=["systems", "modes", "left_turns", "right_turns", "slots"])
def powers_kernel(
    eigenvalues, P, B, C, dts, powers, left, right, systems, modes, left_turns, right_turns, slots,
    READOUTS: tl.constexpr, MODES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Both tables of a system: c Abar^b of all read-outs (left) and Abar^(T a) Bbar (right).

    And the powers that they are made with, (H, slots, N, N): all, or by turns in two slots.
    """
    N: tl.constexpr = 2 * MODES
    h = tl.program_id(0)
    i = tl.arange(0, N)
    part, n = i // MODES, i % MODES
    dt = tl.load(dts + h).to(tl.float64)
    M = inverse(eigenvalues, P, dt, h, modes, MODES)
    right += h.to(tl.int64) * N << right_turns
    left += h.to(tl.int64) * (READOUTS * N) << left_turns
    powers += h.to(tl.int64) * (N * N) * slots
    b = load_state(B + 2 * h * modes, part, n, modes)
    tl.store(right + i, dt * tl.sum(M * b[None, :], 1))
    for k in tl.static_range(READOUTS):
        c = load_state(C + 2 * (k * systems + h) * modes, part, n, modes)
        tl.store(left + k * N + i, tl.where(part == 0, 2.0 * c, -2.0 * c))
    one = (i[:, None] == i[None, :]) & (n < modes)[:, None]
    tl.store(powers + tile_at(N, N), 2.0 * M - tl.where(one, 1.0, 0.0))
    for turn in range(left_turns + right_turns):
        tl.debug_barrier()  # what was stored is loaded by other threads
        power = powers + turn % slots * (N * N)
        if turn < left_turns:
            double(left, READOUTS << turn, power, N, 1, N, TILE)
        else:
            double(right, 1 << (turn - left_turns), power, 1, N, N, TILE)
        if turn + 1 < left_turns + right_turns:
            square = square_product(power, N, 1, power, N, 1, tl.zeros((N, N), tl.float64), N)
            tl.store(powers + (turn + 1) % slots * (N * N) + tile_at(N, N), square)


@triton.jit(do_not_specialize=["systems", "L", "left_turns", "right_turns"])
def filters_kernel(
    left, right, skip, filters, systems, L, left_turns, right_turns,
    READOUTS: tl.constexpr, N: tl.constexpr, DELAYED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """K[T a + b] for some a and b; the skip at lag 0 of the first, the second a lag later."""
    h = tl.program_id(0)
    first_a, first_b = tl.program_id(1) * TILE, tl.program_id(2) * TILE
    a, b = first_a + tl.arange(0, TILE), first_b + tl.arange(0, TILE)
    S, T = 1 << right_turns, 1 << left_turns
    right += (h.to(tl.int64) * S + first_a) * N
    left += (h.to(tl.int64) * T + first_b) * (READOUTS * N)
    lag = (a << left_turns)[:, None] + b[None, :]
    inside = (a < S)[:, None] & (b < T)[None, :] & (lag < L)
    for k in tl.static_range(READOUTS):
        taps = product(
            right, N, 1, left + k * N, 1, READOUTS * N, S - first_a, N, T - first_b,
            tl.zeros((TILE, TILE), tl.float64), TILE, N, TILE,
        )  # fmt: skip
        to = filters + (k * systems + h).to(tl.int64) * L
        if k == 0 and skip is not None:
            taps += tl.where(lag == 0, tl.load(skip + h).to(tl.float64), 0.0)
        if k == 1 and DELAYED:
            tl.store(to + lag, taps * 0.0, inside & (lag == 0))
            tl.store(to + lag + 1, taps.to(tl.float32), inside & (lag + 1 < L))
        else:
            tl.store(to + lag, taps.to(tl.float32), inside)


@triton.jit
def load_gradient(grad, row, k, lag, inside, L, DELAYED: tl.constexpr):
    """The gradient of K[lag] of a read-out, float64."""
    if DELAYED:
        lag += k
    return tl.load(grad + row * L + lag, inside & (lag < L), 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["systems", "L", "left_turns", "right_turns"])
def tables_backward_kernel(
    grad, left, right, dleft, dright, systems, L, left_turns, right_turns,
    READOUTS: tl.constexpr, N: tl.constexpr, DELAYED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of some rows of a table, given those of the filters."""
    h = tl.program_id(0).to(tl.int64)
    i, m, n = tl.arange(0, TILE), tl.arange(0, STEP), tl.arange(0, N)
    S, T = 1 << right_turns, 1 << left_turns
    right_tiles = (S + TILE - 1) // TILE
    right += h * (S * N)
    dright += h * (S * N)
    left += h * (READOUTS * T * N)
    dleft += h * (READOUTS * T * N)
    total = tl.zeros((TILE, N), tl.float64)
    if tl.program_id(1) < right_tiles:
        a = tl.program_id(1) * TILE + i
        for start in range(0, T, STEP):
            b = start + m
            lag = (a << left_turns)[:, None] + b[None, :]
            inside = (a < S)[:, None] & (b < T)[None, :]
            for k in tl.static_range(READOUTS):
                g = load_gradient(grad, k * systems + h, k, lag, inside, L, DELAYED)
                at = left + (b * READOUTS + k)[:, None] * N + n[None, :]
                rows = tl.load(at, (b < T)[:, None], 0.0)
                total = tl.dot(g, rows, total, out_dtype=tl.float64)
        tl.store(dright + a[:, None] * N + n[None, :], total, (a < S)[:, None])
    else:
        tile = tl.program_id(1) - right_tiles
        k = tile % READOUTS
        b = tile // READOUTS * TILE + i
        for start in range(0, S, STEP):
            a = start + m
            lag = (a << left_turns)[None, :] + b[:, None]
            inside = (a < S)[None, :] & (b < T)[:, None]
            g = load_gradient(grad, k * systems + h, k, lag, inside, L, DELAYED)
            states = tl.load(right + a[:, None] * N + n[None, :], (a < S)[:, None], 0.0)
            total = tl.dot(g, states, total, out_dtype=tl.float64)
        tl.store(dleft + (b * READOUTS + k)[:, None] * N + n[None, :], total, (b < T)[:, None])


@triton.jit
def double_backward(
    table, dtable, count, power, row, column, dpower, TURNED: tl.constexpr,
    N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """From gradients of the rows that `double` appended to those of the rows before them.

    TURNED: the matrix was the transpose of a power. Returns the gradient of the power.
    """
    at = tile_at(TILE, N)
    for start in range(0, count, TILE):
        left = count - start
        rows, drows, g = table + start * N, dtable + start * N, dtable + (count + start) * N
        mask = (tl.arange(0, TILE) < left)[:, None]
        back = tl.load(drows + at, mask, 0.0)
        back = product(g, N, 1, power, column, row, left, N, N, back, TILE, N, N)
        if TURNED:
            dpower = product(g, 1, N, rows, N, 1, N, left, N, dpower, N, TILE, N)
        else:
            dpower = product(rows, 1, N, g, N, 1, N, left, N, dpower, N, TILE, N)
        tl.store(drows + at, back, mask)
    return dpower


@triton.jit(do_not_specialize=["left_turns", "right_turns"])
def powers_backward_kernel(
    powers, left, right, dleft, dright, dpowers, left_turns, right_turns,
    READOUTS: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """From gradients of both tables to those of their first rows and of Abar, (H, 2, N, N)."""
    h = tl.program_id(0).to(tl.int64)
    right += h * N << right_turns
    dright += h * N << right_turns
    left += h * (READOUTS * N) << left_turns
    dleft += h * (READOUTS * N) << left_turns
    turns = left_turns + right_turns
    powers += h * (N * N) * turns
    dpowers += h * (2 * N * N)
    dpower = tl.zeros((N, N), tl.float64)
    for done in range(turns):
        turn = turns - 1 - done
        power = powers + turn * (N * N)
        if done > 0:  # the next power is this one's square
            tl.store(dpowers + tile_at(N, N), dpower)
            tl.debug_barrier()
            dpower = tl.zeros((N, N), tl.float64)
            dpower = square_product(dpowers, N, 1, power, 1, N, dpower, N)
            dpower = square_product(power, 1, N, dpowers, N, 1, dpower, N)
        if turn < left_turns:
            dpower = double_backward(
                left, dleft, READOUTS << turn, power, N, 1, dpower, False, N, TILE
            )
        else:
            count = 1 << (turn - left_turns)
            dpower = double_backward(right, dright, count, power, 1, N, dpower, True, N, TILE)
        tl.debug_barrier()
    tl.store(dpowers + tile_at(N, N), dpower)


@triton.jit(do_not_specialize=["systems", "modes", "left_turns", "right_turns"])
def parameters_kernel(
    eigenvalues, P, B, dts, dleft, dright, dpowers, dl, dP, dB, dC, ddt,
    systems, modes, left_turns, right_turns, READOUTS: tl.constexpr, MODES: tl.constexpr,
):  # fmt: skip
    """From gradients of Abar, Bbar and read-outs to those of a system's parameters.

    What `dpowers` has beside the gradient of Abar is room for another matrix.
    """
    N: tl.constexpr = 2 * MODES
    h = tl.program_id(0)
    i = tl.arange(0, N)
    part, n = i // MODES, i % MODES
    valid = n < modes
    dright += h.to(tl.int64) * N << right_turns
    dleft += h.to(tl.int64) * (READOUTS * N) << left_turns
    for k in tl.static_range(READOUTS):
        g = tl.load(dleft + k * N + i)
        to = dC + 2 * ((k * systems + h) * modes + n) + part
        tl.store(to, tl.where(part == 0, 2.0 * g, -2.0 * g).to(tl.float32), valid)
    first = dpowers + h.to(tl.int64) * (2 * N * N)
    second = first + N * N
    dt = tl.load(dts + h).to(tl.float64)
    M = inverse(eigenvalues, P, dt, h, modes, MODES)
    tl.store(second + tile_at(N, N), M)
    at = 2 * (h * modes + n) + part
    g = tl.load(dright + i)
    b = load_state(B + 2 * h * modes, part, n, modes)
    tl.store(dB + at, (dt * tl.sum(M * g[:, None], 0)).to(tl.float32), valid)
    along_dt = tl.sum(g * tl.sum(M * b[None, :], 1), 0)
    dM = 2.0 * tl.load(first + tile_at(N, N)) + dt * g[:, None] * b[None, :]
    tl.debug_barrier()
    # dM/ddt = M A M / 2 = (M M - M) / dt
    moved = square_product(second, N, 1, second, N, 1, -M, N)
    along_dt += tl.sum(tl.sum(dM * moved, 1), 0) / dt
    tl.store(ddt + h, along_dt.to(tl.float32))
    # dA = dt / 2 M^T dM M^T
    tl.store(first + tile_at(N, N), dM)
    tl.debug_barrier()
    turned = square_product(second, 1, N, first, N, 1, tl.zeros((N, N), tl.float64), N)
    tl.debug_barrier()
    tl.store(first + tile_at(N, N), turned)
    tl.debug_barrier()
    dA = square_product(first, N, 1, second, 1, N, tl.zeros((N, N), tl.float64), N) * (0.5 * dt)
    same = n[:, None] == n[None, :]
    along = tl.sum(tl.where(same & (part[:, None] == part[None, :]), dA, 0.0), 1)
    across = tl.sum(tl.where(same & (part[:, None] != part[None, :]), dA, 0.0), 1)
    across = tl.where(part == 0, -across, across)
    mode = tl.arange(0, MODES)
    to = dl + 2 * (h * modes + mode)
    tl.store(to, tl.sum(tl.reshape(along, (2, MODES)), 0).to(tl.float32), mode < modes)
    tl.store(to + 1, tl.sum(tl.reshape(across, (2, MODES)), 0).to(tl.float32), mode < modes)
    p = load_state(P + 2 * h * modes, part, n, modes)
    dp = tl.sum(dA * p[None, :], 1) + tl.sum(dA * p[:, None], 0)
    tl.store(dP + at, (-2.0 * dp).to(tl.float32), valid)


def padded(modes: int) -> int:
    """Modes as the kernels see them: edges of products are at least 16."""
    return max(8, triton.next_power_of_2(modes))


class Launch(NamedTuple):
    """Rows of a product and warps, of each kernel."""

    powers: tuple[int, int]
    filters: tuple[int, int]
    tables: tuple[int, int]
    backward: tuple[int, int]
    parameters: int


LAUNCHES = {  # by modes
    8: Launch((16, 1), (16, 1), (16, 1), (16, 1), 1),
    16: Launch((32, 4), (32, 4), (32, 4), (32, 4), 4),
    32: Launch((64, 4), (32, 4), (32, 4), (32, 4), 8),
    64: Launch((32, 16), (32, 8), (32, 8), (32, 16), 16),
}


class Shape(NamedTuple):
    """How a filter is cut.

    Attributes:
        left_turns: T is 2 to this.
        right_turns: S is 2 to this.
        modes: N / 2 as the kernels see it, at least 8.
    """

    left_turns: int
    right_turns: int
    modes: int

    @classmethod
    def of(cls, modes: int, length: int) -> "Shape":
        """For filters of a length."""
        turns = (length - 1).bit_length()
        return cls(turns - turns // 2, turns // 2, padded(modes))


class Tables(NamedTuple):
    """What filters are made of, float64.

    Attributes:
        left: c Abar^b, (H, T, read-outs, N).
        right: Abar^(T a) Bbar, (H, S, N).
        powers: Those of Abar, (H, turns, N, N); or (H, 2, N, N), the last of them.
    """

    left: Tensor
    right: Tensor
    powers: Tensor


def make(
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    length: int,
    skip: Tensor | None = None,
    delayed: bool = False,
) -> Tensor:
    """Filters (read-outs, H, L), float32.

    Args:
        eigenvalues, P, B: (H, N/2, 2), float32, contiguous.
        C: (read-outs, H, N/2, 2), one or two of them.
        dt: (H,).
        length: L, at least 1.
        skip: (H,), added at lag 0 of the first read-out.
        delayed: Whether the second read-out's filter starts one lag later.
    """
    readouts, H, modes, _ = C.shape
    shape = Shape.of(modes, length)
    tables = _tables(eigenvalues, P, B, C, dt, shape, keep=False)
    filters = torch.empty((readouts, H, length), dtype=torch.float32, device=dt.device)
    tile, warps = LAUNCHES[shape.modes].filters
    tiles = [triton.cdiv(1 << turns, tile) for turns in (shape.right_turns, shape.left_turns)]
    filters_kernel[(H, *tiles)](
        tables.left, tables.right, skip, filters, H, length, shape.left_turns, shape.right_turns,
        READOUTS=readouts, N=2 * shape.modes, DELAYED=delayed, TILE=tile, num_warps=warps,
    )  # fmt: skip
    return filters


def make_backward(
    grad: Tensor,
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    delayed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of eigenvalues, P, B, C and dt, given that of the filters."""
    readouts, H, modes, _ = C.shape
    length = grad.shape[-1]
    shape = Shape.of(modes, length)
    tables = _tables(eigenvalues, P, B, C, dt, shape, keep=True)  # made anew: they are large
    dleft, dright = torch.empty_like(tables.left), torch.empty_like(tables.right)
    N, launch = 2 * shape.modes, LAUNCHES[shape.modes]
    tile, warps = launch.tables
    right, left = (triton.cdiv(1 << n, tile) for n in (shape.right_turns, shape.left_turns))
    tables_backward_kernel[(H, right + readouts * left)](
        grad.contiguous(), tables.left, tables.right, dleft, dright, H, length,
        shape.left_turns, shape.right_turns,
        READOUTS=readouts, N=N, DELAYED=delayed, TILE=tile, num_warps=warps,
    )  # fmt: skip
    dl, dP, dB, dC = (torch.empty_like(x) for x in (eigenvalues, P, B, C))
    ddt, dpowers = torch.empty_like(dt), tables.powers.new_empty(H, 2, N, N)
    tile, warps = launch.backward
    powers_backward_kernel[(H,)](
        tables.powers, tables.left, tables.right, dleft, dright, dpowers,
        shape.left_turns, shape.right_turns,
        READOUTS=readouts, N=N, TILE=tile, num_warps=warps,
    )  # fmt: skip
    parameters_kernel[(H,)](
        eigenvalues, P, B, dt, dleft, dright, dpowers, dl, dP, dB, dC, ddt, H, modes,
        shape.left_turns, shape.right_turns,
        READOUTS=readouts, MODES=shape.modes, num_warps=launch.parameters,
    )  # fmt: skip
    return dl, dP, dB, dC, ddt


def _tables(
    eigenvalues: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, shape: Shape, *, keep: bool
) -> Tables:
    readouts, H, modes, _ = C.shape
    N, turns = 2 * shape.modes, shape.left_turns + shape.right_turns

    def empty(*sizes: int) -> Tensor:
        return dt.new_empty(H, *sizes, dtype=torch.float64)

    left, right = empty(1 << shape.left_turns, readouts, N), empty(1 << shape.right_turns, N)
    tables = Tables(left, right, empty(max(turns, 1) if keep else 2, N, N))
    tile, warps = LAUNCHES[shape.modes].powers
    powers_kernel[(H,)](
        eigenvalues, P, B, C, dt, tables.powers, left, right, H, modes,
        shape.left_turns, shape.right_turns, tables.powers.shape[1],
        READOUTS=readouts, MODES=shape.modes, TILE=tile, num_warps=warps,
    )  # fmt: skip
    return tables
