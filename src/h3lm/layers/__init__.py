"""Modules from (B, L, D) to (B, L, D)."""

from h3lm.layers.attention import AttentionState as AttentionState
from h3lm.layers.attention import BidirectionalAttention as BidirectionalAttention
from h3lm.layers.attention import CausalAttention as CausalAttention
from h3lm.layers.block import Block as Block
from h3lm.layers.gss import GSS as GSS
from h3lm.layers.h3 import H3 as H3
from h3lm.layers.linear_attention import LinearAttention as LinearAttention
from h3lm.layers.long_conv import LongConv as LongConv
from h3lm.layers.mixers import MIXERS as MIXERS
from h3lm.layers.mixers import Mixer as Mixer
from h3lm.layers.mixers import MixerSizes as MixerSizes
from h3lm.layers.mixers import mixer as mixer
from h3lm.layers.mlp import MLP as MLP
from h3lm.layers.s4 import S4 as S4
from h3lm.layers.s4d import S4D as S4D
