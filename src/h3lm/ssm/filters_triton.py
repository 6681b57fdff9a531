# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Filters of diagonal-plus-low-rank systems, and their gradients, without a table of all nodes.

The generating function K(z) = sum_l K_l z^l is taken at L nodes on a circle of radius r < 1:

    K_l + r^L K_{l+L} + r^{2L} K_{l+2L} + ... = r^-l irfft(K(r exp(-2 pi i j / L)))_l

With r^L = 1e-8 what wraps around is below the last place of float32, and what rounding in float64
leaves is too, although r^-l multiplies it by up to 1e8. So no power of the dense matrix is needed,
which is what the truncated generating function costs. With w = 1 - z, p = (1 + z) / 2, s = dt p:

    K(z) = dt (q[C B] - s q[C P] q[P* B] / (1 + s q[P* P]))
    q[v] = w sum_n alpha_n / den_n - s sum_n beta_n / den_n,   den_n = w^2 - t_n w s + m_n s^2
    alpha = 2 Re v;   beta = 2 Re(v lambda*);   t = 2 Re lambda;   m = |lambda|^2

Everything behind the parameters is float64. Of the gradients only sums over nodes are made, one
set for each system and mode; sums go in a fixed order.

Source: Gu et al. 2022 (S4), Appendix C.3, for the generating function.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.ssm.dplr import WRAPPED

NODES = 128  # of a program that goes through all modes
LAGS = 1024  # of a program that goes through a filter
TILE_MODES, TILE_NODES = 16, 256  # of a program that goes through nodes; elements of its tile
ROWS = tl.constexpr(2)  # of the table of coefficients in front of alpha and beta: t and m


@triton.jit
def times(x_re, x_im, y_re, y_im):
    """Complex product."""
    return x_re * y_re - x_im * y_im, x_re * y_im + x_im * y_re


@triton.jit
def times_conj(x_re, x_im, y_re, y_im):
    """conj(x) y."""
    return x_re * y_re + x_im * y_im, x_re * y_im - x_im * y_re


@triton.jit
def over(x_re, x_im, y_re, y_im):
    """X / y."""
    factor = 1.0 / (y_re * y_re + y_im * y_im)
    re, im = times_conj(y_re, y_im, x_re, x_im)
    return re * factor, im * factor


@triton.jit
def load_pair(pointer, at, mask):
    """Real and imaginary part as float64."""
    re = tl.load(pointer + 2 * at, mask, 0.0).to(tl.float64)
    im = tl.load(pointer + 2 * at + 1, mask, 0.0).to(tl.float64)
    return re, im


@triton.jit
def store_pair(pointer, at, mask, re, im):
    """The inverse of `load_pair`."""
    tl.store(pointer + 2 * at, re.to(tl.float32), mask)
    tl.store(pointer + 2 * at + 1, im.to(tl.float32), mask)


@triton.jit
def store_coefficients(table, v, modes, n, mask, v_re, v_im, l_re, l_im):
    """Load alpha and beta of the v-th vector."""
    at = table + (ROWS + 2 * v) * modes + n
    tl.store(at, 2.0 * v_re, mask)
    tl.store(at + modes, 2.0 * (v_re * l_re + v_im * l_im), mask)


@triton.jit(do_not_specialize=["systems", "modes"])
def coefficients_kernel(
    eigenvalues, P, B, C, table, systems, modes, READOUTS: tl.constexpr, MODES: tl.constexpr
):
    """Make t, m, alpha and beta of P* B, P* P, and C B, C P of each read-out: (H, rows, N/2)."""
    h = tl.program_id(0)
    n = tl.arange(0, MODES)
    mask = n < modes
    l_re, l_im = load_pair(eigenvalues, h * modes + n, mask)
    p_re, p_im = load_pair(P, h * modes + n, mask)
    b_re, b_im = load_pair(B, h * modes + n, mask)
    table += h * (ROWS + 4 + 4 * READOUTS) * modes
    tl.store(table + n, 2.0 * l_re, mask)
    tl.store(table + modes + n, l_re * l_re + l_im * l_im, mask)
    v_re, v_im = times_conj(p_re, p_im, b_re, b_im)
    store_coefficients(table, 0, modes, n, mask, v_re, v_im, l_re, l_im)
    v_re = p_re * p_re + p_im * p_im
    store_coefficients(table, 1, modes, n, mask, v_re, v_re * 0.0, l_re, l_im)
    for k in tl.static_range(READOUTS):
        c_re, c_im = load_pair(C, (k * systems + h) * modes + n, mask)
        v_re, v_im = times(c_re, c_im, b_re, b_im)
        store_coefficients(table, 2 + 2 * k, modes, n, mask, v_re, v_im, l_re, l_im)
        v_re, v_im = times(c_re, c_im, p_re, p_im)
        store_coefficients(table, 3 + 2 * k, modes, n, mask, v_re, v_im, l_re, l_im)


@triton.jit
def add_vector(table, v, modes, n, i_re, i_im, a_re, a_im, b_re, b_im):
    """Add a mode to sum_n alpha / den and sum_n beta / den."""
    alpha = tl.load(table + (ROWS + 2 * v) * modes + n)
    beta = tl.load(table + (ROWS + 2 * v + 1) * modes + n)
    return a_re + alpha * i_re, a_im + alpha * i_im, b_re + beta * i_re, b_im + beta * i_im


@triton.jit
def joined(w_re, w_im, s_re, s_im, a_re, a_im, b_re, b_im):
    """Q = w a - s b."""
    x_re, x_im = times(w_re, w_im, a_re, a_im)
    y_re, y_im = times(s_re, s_im, b_re, b_im)
    return x_re - y_re, x_im - y_im


@triton.jit
def node(nodes, dt, j, mask):
    """w, p and s of some nodes; 1, 0 and 0 behind the last."""
    w_re = tl.load(nodes + 2 * j, mask, 1.0)
    w_im = tl.load(nodes + 2 * j + 1, mask, 0.0)
    p_re, p_im = tl.where(mask, 1.0 - 0.5 * w_re, 0.0), -0.5 * w_im
    return w_re, w_im, p_re, p_im, dt * p_re, dt * p_im


@triton.jit
def inverse(t, m, ww_re, ww_im, ws_re, ws_im, ss_re, ss_im):
    """1 / den."""
    d_re = ww_re - t * ws_re + m * ss_re
    d_im = ww_im - t * ws_im + m * ss_im
    factor = 1.0 / (d_re * d_re + d_im * d_im)
    return d_re * factor, -d_im * factor


@triton.jit
def sums_over_modes(table, modes, w_re, w_im, s_re, s_im, READOUTS: tl.constexpr):
    """Q of P* B, P* P, and of C B, C P for two read-outs (those of the first if there is one)."""
    ww_re, ww_im = times(w_re, w_im, w_re, w_im)
    ws_re, ws_im = times(w_re, w_im, s_re, s_im)
    ss_re, ss_im = times(s_re, s_im, s_re, s_im)
    zero = w_re * 0.0
    a0r, a0i, b0r, b0i = zero, zero, zero, zero
    a1r, a1i, b1r, b1i = zero, zero, zero, zero
    a2r, a2i, b2r, b2i = zero, zero, zero, zero
    a3r, a3i, b3r, b3i = zero, zero, zero, zero
    a4r, a4i, b4r, b4i = zero, zero, zero, zero
    a5r, a5i, b5r, b5i = zero, zero, zero, zero
    for n in range(modes):
        i_re, i_im = inverse(
            tl.load(table + n), tl.load(table + modes + n),
            ww_re, ww_im, ws_re, ws_im, ss_re, ss_im,
        )  # fmt: skip
        a0r, a0i, b0r, b0i = add_vector(table, 0, modes, n, i_re, i_im, a0r, a0i, b0r, b0i)
        a1r, a1i, b1r, b1i = add_vector(table, 1, modes, n, i_re, i_im, a1r, a1i, b1r, b1i)
        a2r, a2i, b2r, b2i = add_vector(table, 2, modes, n, i_re, i_im, a2r, a2i, b2r, b2i)
        a3r, a3i, b3r, b3i = add_vector(table, 3, modes, n, i_re, i_im, a3r, a3i, b3r, b3i)
        if READOUTS == 2:
            a4r, a4i, b4r, b4i = add_vector(table, 4, modes, n, i_re, i_im, a4r, a4i, b4r, b4i)
            a5r, a5i, b5r, b5i = add_vector(table, 5, modes, n, i_re, i_im, a5r, a5i, b5r, b5i)
    q0r, q0i = joined(w_re, w_im, s_re, s_im, a0r, a0i, b0r, b0i)
    q1r, q1i = joined(w_re, w_im, s_re, s_im, a1r, a1i, b1r, b1i)
    q2r, q2i = joined(w_re, w_im, s_re, s_im, a2r, a2i, b2r, b2i)
    q3r, q3i = joined(w_re, w_im, s_re, s_im, a3r, a3i, b3r, b3i)
    q4r, q4i = joined(w_re, w_im, s_re, s_im, a4r, a4i, b4r, b4i)
    q5r, q5i = joined(w_re, w_im, s_re, s_im, a5r, a5i, b5r, b5i)
    return q0r, q0i, q1r, q1i, q2r, q2i, q3r, q3i, q4r, q4i, q5r, q5i


@triton.jit
def low_rank(s_re, s_im, d_re, d_im, q_re, q_im):
    """S q[C P] / (1 + s q[P* P])."""
    x_re, x_im = times(s_re, s_im, q_re, q_im)
    return over(x_re, x_im, d_re, d_im)


@triton.jit(do_not_specialize=["systems", "modes", "count"])
def spectrum_kernel(
    table, dts, nodes, spectrum, systems, modes, count,
    READOUTS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """K(z) at some nodes, for each read-out: (read-outs, H, count) complex."""
    h = tl.program_id(0)
    j = tl.program_id(1) * NODES + tl.arange(0, NODES)
    mask = j < count
    dt = tl.load(dts + h).to(tl.float64)
    w_re, w_im, _p_re, _p_im, s_re, s_im = node(nodes, dt, j, mask)
    table += h * (ROWS + 4 + 4 * READOUTS) * modes
    q0r, q0i, q1r, q1i, q2r, q2i, q3r, q3i, q4r, q4i, q5r, q5i = sums_over_modes(
        table, modes, w_re, w_im, s_re, s_im, READOUTS
    )
    d_re, d_im = times(s_re, s_im, q1r, q1i)
    d_re += 1.0
    low_re, low_im = low_rank(s_re, s_im, d_re, d_im, q3r, q3i)
    x_re, x_im = times(low_re, low_im, q0r, q0i)
    to = spectrum + (h.to(tl.int64) * count + j) * 2
    tl.store(to, dt * (q2r - x_re), mask)
    tl.store(to + 1, dt * (q2i - x_im), mask)
    if READOUTS == 2:
        low_re, low_im = low_rank(s_re, s_im, d_re, d_im, q5r, q5i)
        x_re, x_im = times(low_re, low_im, q0r, q0i)
        to += systems.to(tl.int64) * count * 2
        tl.store(to, dt * (q4r - x_re), mask)
        tl.store(to + 1, dt * (q4i - x_im), mask)


@triton.jit
def store_gradient(grads, v, count, j, mask, re, im):
    """The gradient of q of the v-th vector, its parts apart."""
    tl.store(grads + 2 * v * count + j, re, mask)
    tl.store(grads + (2 * v + 1) * count + j, im, mask)


@triton.jit
def readout_backward(
    grads, k, count, j, mask, dt, s_re, s_im, d_re, d_im, q0r, q0i, cb_re, cb_im, cp_re, cp_im,
    g_re, g_im,
):  # fmt: skip
    """Store the gradients of q[C B] and q[C P].

    Returns what one read-out adds to those of q[P* B], of the denominator, of s and of dt.
    """
    low_re, low_im = low_rank(s_re, s_im, d_re, d_im, cp_re, cp_im)
    store_gradient(grads, 2 + 2 * k, count, j, mask, dt * g_re, dt * g_im)
    pb_re, pb_im = times_conj(low_re, low_im, -dt * g_re, -dt * g_im)
    gl_re, gl_im = times_conj(q0r, q0i, -dt * g_re, -dt * g_im)
    # over the conjugate of the denominator, for the next three
    gl_re, gl_im = over(gl_re, gl_im, d_re, -d_im)
    x_re, x_im = times_conj(s_re, s_im, gl_re, gl_im)
    store_gradient(grads, 3 + 2 * k, count, j, mask, x_re, x_im)
    gd_re, gd_im = times_conj(low_re, low_im, -gl_re, -gl_im)
    gs_re, gs_im = times_conj(cp_re, cp_im, gl_re, gl_im)
    x_re, x_im = times(low_re, low_im, q0r, q0i)
    gdt = (cb_re - x_re) * g_re + (cb_im - x_im) * g_im
    return pb_re, pb_im, gd_re, gd_im, gs_re, gs_im, gdt


@triton.jit
def load_spectrum_gradient(dspectrum, at, j, count, length, mask):
    """What one value of K(z) is worth, given the transform of the filter's gradient."""
    # the other half of the circle is the conjugate of this one
    twice = (j > 0) & (2 * j < length)
    weight = tl.where(twice, 2.0, 1.0)
    re = tl.load(dspectrum + 2 * (at * count + j), mask, 0.0)
    im = tl.load(dspectrum + 2 * (at * count + j) + 1, mask, 0.0)
    return re * weight, im * weight


@triton.jit(do_not_specialize=["systems", "modes", "count", "length"])
def nodes_backward_kernel(
    table, dts, nodes, dspectrum, grads, ddts, systems, modes, count, length,
    READOUTS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Gradients of all q at some nodes, (H, vectors, 2, count); of dt where it stands alone."""
    h = tl.program_id(0)
    j = tl.program_id(1) * NODES + tl.arange(0, NODES)
    mask = j < count
    dt = tl.load(dts + h).to(tl.float64)
    w_re, w_im, p_re, p_im, s_re, s_im = node(nodes, dt, j, mask)
    q0r, q0i, q1r, q1i, q2r, q2i, q3r, q3i, q4r, q4i, q5r, q5i = sums_over_modes(
        table + h * (ROWS + 4 + 4 * READOUTS) * modes, modes, w_re, w_im, s_re, s_im, READOUTS
    )
    d_re, d_im = times(s_re, s_im, q1r, q1i)
    d_re += 1.0
    grads += h.to(tl.int64) * (4 + 4 * READOUTS) * count
    at = h.to(tl.int64)
    g_re, g_im = load_spectrum_gradient(dspectrum, at, j, count, length, mask)
    pb_re, pb_im, gd_re, gd_im, gs_re, gs_im, gdt = readout_backward(
        grads, 0, count, j, mask, dt, s_re, s_im, d_re, d_im,
        q0r, q0i, q2r, q2i, q3r, q3i, g_re, g_im,
    )  # fmt: skip
    if READOUTS == 2:
        g_re, g_im = load_spectrum_gradient(dspectrum, at + systems, j, count, length, mask)
        x0, x1, x2, x3, x4, x5, x6 = readout_backward(
            grads, 1, count, j, mask, dt, s_re, s_im, d_re, d_im,
            q0r, q0i, q4r, q4i, q5r, q5i, g_re, g_im,
        )  # fmt: skip
        pb_re += x0
        pb_im += x1
        gd_re += x2
        gd_im += x3
        gs_re += x4
        gs_im += x5
        gdt += x6
    store_gradient(grads, 0, count, j, mask, pb_re, pb_im)
    x_re, x_im = times_conj(s_re, s_im, gd_re, gd_im)
    store_gradient(grads, 1, count, j, mask, x_re, x_im)
    x_re, x_im = times_conj(q1r, q1i, gd_re, gd_im)
    gdt += p_re * (gs_re + x_re) + p_im * (gs_im + x_im)
    total = tl.sum(tl.where(mask, gdt, 0.0), 0)
    tl.store(ddts + h * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def load_coefficients(table, v, modes, n, mask):
    """Load alpha and beta of the v-th vector, [N/2, 1]."""
    alpha = tl.load(table + (ROWS + 2 * v) * modes + n, mask, 0.0)
    beta = tl.load(table + (ROWS + 2 * v + 1) * modes + n, mask, 0.0)
    return alpha[:, None], beta[:, None]


@triton.jit
def vector_backward(
    table, grads, v, modes, n, valid, count, j, mask, w_re, w_im, s_re, s_im, i_re, i_im,
    gi_re, gi_im, alphas, betas,
):  # fmt: skip
    """Add to the gradients of 1 / den, and of one vector's alpha and beta."""
    alpha, beta = load_coefficients(table, v, modes, n, valid)
    g_re = tl.load(grads + 2 * v * count + j, mask, 0.0)
    g_im = tl.load(grads + (2 * v + 1) * count + j, mask, 0.0)
    ga_re, ga_im = times_conj(w_re, w_im, g_re, g_im)
    gb_re, gb_im = times_conj(s_re, s_im, -g_re, -g_im)
    ga_re, ga_im, gb_re, gb_im = ga_re[None, :], ga_im[None, :], gb_re[None, :], gb_im[None, :]
    gi_re += alpha * ga_re + beta * gb_re
    gi_im += alpha * ga_im + beta * gb_im
    return (
        gi_re, gi_im, alphas + i_re * ga_re + i_im * ga_im, betas + i_re * gb_re + i_im * gb_im,
    )  # fmt: skip


@triton.jit
def store_sums(sums, row, modes, n, valid, x):
    """A row of sums over nodes."""
    tl.store(sums + row * modes + n, tl.sum(x, 1), valid)


@triton.jit(do_not_specialize=["systems", "modes", "count", "nodes_per_program"])
def modes_backward_kernel(
    table, dts, nodes, grads, sums, systems, modes, count, nodes_per_program,
    READOUTS: tl.constexpr, MODES: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Gradients of the coefficients of some modes, sums over nodes: (parts, H, rows, N/2)."""
    h = tl.program_id(0)
    n = tl.program_id(1) * MODES + tl.arange(0, MODES)
    valid = n < modes
    part = tl.program_id(2)
    rows = ROWS + 4 + 4 * READOUTS
    table += h * rows * modes
    grads += h.to(tl.int64) * (4 + 4 * READOUTS) * count
    dt = tl.load(dts + h).to(tl.float64)
    t = tl.load(table + n, valid, 0.0)[:, None]
    m = tl.load(table + modes + n, valid, 0.0)[:, None]
    zero = tl.zeros((MODES, NODES), tl.float64)
    ts, ms = zero, zero
    a0, a1, a2, a3, a4, a5 = zero, zero, zero, zero, zero, zero
    b0, b1, b2, b3, b4, b5 = zero, zero, zero, zero, zero, zero
    first = part * nodes_per_program
    for start in range(first, tl.minimum(first + nodes_per_program, count), NODES):
        j = start + tl.arange(0, NODES)
        mask = j < count
        w_re, w_im, _p_re, _p_im, s_re, s_im = node(nodes, dt, j, mask)
        ww_re, ww_im = times(w_re, w_im, w_re, w_im)
        ws_re, ws_im = times(w_re, w_im, s_re, s_im)
        ss_re, ss_im = times(s_re, s_im, s_re, s_im)
        ws_re, ws_im, ss_re, ss_im = ws_re[None, :], ws_im[None, :], ss_re[None, :], ss_im[None, :]
        i_re, i_im = inverse(t, m, ww_re[None, :], ww_im[None, :], ws_re, ws_im, ss_re, ss_im)
        gi_re, gi_im = zero, zero
        gi_re, gi_im, a0, b0 = vector_backward(
            table, grads, 0, modes, n, valid, count, j, mask, w_re, w_im, s_re, s_im, i_re, i_im,
            gi_re, gi_im, a0, b0,
        )  # fmt: skip
        gi_re, gi_im, a1, b1 = vector_backward(
            table, grads, 1, modes, n, valid, count, j, mask, w_re, w_im, s_re, s_im, i_re, i_im,
            gi_re, gi_im, a1, b1,
        )  # fmt: skip
        gi_re, gi_im, a2, b2 = vector_backward(
            table, grads, 2, modes, n, valid, count, j, mask, w_re, w_im, s_re, s_im, i_re, i_im,
            gi_re, gi_im, a2, b2,
        )  # fmt: skip
        gi_re, gi_im, a3, b3 = vector_backward(
            table, grads, 3, modes, n, valid, count, j, mask, w_re, w_im, s_re, s_im, i_re, i_im,
            gi_re, gi_im, a3, b3,
        )  # fmt: skip
        if READOUTS == 2:
            gi_re, gi_im, a4, b4 = vector_backward(
                table, grads, 4, modes, n, valid, count, j, mask, w_re, w_im, s_re, s_im,
                i_re, i_im, gi_re, gi_im, a4, b4,
            )  # fmt: skip
            gi_re, gi_im, a5, b5 = vector_backward(
                table, grads, 5, modes, n, valid, count, j, mask, w_re, w_im, s_re, s_im,
                i_re, i_im, gi_re, gi_im, a5, b5,
            )  # fmt: skip
        # of den = 1 / inverse
        square_re, square_im = times(i_re, i_im, i_re, i_im)
        gd_re, gd_im = times_conj(square_re, square_im, -gi_re, -gi_im)
        ts -= ws_re * gd_re + ws_im * gd_im
        ms += ss_re * gd_re + ss_im * gd_im
    sums += (part.to(tl.int64) * systems + h) * rows * modes
    store_sums(sums, 0, modes, n, valid, ts)
    store_sums(sums, 1, modes, n, valid, ms)
    store_sums(sums, 2, modes, n, valid, a0)
    store_sums(sums, 3, modes, n, valid, b0)
    store_sums(sums, 4, modes, n, valid, a1)
    store_sums(sums, 5, modes, n, valid, b1)
    store_sums(sums, 6, modes, n, valid, a2)
    store_sums(sums, 7, modes, n, valid, b2)
    store_sums(sums, 8, modes, n, valid, a3)
    store_sums(sums, 9, modes, n, valid, b3)
    if READOUTS == 2:
        store_sums(sums, 10, modes, n, valid, a4)
        store_sums(sums, 11, modes, n, valid, b4)
        store_sums(sums, 12, modes, n, valid, a5)
        store_sums(sums, 13, modes, n, valid, b5)


@triton.jit
def load_sums(sums, row, part_stride, parts, modes, n, valid):
    """A row of sums, over all parts of the nodes."""
    total = tl.load(sums + row * modes + n, valid, 0.0)
    for part in range(1, parts):
        total += tl.load(sums + part * part_stride + row * modes + n, valid, 0.0)
    return total


@triton.jit
def vector_gradient(
    sums, table, v, part_stride, parts, modes, n, valid, l_re, l_im, v_re, v_im, dl_re, dl_im, dt
):
    """The gradient of the v-th vector; what it adds to those of lambda and dt."""
    da = load_sums(sums, ROWS + 2 * v, part_stride, parts, modes, n, valid)
    db = load_sums(sums, ROWS + 2 * v + 1, part_stride, parts, modes, n, valid)
    beta = tl.load(table + (ROWS + 2 * v + 1) * modes + n, valid, 0.0)
    re, im = 2.0 * (da + db * l_re), 2.0 * db * l_im
    return re, im, dl_re + 2.0 * db * v_re, dl_im + 2.0 * db * v_im, dt + beta * db


@triton.jit(do_not_specialize=["systems", "modes", "parts", "blocks"])
def parameters_kernel(
    eigenvalues, P, B, C, dts, table, sums, ddts, dl, dP, dB, dC, ddt, systems, modes, parts,
    blocks, READOUTS: tl.constexpr, MODES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """From gradients of the coefficients of a system to those of its parameters."""
    h = tl.program_id(0)
    n = tl.arange(0, MODES)
    valid = n < modes
    rows = ROWS + 4 + 4 * READOUTS
    stride = systems.to(tl.int64) * rows * modes
    sums += h * rows * modes
    table += h * rows * modes
    at = h * modes + n
    l_re, l_im = load_pair(eigenvalues, at, valid)
    p_re, p_im = load_pair(P, at, valid)
    b_re, b_im = load_pair(B, at, valid)

    t = load_sums(sums, 0, stride, parts, modes, n, valid)
    m = load_sums(sums, 1, stride, parts, modes, n, valid)
    dl_re, dl_im = 2.0 * (t + m * l_re), 2.0 * m * l_im
    # s, wherever it stands, is dt p
    scaled = tl.load(table + n, valid, 0.0) * t
    scaled += 2.0 * tl.load(table + modes + n, valid, 0.0) * m

    v_re, v_im = times_conj(p_re, p_im, b_re, b_im)
    g_re, g_im, dl_re, dl_im, scaled = vector_gradient(
        sums, table, 0, stride, parts, modes, n, valid, l_re, l_im, v_re, v_im, dl_re, dl_im, scaled
    )
    db_re, db_im = times(p_re, p_im, g_re, g_im)
    dp_re, dp_im = times_conj(g_re, g_im, b_re, b_im)
    v_re = p_re * p_re + p_im * p_im
    g_re, g_im, dl_re, dl_im, scaled = vector_gradient(
        sums, table, 1, stride, parts, modes, n, valid, l_re, l_im, v_re, v_re * 0.0, dl_re, dl_im,
        scaled,
    )  # fmt: skip
    dp_re += 2.0 * p_re * g_re
    dp_im += 2.0 * p_im * g_re
    for k in tl.static_range(READOUTS):
        c_re, c_im = load_pair(C, k * systems * modes + at, valid)
        v_re, v_im = times(c_re, c_im, b_re, b_im)
        g_re, g_im, dl_re, dl_im, scaled = vector_gradient(
            sums, table, 2 + 2 * k, stride, parts, modes, n, valid, l_re, l_im, v_re, v_im,
            dl_re, dl_im, scaled,
        )  # fmt: skip
        x_re, x_im = times_conj(c_re, c_im, g_re, g_im)
        db_re += x_re
        db_im += x_im
        dc_re, dc_im = times_conj(b_re, b_im, g_re, g_im)
        v_re, v_im = times(c_re, c_im, p_re, p_im)
        g_re, g_im, dl_re, dl_im, scaled = vector_gradient(
            sums, table, 3 + 2 * k, stride, parts, modes, n, valid, l_re, l_im, v_re, v_im,
            dl_re, dl_im, scaled,
        )  # fmt: skip
        x_re, x_im = times_conj(c_re, c_im, g_re, g_im)
        dp_re += x_re
        dp_im += x_im
        x_re, x_im = times_conj(p_re, p_im, g_re, g_im)
        store_pair(dC, k * systems * modes + at, valid, dc_re + x_re, dc_im + x_im)
    store_pair(dl, at, valid, dl_re, dl_im)
    store_pair(dP, at, valid, dp_re, dp_im)
    store_pair(dB, at, valid, db_re, db_im)
    block = tl.arange(0, BLOCKS)
    alone = tl.sum(tl.load(ddts + h * blocks + block, block < blocks, 0.0), 0)
    dt = tl.load(dts + h).to(tl.float64)
    tl.store(ddt + h, (alone + tl.sum(scaled, 0) / dt).to(tl.float32))


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64)


@triton.jit(do_not_specialize=["systems"])
def unwind_kernel(
    wound, unwind, skip, filters, systems, L, DELAYED: tl.constexpr, BLOCK: tl.constexpr
):
    """r^-l times what was wound up; the skip at lag 0 of the first read-out, the second later."""
    row = tl.program_id(0).to(tl.int64)
    second = (row >= systems).to(tl.int32) if DELAYED else 0
    lag = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (lag < L) & (lag >= second)
    at = wound + row * L + lag - second
    x = tl.load(at, mask, 0.0) * tl.load(unwind + lag - second, mask, 0.0)
    if skip is not None:
        x += tl.load(skip + row + lag * 0, (lag == 0) & (row < systems), 0.0).to(tl.float64)
    tl.store(filters + row * L + lag, x.to(tl.float32), lag < L)


@triton.jit(do_not_specialize=["systems"])
def wind_kernel(grad, unwind, wound, systems, L, DELAYED: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of what was wound up, given that of the filters."""
    row = tl.program_id(0).to(tl.int64)
    second = (row >= systems).to(tl.int32) if DELAYED else 0
    lag = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(grad + row * L + lag + second, lag + second < L, 0.0).to(tl.float64)
    x *= tl.load(unwind + lag, lag < L, 0.0)
    tl.store(wound + row * L + lag, x, lag < L)


class Circle(NamedTuple):
    """Nodes of filters of one length.

    Attributes:
        nodes: w = 1 - z of half of them, (L / 2 + 1, 2), float64.
        unwind: r^-l, (L,), float64.
    """

    nodes: Tensor
    unwind: Tensor


@cache
def circle(length: int, device: torch.device) -> Circle:
    """The nodes for a length, made in float64; 1 - z without cancelling near z = 1."""
    log_r = math.log(WRAPPED) / length
    angle = 2 * math.pi / length * torch.arange(length // 2 + 1, dtype=torch.float64)
    r = math.exp(log_r)
    re = -math.expm1(log_r) * angle.cos() + 2 * (angle / 2).sin().square()
    nodes = torch.stack([re, r * angle.sin()], -1)
    unwind = torch.exp(-log_r * torch.arange(length, dtype=torch.float64))
    return Circle(nodes.to(device), unwind.to(device))


def make(
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    length: int,
    skip: Tensor | None = None,
    delayed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Filters (read-outs, H, L), float32, and the coefficients for `make_backward`.

    Args:
        eigenvalues, P, B: (H, N/2, 2), float32, contiguous.
        C: (read-outs, H, N/2, 2), one or two of them.
        dt: (H,).
        length: L, at least 1.
        skip: (H,), added at lag 0 of the first read-out.
        delayed: Whether the second read-out's filter starts one lag later.
    """
    readouts, H, modes, _ = C.shape
    nodes, unwind = circle(length, dt.device)
    count = len(nodes)
    table = _empty(dt, H, 6 + 4 * readouts, modes)
    coefficients_kernel[(H,)](
        eigenvalues, P, B, C, table, H, modes, READOUTS=readouts,
        MODES=triton.next_power_of_2(modes), num_warps=1,
    )  # fmt: skip
    spectrum = _empty(dt, readouts, H, count, 2)
    spectrum_kernel[(H, triton.cdiv(count, NODES))](
        table, dt, nodes, spectrum, H, modes, count, READOUTS=readouts, NODES=NODES, num_warps=4
    )
    wound = torch.fft.irfft(torch.view_as_complex(spectrum), n=length)
    filters = torch.empty(wound.shape, dtype=torch.float32, device=dt.device)
    unwind_kernel[(readouts * H, triton.cdiv(length, LAGS))](
        wound, unwind, skip, filters, H, length, DELAYED=delayed, BLOCK=LAGS, num_warps=4
    )
    return filters, table


def make_backward(
    grad: Tensor,
    table: Tensor,
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
    nodes, unwind = circle(length, dt.device)
    count = len(nodes)
    # of a mean over L nodes; sums of exp(-2 pi i j l / L) as for every gradient of an inverse
    wound = _empty(dt, readouts, H, length)
    wind_kernel[(readouts * H, triton.cdiv(length, LAGS))](
        grad.contiguous(), unwind, wound, H, length, DELAYED=delayed, BLOCK=LAGS, num_warps=4
    )
    dspectrum = torch.fft.rfft(wound, norm="forward")
    blocks = triton.cdiv(count, NODES)
    grads = _empty(dt, H, 4 + 4 * readouts, count)
    ddts = _empty(dt, H, blocks)
    nodes_backward_kernel[(H, blocks)](
        table, dt, nodes, torch.view_as_real(dspectrum), grads, ddts, H, modes, count, length,
        READOUTS=readouts, NODES=NODES, num_warps=4,
    )  # fmt: skip
    tile = min(TILE_MODES, triton.next_power_of_2(modes))
    width = TILE_NODES // tile
    tiles = triton.cdiv(modes, tile)
    # a program walks over at least 16 tiles, and there are enough programs for any GPU
    parts = max(1, min(2048 // (H * tiles), triton.cdiv(count, 16 * width)))
    per_program = triton.cdiv(triton.cdiv(count, parts), width) * width
    parts = triton.cdiv(count, per_program)
    sums = _empty(dt, parts, H, 6 + 4 * readouts, modes)
    modes_backward_kernel[(H, tiles, parts)](
        table, dt, nodes, grads, sums, H, modes, count, per_program,
        READOUTS=readouts, MODES=tile, NODES=width, num_warps=4,
    )  # fmt: skip
    dl, dP, dB, dC = (torch.empty_like(x) for x in (eigenvalues, P, B, C))
    ddt = torch.empty_like(dt)
    parameters_kernel[(H,)](
        eigenvalues, P, B, C, dt, table, sums, ddts, dl, dP, dB, dC, ddt, H, modes, parts, blocks,
        READOUTS=readouts, MODES=triton.next_power_of_2(modes),
        BLOCKS=triton.next_power_of_2(blocks), num_warps=1,
    )  # fmt: skip
    return dl, dP, dB, dC, ddt
