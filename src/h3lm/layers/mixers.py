"""Mixers by name: what a layer of a model may mix positions with."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from h3lm.layers.attention import BidirectionalAttention, CausalAttention
from h3lm.layers.gss import GSS
from h3lm.layers.h3 import H3
from h3lm.layers.linear_attention import LinearAttention
from h3lm.layers.long_conv import DEFAULT_FILTER_LENGTH, LongConv
from h3lm.layers.s4 import S4
from h3lm.layers.s4d import S4D


@dataclass(frozen=True)
class MixerSizes:
    """Sizes that the mixers of one model are built with.

    Attributes:
        d_model: Width D.
        d_state: State size of the state space models.
        h3_head_dim: Channels of an H3 head.
        h3_num_taps: Taps of H3's shift SSM; d_state if None.
        num_heads: Heads of attention.
        rotary_dim: Rotated features of an attention head; 0 for none.
        attention_dropout: Dropout on the attention weights.
        filter_length: Taps of a learned filter.
        dt_min, dt_max: Range of the state space models' step sizes at the start.
        bidirectional: Whether a position sees what comes after it.
        s4d_block: Whether S4D is the published block (A of each channel, gated output) instead
            of the H3 paper's baseline (one A, linear output).
    """

    d_model: int
    d_state: int = 64
    h3_head_dim: int = 1
    h3_num_taps: int | None = None
    num_heads: int = 1
    rotary_dim: int = 0
    attention_dropout: float = 0.0
    filter_length: int = DEFAULT_FILTER_LENGTH
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    bidirectional: bool = False
    s4d_block: bool = False


@dataclass(frozen=True)
class Mixer:
    """One kind of mixer.

    A mixer is a module with `forward(u, state=None, *, mask=None, cu_seqlens=None)` that returns
    the output and the state behind the last position. One of constant state also has
    `pack_state(state) -> (conv, recurrent)` and `unpack_state(conv, recurrent)`, the two tensors
    (either may be None) that a generation cache keeps for it.

    One that can be bidirectional is then called with `lengths` too, and returns no state.

    Attributes:
        build: Makes the module.
        constant_state: Whether the state has a fixed size; attention's grows with the sequence.
        can_be_bidirectional: Whether there is a form that sees what comes after a position.
    """

    build: Callable[[MixerSizes], nn.Module]
    constant_state: bool = True
    can_be_bidirectional: bool = True


def _h3(s: MixerSizes) -> nn.Module:
    return H3(
        s.d_model, s.d_state, s.h3_head_dim,
        num_taps=s.h3_num_taps, bidirectional=s.bidirectional, dt_min=s.dt_min, dt_max=s.dt_max,
    )  # fmt: skip


def _attention(s: MixerSizes) -> nn.Module:
    kind = BidirectionalAttention if s.bidirectional else CausalAttention
    return kind(s.d_model, s.num_heads, rotary_dim=s.rotary_dim, dropout=s.attention_dropout)


def _s4d(s: MixerSizes) -> nn.Module:
    return S4D(
        s.d_model, s.d_state,
        tied=not s.s4d_block, output="glu" if s.s4d_block else "linear",
        bidirectional=s.bidirectional, dt_min=s.dt_min, dt_max=s.dt_max,
    )  # fmt: skip


def _s4(s: MixerSizes) -> nn.Module:
    return S4(s.d_model, s.d_state, bidirectional=s.bidirectional, dt_min=s.dt_min, dt_max=s.dt_max)


def _long_conv(s: MixerSizes) -> nn.Module:
    return LongConv(s.d_model, s.filter_length, bidirectional=s.bidirectional)


MIXERS: dict[str, Mixer] = {
    "h3": Mixer(_h3),
    "attention": Mixer(_attention, constant_state=False),
    "s4d": Mixer(_s4d),
    "s4": Mixer(_s4),
    "long_conv": Mixer(_long_conv),
    "gss": Mixer(lambda s: GSS(s.d_model, num_modes=s.d_state), can_be_bidirectional=False),
    "linear_attention": Mixer(
        lambda s: LinearAttention(s.d_model, s.num_heads), can_be_bidirectional=False
    ),
}


def mixer(name: str) -> Mixer:
    """Look a mixer up.

    Raises:
        ValueError: if there is none of this name; names the nearest.
    """
    if name not in MIXERS:
        near = get_close_matches(name, MIXERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no mixer {name!r}, only {', '.join(MIXERS)}{hint}")
    return MIXERS[name]
