"""Mixers over short rows, in as few operations as they can be said.

The layers run rows of any length: in chunks, with states, with filters from short tables. A row
of the lab is one chunk without a past, and nobody asks for its state. Each system is then one
Toeplitz matrix of its impulse response. The lab's models are so small that a step takes as long
as its operations are many; here they are a third as many. The function and its parameters are
the same.
"""

import math
from collections.abc import Callable
from functools import cache
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
from h3lm.ssm import DiagonalSystem, ShiftSSM
from h3lm.ssm.dplr import DPLRSystem

MAX_LENGTH = 256
_BY_PRODUCT = 64  # longest filter whose matrix is cheaper as a product than as a shifted copy


def shorten(model: nn.Module) -> None:
    """Let the mixers of a model run rows of up to `MAX_LENGTH` positions by a Toeplitz product.

    They return no state then. Longer rows run as ever, in plain PyTorch, which `vmap` knows; but
    S4's convolve with kept spectra where gradients are off, which it does not: they stay here.
    """
    for module in model.modules():
        if isinstance(module, H3):
            module.backend = "torch"
            module.forward = _for_short(module.forward, module, _h3, 1, MAX_LENGTH)  # type: ignore[method-assign]
        elif isinstance(module, Recurrence):
            module.backend = "torch"
            longest = None if isinstance(module, S4) else MAX_LENGTH
            if isinstance(module, S4):
                # kernels are tried at their first use, which cannot be under vmap; short and long
                # filters have kernels of their own
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


def response(system: DiagonalSystem | DPLRSystem, length: int) -> Float[Tensor, "H L"]:
    """The impulse response, skip term included."""
    if isinstance(system, DPLRSystem):
        return _with_skip(system.quick_filter(length), system.skip)
    if length > _BY_PRODUCT:
        return _with_skip(system.filter(length), system.skip)
    powers = system.powers(torch.arange(length, device=system.a.device)).mT  # [H, L, N/2]
    weights = (2 * (system.b * system.c)).to(powers.dtype)
    # Re(w a^l) as a product of real rows and columns
    row = torch.stack([weights.real, -weights.imag], -1).flatten(1)
    taps = (torch.view_as_real(powers).flatten(2) @ row[..., None])[..., 0]
    return _with_skip(taps.to(system.skip.dtype), system.skip)


def convolve(taps: Float[Tensor, "H L"], x: Float[Tensor, "H rows L"]) -> Float[Tensor, "H rows L"]:
    """Causal convolution of each channel's rows with its taps, as one matrix product."""
    return x @ _toeplitz(taps.to(x.dtype))


def _toeplitz(taps: Float[Tensor, "H L"]) -> Float[Tensor, "H L L"]:
    """[u, t] = taps[t - u], zero below the diagonal.

    By a product, or by laying a row of 2 L out again and again at a distance of 2 L - 1: the
    gradient of an index would be a sum of scattered elements.
    """
    L = taps.shape[-1]
    if L <= _BY_PRODUCT:
        return (taps @ _shifts(L, taps.dtype, taps.device)).unflatten(-1, (L, L))
    rows = F.pad(taps, (0, L))[:, None].expand(-1, L, -1).flatten(1)
    return rows[:, : L * (2 * L - 1)].unflatten(1, (L, 2 * L - 1))[..., :L]


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
    return convolve(response(ssm.system(), u.shape[2]), u.transpose(0, 1)).transpose(0, 1)


def _h3(mixer: H3, u: Tensor) -> Tensor:
    L, d = u.shape[1], mixer.head_dim
    q, k, v = (
        x.transpose(0, 1) for x in project_channel_first(mixer.qkv_proj, u).chunk(3, dim=1)
    )  # [D, B, L]
    s = convolve(_shift_response(mixer.shift_ssm, L), k)
    taps = response(mixer.diagonal_ssm.system(), L)
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
    windows = F.pad(ssm.C, (0, known)).unfold(1, ssm.d_state, 1)[:, :known]
    taps = (windows @ ssm.B[..., None])[..., 0]
    return _with_skip(F.pad(taps, (0, length - known)), ssm.D)


def _with_skip(taps: Tensor, skip: Tensor) -> Tensor:
    return taps + skip[..., None] * _first(taps.shape[-1], taps.dtype, taps.device)


# Made once: as part of every step they were one operation in fifteen. On a GPU that is while a
# first pass warms up, before anything is captured.
@cache
def _shifts(length: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "L L_squared"]:
    """1 where column (u, t) is t - u = row; negative lags match no row."""
    at = torch.arange(length, device=device)
    lag = (at - at[:, None]).flatten()
    return (lag == at[:, None]).to(dtype)


@cache
def _first(length: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " L"]:
    """(1, 0, 0, ...)."""
    return (torch.arange(length, device=device) == 0).to(dtype)
