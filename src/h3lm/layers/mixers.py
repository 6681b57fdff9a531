"""Mixers by name: what a layer of a model may mix positions with."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from h3lm.layers.attention import CausalAttention
from h3lm.layers.gss import GSS
from h3lm.layers.h3 import H3
from h3lm.layers.linear_attention import LinearAttention
from h3lm.layers.s4 import S4
from h3lm.layers.s4d import S4D


@dataclass(frozen=True)
class MixerSizes:
    """Sizes that the mixers of one model are built with.

    Attributes:
        d_model: Width D.
        d_state: State size of the state space models.
        h3_head_dim: Channels of an H3 head.
        num_heads: Heads of attention.
        rotary_dim: Rotated features of an attention head; 0 for none.
        attention_dropout: Dropout on the attention weights.
    """

    d_model: int
    d_state: int = 64
    h3_head_dim: int = 1
    num_heads: int = 1
    rotary_dim: int = 0
    attention_dropout: float = 0.0


@dataclass(frozen=True)
class Mixer:
    """One kind of mixer.

    A mixer is a module with `forward(u, state=None, *, mask=None, cu_seqlens=None)` that returns
    the output and the state behind the last position. One of constant state also has
    `pack_state(state) -> (conv, recurrent)` and `unpack_state(conv, recurrent)`, the two tensors
    (either may be None) that a generation cache keeps for it.

    Attributes:
        build: Makes the module.
        constant_state: Whether the state has a fixed size; attention's grows with the sequence.
    """

    build: Callable[[MixerSizes], nn.Module]
    constant_state: bool = True


MIXERS: dict[str, Mixer] = {
    "h3": Mixer(lambda s: H3(s.d_model, s.d_state, s.h3_head_dim)),
    "attention": Mixer(
        lambda s: CausalAttention(
            s.d_model, s.num_heads, rotary_dim=s.rotary_dim, dropout=s.attention_dropout
        ),
        constant_state=False,
    ),
    "s4d": Mixer(lambda s: S4D(s.d_model, s.d_state, tied=True)),
    "s4": Mixer(lambda s: S4(s.d_model, s.d_state)),
    "gss": Mixer(lambda s: GSS(s.d_model, num_modes=s.d_state)),
    "linear_attention": Mixer(lambda s: LinearAttention(s.d_model, s.num_heads)),
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
