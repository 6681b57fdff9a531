# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Chunk operators in two kernels, and their gradients in two: what PyTorch takes 40 passes for.

Powers are products, made in float64 by the bits of their exponents: no logarithm, no phase to
reduce, an error of a few last places of float64 before the one rounding to float32. With e from 0
to T - 1, and the gradients G of what was made, in PyTorch's convention for complex numbers:

    K_e = b a^e;   P_e = 2 c a^(e+1);   r_e = 2 Re(sum_n c b a^e);   decay = a^T
    db = sum_e (GK_e + 2 Gr_e conj(c)) conj(a^e)
    dc = sum_e 2 (GP_e conj(a) + Gr_e conj(b)) conj(a^e)
    da = sum_e e (GK_e conj(b) + 2 Gr_e conj(b c)) conj(a^(e-1))
         + sum_e 2 (e + 1) GP_e conj(c a^e) + Gdecay T conj(a^(T-1))

M and F are Toeplitz matrices of the response r and of the taps; their gradients are sums along
diagonals, in a fixed order.

Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def times(x_re, x_im, y_re, y_im):
    """Complex product."""
    return x_re * y_re - x_im * y_im, x_re * y_im + x_im * y_re


@triton.jit
def power(a_re, a_im, e, BITS: tl.constexpr):
    """a^e for [N/2, 1] and [1, J], e below 2^BITS, as products of squares."""
    re = (e * 0 + 1).to(tl.float64) + a_re * 0.0
    im = re * 0.0
    for bit in tl.static_range(BITS):
        next_re, next_im = times(re, im, a_re, a_im)
        here = (e >> bit) % 2 == 1
        re = tl.where(here, next_re, re)
        im = tl.where(here, next_im, im)
        a_re, a_im = times(a_re, a_im, a_re, a_im)
    return re, im


@triton.jit
def load_modes(pointer, system, n, modes):
    """A row of complex numbers as float64, [N/2, 1] each part."""
    at = pointer + (system * modes + n) * 2
    re = tl.load(at, n < modes, 0.0).to(tl.float64)
    im = tl.load(at + 1, n < modes, 0.0).to(tl.float64)
    return re[:, None], im[:, None]


@triton.jit
def store_modes(pointer, system, n, modes, re, im):
    """The inverse of `load_modes`, for [N/2]."""
    at = pointer + (system * modes + n) * 2
    tl.store(at, re.to(tl.float32), n < modes)
    tl.store(at + 1, im.to(tl.float32), n < modes)


@triton.jit
def tables_kernel(
    a, b, c, K, P, response, decay, modes,
    MODES: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """K, P and the decay of some modes of a system, and what they add to its response."""
    system = tl.program_id(0)
    n = tl.program_id(1) * MODES + tl.arange(0, MODES)
    e = tl.arange(0, T)
    mask = (n < modes)[:, None] & (e >= 0)[None, :]
    a_re, a_im = load_modes(a, system, n, modes)
    b_re, b_im = load_modes(b, system, n, modes)
    c_re, c_im = load_modes(c, system, n, modes)
    p_re, p_im = power(a_re, a_im, e[None, :], BITS)

    into_re, into_im = times(b_re, b_im, p_re, p_im)
    K_at = K + system * 2 * modes * T + n[:, None] * T + (T - 1 - e)[None, :]
    tl.store(K_at, into_re.to(tl.float32), mask)
    tl.store(K_at + modes * T, into_im.to(tl.float32), mask)
    r = 2.0 * tl.sum(c_re * into_re - c_im * into_im, 0)
    tl.store(response + (tl.program_id(1) * tl.num_programs(0) + system) * T + e, r)

    p_re, p_im = times(p_re, p_im, a_re, a_im)
    out_re, out_im = times(2.0 * c_re, 2.0 * c_im, p_re, p_im)
    P_at = P + system * 2 * modes * T + e[None, :] * (2 * modes) + n[:, None]
    tl.store(P_at, out_re.to(tl.float32), mask)
    tl.store(P_at + modes, -out_im.to(tl.float32), mask)
    last = (e == T - 1)[None, :]
    decay_re = tl.sum(tl.where(last, p_re, 0.0), 1)
    decay_im = tl.sum(tl.where(last, p_im, 0.0), 1)
    store_modes(decay, system, n, modes, decay_re, decay_im)


@triton.jit
def tables_backward_kernel(
    a, b, c, dK, dP, dresponse, ddecay, da, db, dc, modes,
    MODES: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Gradients of a, b and c for some modes of a system; for a of exactly 0 that is 0."""
    system = tl.program_id(0)
    n = tl.program_id(1) * MODES + tl.arange(0, MODES)
    e = tl.arange(0, T)
    mask = (n < modes)[:, None] & (e >= 0)[None, :]
    a_re, a_im = load_modes(a, system, n, modes)
    b_re, b_im = load_modes(b, system, n, modes)
    c_re, c_im = load_modes(c, system, n, modes)
    K_at = dK + system * 2 * modes * T + n[:, None] * T + (T - 1 - e)[None, :]
    k_re = tl.load(K_at, mask, 0.0).to(tl.float64)
    k_im = tl.load(K_at + modes * T, mask, 0.0).to(tl.float64)
    P_at = dP + system * 2 * modes * T + e[None, :] * (2 * modes) + n[:, None]
    o_re = 2.0 * tl.load(P_at, mask, 0.0).to(tl.float64)
    o_im = -2.0 * tl.load(P_at + modes, mask, 0.0).to(tl.float64)
    r = 2.0 * tl.load(dresponse + system * T + e).to(tl.float64)[None, :]

    p_re, p_im = power(a_re, -a_im, e[None, :], BITS)  # conj(a^e)
    sum_re, sum_im = times(k_re + r * c_re, k_im - r * c_im, p_re, p_im)
    store_modes(db, system, n, modes, tl.sum(sum_re, 1), tl.sum(sum_im, 1))
    after_re, after_im = times(o_re, o_im, a_re, -a_im)
    sum_re, sum_im = times(after_re + r * b_re, after_im - r * b_im, p_re, p_im)
    store_modes(dc, system, n, modes, tl.sum(sum_re, 1), tl.sum(sum_im, 1))

    # P and decay need (e + 1) conj(a^e): with T at the last e, decay joins P
    decay_re, decay_im = load_modes(ddecay, system, n, modes)
    last = (e == T - 1)[None, :]
    out_re, out_im = times(o_re, o_im, c_re, -c_im)
    out_re += tl.where(last, decay_re, 0.0)
    out_im += tl.where(last, decay_im, 0.0)
    steps = (e + 1).to(tl.float64)[None, :]
    sum_re, sum_im = times(out_re * steps, out_im * steps, p_re, p_im)
    p_re, p_im = power(a_re, -a_im, tl.where(e > 0, e - 1, 0)[None, :], BITS)
    into_re, into_im = times(k_re + r * c_re, k_im - r * c_im, b_re, -b_im)
    steps = e.to(tl.float64)[None, :]
    more_re, more_im = times(into_re * steps, into_im * steps, p_re, p_im)
    kept = (a_re != 0.0) | (a_im != 0.0)
    sum_re = tl.where(kept, sum_re + more_re, 0.0)
    sum_im = tl.where(kept, sum_im + more_im, 0.0)
    store_modes(da, system, n, modes, tl.sum(sum_re, 1), tl.sum(sum_im, 1))


@triton.jit
def toeplitz_kernel(first, matrix, length, blocks, T: tl.constexpr):
    """matrix[row, m, t, u] = first[row, m T + t - u], 0 outside of `first`."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    i = tl.arange(0, T)
    lag = block * T + i[:, None] - i[None, :]
    x = tl.load(first + row * length + lag, (lag >= 0) & (lag < length), 0.0)
    tl.store(matrix + (row * blocks + block) * T * T + i[:, None] * T + i[None, :], x)


@triton.jit
def toeplitz_sums_kernel(matrix, first, length, blocks, T: tl.constexpr):
    """first[row, j] = the sum of matrix[row, m, t, u] with m T + t - u = j."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    t = tl.arange(0, T)[:, None]
    lag = tl.arange(0, T)[None, :]
    at = matrix + (row * blocks + block) * T * T + t * T + t - lag
    x = tl.load(at, t >= lag, 0.0)
    # the block behind reaches back to the same lags: u = t + T - lag
    x += tl.load(at + T * T + T, (t < lag) & (block + 1 < blocks), 0.0)
    j = block * T + tl.arange(0, T)
    tl.store(first + row * length + j, tl.sum(x, 0), j < length)


def _toeplitz(first: Tensor, blocks: int, T: int) -> Tensor:
    matrix = first.new_empty(first.shape[0], blocks, T, T)
    toeplitz_kernel[(first.shape[0], blocks)](first, matrix, first.shape[1], blocks, T=T)
    return matrix


def _toeplitz_sums(matrix: Tensor, length: int) -> Tensor:
    rows, blocks, T, _ = matrix.shape
    first = matrix.new_empty(rows, length)
    toeplitz_sums_kernel[(rows, -(-length // T))](matrix, first, length, blocks, T=T)
    return first


MODES = 16  # of a program: more do not fit into the registers in float64


def _sizes(T: int) -> dict[str, int]:
    return {"MODES": MODES, "T": T, "BITS": T.bit_length() - 1, "num_warps": 8}


def make(
    a: Tensor, b: Tensor, c: Tensor, skip: Tensor, taps: Tensor | None, T: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """M, K, P, F (empty without taps) and decay, as in `ChunkOperators`; contiguous.

    Args:
        a, b, c: (H, N/2, 2), float32, contiguous.
        skip: (H,).
        taps: (D, n_taps), contiguous, or None.
        T: Chunk length, a power of two.
    """
    H, modes, _ = a.shape
    K, P = a.new_empty(H, 2 * modes, T), a.new_empty(H, T, 2 * modes)
    parts = -(-modes // MODES)
    decay = torch.empty_like(a)
    response = a.new_empty(parts, H, T, dtype=torch.float64)
    tables_kernel[(H, parts)](a, b, c, K, P, response, decay, modes, **_sizes(T))
    response = response.sum(0)
    response[:, 0] += skip
    M = _toeplitz(response.to(a.dtype), 1, T)[:, 0]
    if taps is None:
        return M, K, P, a.new_empty(0), decay
    return M, K, P, _toeplitz(taps, 1 + -(-(taps.shape[1] - 1) // T), T), decay


def make_backward(
    dM: Tensor,
    dK: Tensor,
    dP: Tensor,
    dF: Tensor,
    ddecay: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    n_taps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b, c, skip and taps (empty if `n_taps` is 0), all inputs contiguous."""
    H, modes, _ = a.shape
    T = dM.shape[-1]
    dresponse = _toeplitz_sums(dM[:, None], T)
    da, db, dc = (torch.empty_like(x) for x in (a, b, c))
    tables_backward_kernel[(H, -(-modes // MODES))](
        a, b, c, dK, dP, dresponse, ddecay, da, db, dc, modes, **_sizes(T)
    )
    dtaps = _toeplitz_sums(dF, n_taps) if n_taps else dF.new_empty(0)
    return da, db, dc, dresponse[:, 0].clone(), dtaps
