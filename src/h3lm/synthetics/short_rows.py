"""Mixers over short rows, in as few operations as they can be said.

The layers run rows of any length: in chunks, with states, with filters from short tables. A row
of the lab is one chunk without a past, and nobody asks for its state. Each system is then one
Toeplitz matrix of its impulse response. The lab's models are so small that a step takes as long
as its operations are many; here they are a third as many. The function and its parameters are
the same.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from h3lm.layers.attention import CausalAttention
from h3lm.layers.h3 import H3
from h3lm.layers.projection import project_channel_first, project_channel_last
from h3lm.layers.recurrence import Recurrence
from h3lm.layers.s4 import S4
from h3lm.ssm import DiagonalSSM, ShiftSSM
from h3lm.ssm.dplr import DPLRSSM
from h3lm.ssm.shared_modes import SharedModesSSM, TiedDiagonalSSM

MAX_LENGTH = 256
Pair = tuple[Tensor, Tensor]  # real and imaginary parts


def shorten(model: nn.Module) -> None:
    """Let the mixers of a model run rows of up to `MAX_LENGTH` positions by a Toeplitz product.

    They return no state then. Longer rows run as ever, in plain PyTorch, which `vmap` knows; but
    S4's convolve with kept spectra where gradients are off, which it does not: they stay here.
    """
    for module in model.modules():
        if isinstance(module, H3):
            module.backend = "torch"
            module.diagonal_ssm.system()  # its kernel is tried at its first use
            module.forward = _for_short(module.forward, module, _h3, 1, MAX_LENGTH)  # type: ignore[method-assign]
        elif isinstance(module, Recurrence):
            module.backend = "torch"
            longest = None if isinstance(module, S4) else MAX_LENGTH
            if isinstance(module, S4):
                # kernels are tried at their first use, which cannot be while a step is traced;
                # short and long filters have kernels of their own
                for length in (2, MAX_LENGTH):
                    module.system().quick_filter(length)
            module.mix = _for_short(module.mix, module, _mix, 2, longest)  # type: ignore[method-assign]


def attend(
    mixer: CausalAttention,
    u: Float[Tensor, "B L D"],
    keep: Float[Tensor, "B heads L L"] | None = None,
) -> Float[Tensor, "B L D"]:
    """Causal attention without rotation, `keep` being the factors of dropout on its weights."""
    q, k, v = mixer.project(u, None)
    L = u.shape[1]
    ahead = torch.ones(L, L, dtype=torch.bool, device=u.device).triu(1)
    scores = (q / math.sqrt(mixer.head_dim)) @ k.mT
    weights = scores.masked_fill(ahead, -math.inf).softmax(-1)
    if keep is not None:
        weights = weights * keep
    return mixer.output_proj((weights @ v).transpose(1, 2).flatten(2))


def response(
    ssm: DiagonalSSM | TiedDiagonalSSM | SharedModesSSM | DPLRSSM, length: int
) -> Float[Tensor, "H L"]:
    """The impulse response of a layer's SSM, skip term included."""
    if isinstance(ssm, DPLRSSM):
        taps = ssm.system().quick_filter(length)
    else:
        taps = _sum_of_modes(*_modes(ssm), length)
    return _with_skip(taps.to(ssm.D.dtype), ssm.D)


def _modes(ssm: DiagonalSSM | TiedDiagonalSSM | SharedModesSSM) -> tuple[Pair, Pair]:
    """Decays a and weights b c of `ssm.system()`, (H, N/2), or (1, N/2) where all share them.

    In real numbers, since a compiler of kernels knows no complex ones: of these every operation
    would be a kernel, forward and backward.
    """
    C = ssm.C[..., 0], ssm.C[..., 1]
    if isinstance(ssm, SharedModesSSM):
        A = -torch.exp(ssm.log_neg_A_real[None]), torch.exp(ssm.log_A_imag[None])
        a, into = _hold(A)
        return a, _times((C[0] / 2, C[1] / 2), _over(into, A))
    A, dt = (-torch.exp(ssm.log_neg_A_real), ssm.A_imag), torch.exp(ssm.log_dt)[:, None]
    z = dt * A[0], dt * A[1]
    if ssm.discretization == "bilinear":
        below = 1 - z[0] / 2, -z[1] / 2
        a, b = _over((1 + z[0] / 2, z[1] / 2), below), _over((dt, torch.zeros_like(dt)), below)
    else:
        a, into = _hold(z)
        b = _over(into, A)
    if isinstance(ssm, DiagonalSSM):
        b = _times(b, (ssm.B[..., 0], ssm.B[..., 1]))
    return a, _times(b, C)


def _hold(z: Pair) -> tuple[Pair, Pair]:
    """exp(z) and exp(z) - 1, the latter without cancellation near 0."""
    grown, (cos, sin) = torch.expm1(z[0]), (torch.cos(z[1]), torch.sin(z[1]))
    im = (grown + 1) * sin
    return ((grown + 1) * cos, im), (grown * cos - 2 * torch.sin(z[1] / 2).square(), im)


def _sum_of_modes(pole: Pair, weight: Pair, length: int) -> Float[Tensor, "H L"]:
    """`DiagonalSystem.filter`: 2 Re(sum_n weight_n pole_n^l), in float64.

    Without logarithms and angles: in float64 squares lose nothing that float32 would see.
    """
    wide = torch.float32 if pole[0].device.type == "mps" else torch.float64
    pole = pole[0].to(wide), pole[1].to(wide)
    inner = 1 << ((length - 1).bit_length() + 1) // 2
    fine, pole = _powers(pole, inner)
    coarse, _ = _powers(pole, -(-length // inner))
    re, im = _times(coarse, (2 * weight[0].to(wide)[:, None], 2 * weight[1].to(wide)[:, None]))
    # the real part of a product, summed over modes
    taps = re[:, :, None] * fine[0][:, None] - im[:, :, None] * fine[1][:, None]
    return taps.sum(-1).flatten(1)[:, :length]


def _powers(a: Pair, count: int) -> tuple[Pair, Pair]:
    """(H, count, N/2): a^0 to a^(count - 1); and a to the least power of two not below count."""
    lags = torch.arange(count, device=a[0].device)
    power: Pair = torch.ones_like(a[0])[:, None], torch.zeros_like(a[0])[:, None]
    for bit in range((count - 1).bit_length()):
        on = ((lags >> bit) & 1).to(a[0].dtype)[:, None]
        power = _times(power, (1 + on * (a[0][:, None] - 1), on * a[1][:, None]))
        a = _times(a, a)
    return power, a


def _times(x: Pair, y: Pair) -> Pair:
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _over(x: Pair, y: Pair) -> Pair:
    size = y[0].square() + y[1].square()
    return _times(x, (y[0] / size, -y[1] / size))


def convolve(taps: Float[Tensor, "H L"], x: Float[Tensor, "H rows L"]) -> Float[Tensor, "H rows L"]:
    """Causal convolution of each channel's rows with its taps, as one matrix product."""
    return x @ _toeplitz(taps.to(x.dtype))


def _toeplitz(taps: Float[Tensor, "H L"]) -> Float[Tensor, "H L L"]:
    """[u, t] = taps[t - u], zero below the diagonal."""
    L = taps.shape[-1]
    return _shifted(F.pad(taps, (0, L)), L, -1)[..., :L]


def _shifted(row: Float[Tensor, "H W"], count: int, by: int) -> Float[Tensor, "H count W_by"]:
    """Copies of a row, each `by` = 1 or -1 places further on; what runs over is its neighbour's.

    Laid out one behind another and read at a distance of W + by: the gradient of an index would
    be a sum of scattered elements.
    """
    width = row.shape[-1] + by
    rows = row[:, None].expand(-1, count + (by > 0), -1).flatten(1)
    return rows[:, : count * width].unflatten(1, (count, width))


def _for_short(
    usual: Callable[..., Any],
    mixer: nn.Module,
    short: Callable[[Any, Tensor], Tensor],
    length_axis: int,
    longest: int | None,
) -> Callable[..., Any]:
    def run(u: Tensor, state: Any = None, *args: Any, **where: Any) -> Any:
        too_long = longest is not None and u.shape[length_axis] > longest
        if too_long or state is not None:
            return usual(u, state, *args, **where)
        return short(mixer, u), None

    return run


def _mix(mixer: Recurrence, u: Tensor) -> Tensor:
    ssm: Any = mixer.dplr_ssm if isinstance(mixer, S4) else mixer.diagonal_ssm
    return convolve(response(ssm, u.shape[2]), u.transpose(0, 1)).transpose(0, 1)


def _h3(mixer: H3, u: Tensor) -> Tensor:
    L, d = u.shape[1], mixer.head_dim
    q, k, v = (
        x.transpose(0, 1) for x in project_channel_first(mixer.qkv_proj, u).chunk(3, dim=1)
    )  # [D, B, L]
    s = convolve(_shift_response(mixer.shift_ssm, L), k)
    taps = response(mixer.diagonal_ssm, L)
    if d == 1:
        o = q * convolve(taps, s * v)
    else:
        q, s, v = (x.unflatten(0, (-1, d)) for x in (q, s, v))
        pairs = s[:, :, None] * v[:, None]  # [H, i, j, B, L]
        y = convolve(taps, pairs.flatten(1, 3)).view_as(pairs)
        o = (q[:, :, None] * y).sum(1).flatten(0, 1)
    return project_channel_last(mixer.output_proj, o.transpose(0, 1))


def _shift_response(ssm: ShiftSSM, length: int) -> Tensor:
    """`ShiftSSM.taps` by its definition, f_j = sum_n B_n C_{n+j}, without a transform."""
    known = min(length, ssm.d_state)
    # [j, n] = C[n + j], zero beyond its end
    windows = _shifted(F.pad(ssm.C, (0, known)), known, 1)[..., : ssm.d_state]
    taps = (windows * ssm.B[:, None]).sum(-1)
    return _with_skip(F.pad(taps, (0, length - known)), ssm.D)


def _with_skip(taps: Tensor, skip: Tensor) -> Tensor:
    return taps + F.pad(skip[..., None], (0, taps.shape[-1] - 1))
