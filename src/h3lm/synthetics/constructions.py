"""Weights that make one H3 layer solve associative recall exactly, and one choice that fails.

All of them use a shift SSM that looks one position back and a diagonal SSM that is a perfect
integrator, so that the state counts (previous token, this token) pairs; they differ in how keys
and values are written into channels. The claim is about the layer alone, on one-hot tokens: keys
are the ids 0 .. num_keys - 1, values num_keys .. num_keys + num_values - 1, any further token is
all zeros. Within a sequence a key must always have the same value.

Source: Fu et al. 2023 (arXiv 2212.14052v3), Appendix D.1, generalised from its toy language.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from h3lm.errors import UserError
from h3lm.layers.h3 import H3

NOT_SEEN = -1
_D_STATE = 2  # one tap back, one mode
# exp(-40) is far below the rounding of 1: the bilinear decay is 1 exactly, even in float64
_LOG_DECAY_RATE = -40.0


@dataclass(frozen=True)
class Construction:
    """A layer with its weights set, and how its output is read.

    Attributes:
        layer: The H3 layer, without biases.
        num_keys: Keys are the ids below.
        num_values: Values follow the keys.
        readout: Score of each value from the layer's output, (D, num_values).
    """

    layer: H3
    num_keys: int
    num_values: int
    readout: Tensor

    def embed(self, tokens: Integer[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """One-hot vectors; zero for an id that is neither key nor value."""
        weight = self.layer.qkv_proj.weight
        table = torch.zeros(self.num_keys + self.num_values + 1, self.layer.d_model)
        table[:-1].fill_diagonal_(1.0)
        known = tokens.clamp(max=self.num_keys + self.num_values)
        return table.to(weight)[known]

    def decide(self, y: Float[Tensor, "*rows D"]) -> Integer[Tensor, "*rows"]:
        """Index of the value that the output names, or `NOT_SEEN` where it is zero."""
        scores = y @ self.readout.to(y)
        return torch.where(y.abs().sum(-1) > 0, scores.argmax(-1), NOT_SEEN)


def outer_product_head(num_keys: int, num_values: int) -> Construction:
    """One head as wide as the vocabulary: its state is the table of counts itself.

    q and k pass the keys, v the values; at a key q the output is (times q was seen) e_value.
    Exact at every key position; T^2 integrators for T = num_keys + num_values.

    Raises:
        UserError: if there is no key or no value.
    """
    _check(num_keys, num_values)
    T = num_keys + num_values
    keys, values = torch.zeros(T, T), torch.zeros(T, T)
    keys[:num_keys, :num_keys].fill_diagonal_(1.0)
    values[num_keys:, num_keys:].fill_diagonal_(1.0)
    readout = torch.zeros(T, num_values)
    readout[num_keys:].fill_diagonal_(1.0)
    layer = _layer(T, T, keys, keys, values, torch.eye(T))
    return Construction(layer, num_keys, num_values, readout)


def one_hot_channels(num_keys: int, num_values: int) -> Construction:
    """Head dimension 1: a channel for each key and bit of the value.

    With b = ceil(log2 num_values) these are num_keys b channels. A key opens its own channels; a
    value writes +1 or -1 for each of its bits. At a key q bit j comes out as (times q was seen)
    times the bit's sign: exact at every length.

    Raises:
        UserError: if there is no key or no value.
    """
    _check(num_keys, num_values)
    codes = torch.eye(num_keys)
    return _bit_channels(num_keys, num_values, codes)


def parity_channels(num_keys: int, num_values: int) -> Construction:
    """As `one_hot_channels` with every parity of the key's bits in place of the key itself.

    The 2^b parities of b bits are orthogonal over all keys, so that other keys cancel.

    Raises:
        UserError: if there is no key or no value.
    """
    _check(num_keys, num_values)
    masks = torch.arange(1 << _bits(num_keys))
    overlap = torch.arange(num_keys)[:, None] & masks
    ones = sum((overlap >> j) & 1 for j in range(_bits(num_keys)))
    return _bit_channels(num_keys, num_values, 1.0 - 2.0 * (torch.as_tensor(ones) % 2))


def key_bit_channels(num_keys: int, num_values: int) -> Construction:
    """Head dimension 1 with one channel for each bit of the KEY and of the value: this one fails.

    What a query reads of another key is their number of equal bits less that of unequal ones,
    which is not zero: other keys' values leak in. No linear read-out with fewer key channels than
    keys can avoid it: the matrix of what keys read of each other would need rank num_keys.

    Raises:
        UserError: if there is no key or no value.
    """
    _check(num_keys, num_values)
    return _bit_channels(num_keys, num_values, _signs(num_keys))


def _bit_channels(num_keys: int, num_values: int, codes: Tensor) -> Construction:
    """Channels (key code, value bit), the code slow; `codes` is (num_keys, code length)."""
    signs = _signs(num_values)
    num_codes, num_bits = codes.shape[1], signs.shape[1]
    tokens, channels = num_keys + num_values, num_codes * num_bits
    D = max(tokens, channels)  # the one-hot tokens must fit, and further channels stay zero
    keys, values = torch.zeros(D, D), torch.zeros(D, D)
    keys[:channels, :num_keys] = codes.repeat_interleave(num_bits, 1).T
    values[:channels, num_keys:tokens] = signs.repeat(1, num_codes).T
    collect = torch.zeros(D, D)
    collect[:num_bits, :channels] = torch.eye(num_bits).repeat(1, num_codes)
    readout = torch.zeros(D, num_values)
    readout[:num_bits] = signs.T
    layer = _layer(D, 1, keys, keys, values, collect)
    return Construction(layer, num_keys, num_values, readout)


@torch.no_grad()
def _layer(d_model: int, head_dim: int, q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> H3:
    """An H3 layer of these projections around one step back and a perfect integrator."""
    layer = H3(d_model, _D_STATE, head_dim, bias=False)
    layer.qkv_proj.weight.copy_(torch.cat([q, k, v]))
    layer.output_proj.weight.copy_(output)
    shift, diagonal = layer.shift_ssm, layer.diagonal_ssm
    for parameter in (*shift.parameters(), *diagonal.parameters()):
        parameter.zero_()
    shift.B[:, 0] = 1.0
    shift.C[:, 1] = 1.0
    # dt = exp(0) = 1 exactly, so that the discrete input weight dt B is 1 exactly; the read-out is
    # 2 Re(c x)
    diagonal.log_neg_A_real.fill_(_LOG_DECAY_RATE)
    diagonal.B[..., 0] = 1.0
    diagonal.C[..., 0] = 0.5
    return layer.eval()


def _signs(count: int) -> Tensor:
    """Binary code of 0 .. count - 1 as +1 and -1, (count, bits)."""
    bits = torch.arange(count)[:, None] >> torch.arange(_bits(count))
    return 2.0 * (bits & 1) - 1.0


def _bits(count: int) -> int:
    return max(1, math.ceil(math.log2(count)))


def _check(num_keys: int, num_values: int) -> None:
    if num_keys < 1 or num_values < 1:
        raise UserError(f"need at least one key and one value, got {num_keys} and {num_values}")
