# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""From parameters to a discrete system and a short filter, a kernel each way for both.

Bilinear rule, with A = -exp(r) + i A_imag, u = dt A / 2 and w = 1 / (1 - u):

    a = (1 + u) w;   b = dt B w;   da/du = 2 w^2;   db/du = b w;   db/dB = dt w;   db/ddt = b / dt

Filter of the shift SSM, n slots:

    f_j = sum_n B_n C_(n+j), f_0 += D;   dB_n = sum_j df_j C_(j+n);   dC_m = sum_n B_n df_(m-n)

Computed in float64, gradients in PyTorch's convention for complex numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h3lm.ssm.operators_triton import load_modes, store_modes, times


@triton.jit
def load_system(log_dt, log_neg_A_real, A_imag, system, n, modes):
    """dt, u and w of a row, [N/2, 1] each part."""
    dt = tl.exp(tl.load(log_dt + system).to(tl.float64))
    at = system * modes + n
    u_re = -tl.exp(tl.load(log_neg_A_real + at, n < modes, 0.0).to(tl.float64)) * dt * 0.5
    u_im = tl.load(A_imag + at, n < modes, 0.0).to(tl.float64) * dt * 0.5
    u_re = u_re[:, None]
    u_im = u_im[:, None]
    size = (1.0 - u_re) * (1.0 - u_re) + u_im * u_im
    return dt, u_re, u_im, (1.0 - u_re) / size, u_im / size


@triton.jit
def bilinear_kernel(log_dt, log_neg_A_real, A_imag, B, a, b, modes, MODES: tl.constexpr):
    """A and b of a system."""
    system = tl.program_id(0)
    n = tl.arange(0, MODES)
    dt, u_re, u_im, w_re, w_im = load_system(log_dt, log_neg_A_real, A_imag, system, n, modes)
    a_re, a_im = times(1.0 + u_re, u_im, w_re, w_im)
    store_modes(a, system, n, modes, tl.sum(a_re, 1), tl.sum(a_im, 1))
    B_re, B_im = load_modes(B, system, n, modes)
    b_re, b_im = times(B_re * dt, B_im * dt, w_re, w_im)
    store_modes(b, system, n, modes, tl.sum(b_re, 1), tl.sum(b_im, 1))


@triton.jit
def bilinear_backward_kernel(
    da, db, log_dt, log_neg_A_real, A_imag, B, dlog_dt, dlog_neg_A_real, dA_imag, dB, modes,
    MODES: tl.constexpr,
):  # fmt: skip
    """Gradients of a system's parameters."""
    system = tl.program_id(0)
    n = tl.arange(0, MODES)
    dt, u_re, u_im, w_re, w_im = load_system(log_dt, log_neg_A_real, A_imag, system, n, modes)
    B_re, B_im = load_modes(B, system, n, modes)
    ga_re, ga_im = load_modes(da, system, n, modes)
    gb_re, gb_im = load_modes(db, system, n, modes)
    # all derivatives are conjugated: the signs of w, b and u are
    at_re, at_im = times(gb_re * dt, gb_im * dt, w_re, -w_im)
    store_modes(dB, system, n, modes, tl.sum(at_re, 1), tl.sum(at_im, 1))
    by_b_re, by_b_im = times(at_re, at_im, B_re, -B_im)  # gb conj(b)
    square_re, square_im = times(w_re, -w_im, w_re, -w_im)
    gu_re, gu_im = times(2.0 * ga_re, 2.0 * ga_im, square_re, square_im)
    more_re, more_im = times(by_b_re, by_b_im, w_re, -w_im)
    gu_re += more_re
    gu_im += more_im
    at = system * modes + n
    # u_re = -exp(r) dt / 2 is its own derivative by r
    dr = tl.sum(gu_re * u_re, 1)
    tl.store(dlog_neg_A_real + at, dr.to(tl.float32), n < modes)
    tl.store(dA_imag + at, tl.sum(gu_im * dt * 0.5, 1).to(tl.float32), n < modes)
    by_dt, _ = times(gu_re, gu_im, u_re, -u_im)
    total = tl.sum(tl.where((n < modes)[:, None], by_dt + by_b_re, 0.0))
    tl.store(dlog_dt + system, total.to(tl.float32))


@triton.jit
def taps_kernel(B, C, D, taps, slots, SLOTS: tl.constexpr):
    """The filter of a channel."""
    row = tl.program_id(0) * slots
    i = tl.arange(0, SLOTS)
    j = i[:, None]
    n = i[None, :]
    b = tl.load(B + row + n, n < slots, 0.0).to(tl.float64)
    c = tl.load(C + row + n + j, n + j < slots, 0.0).to(tl.float64)
    f = tl.sum(b * c, 1) + tl.where(i == 0, tl.load(D + tl.program_id(0)), 0.0)
    tl.store(taps + row + i, f.to(tl.float32), i < slots)


@triton.jit
def taps_backward_kernel(dtaps, B, C, dB, dC, slots, SLOTS: tl.constexpr):
    """Gradients of B and C of a channel."""
    row = tl.program_id(0) * slots
    i = tl.arange(0, SLOTS)
    j = i[:, None]
    n = i[None, :]
    df = tl.load(dtaps + row + n, n < slots, 0.0).to(tl.float64)
    c = tl.load(C + row + n + j, n + j < slots, 0.0).to(tl.float64)
    tl.store(dB + row + i, tl.sum(df * c, 1).to(tl.float32), i < slots)
    b = tl.load(B + row + n, n < slots, 0.0).to(tl.float64)
    df = tl.load(dtaps + row + j - n, (j >= n) & (j < slots), 0.0).to(tl.float64)
    tl.store(dC + row + i, tl.sum(b * df, 1).to(tl.float32), i < slots)


def bilinear(
    log_dt: Tensor, log_neg_A_real: Tensor, A_imag: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """A and b as real pairs, (H, N/2, 2); arguments as the parameters of `DiagonalSSM`."""
    H, modes = A_imag.shape
    a, b = torch.empty_like(B), torch.empty_like(B)
    bilinear_kernel[(H,)](
        log_dt, log_neg_A_real, A_imag, B, a, b, modes, MODES=triton.next_power_of_2(modes),
        num_warps=1,
    )  # fmt: skip
    return a, b


def bilinear_backward(
    da: Tensor, db: Tensor, log_dt: Tensor, log_neg_A_real: Tensor, A_imag: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the parameters, given those of a and b."""
    H, modes = A_imag.shape
    given = log_dt, log_neg_A_real, A_imag, B
    dlog_dt, dlog_neg_A_real, dA_imag, dB = (torch.empty_like(x) for x in given)
    bilinear_backward_kernel[(H,)](
        da, db, *given, dlog_dt, dlog_neg_A_real, dA_imag, dB, modes,
        MODES=triton.next_power_of_2(modes), num_warps=1,
    )  # fmt: skip
    return dlog_dt, dlog_neg_A_real, dA_imag, dB


def _sizes(slots: int) -> dict[str, int]:
    size = triton.next_power_of_2(slots)
    return {"SLOTS": size, "num_warps": 4 if size <= 64 else 16}


def taps(B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The filters, (D, n_taps); arguments as the parameters of `ShiftSSM`."""
    rows, slots = B.shape
    found = torch.empty_like(B)
    taps_kernel[(rows,)](B, C, D, found, slots, **_sizes(slots))
    return found


def taps_backward(dtaps: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of B and C; that of D is `dtaps[:, 0]`."""
    rows, slots = B.shape
    dB, dC = torch.empty_like(B), torch.empty_like(C)
    taps_backward_kernel[(rows,)](dtaps, B, C, dB, dC, slots, **_sizes(slots))
    return dB, dC
