"""How a state space model is run: tensors in, tensors out."""

from h3lm.flashconv.dispatch import Choice as Choice
from h3lm.flashconv.dispatch import choose as choose
from h3lm.flashconv.fft_chunks import FFTOperators as FFTOperators
from h3lm.flashconv.fft_chunks import fft_operators as fft_operators
from h3lm.flashconv.fft_library import KeptFilter as KeptFilter
from h3lm.flashconv.op import fft_conv as fft_conv
from h3lm.flashconv.op import h3_core as h3_core
from h3lm.flashconv.op import h3_core_qkv as h3_core_qkv
from h3lm.flashconv.op import h3_end_state as h3_end_state
from h3lm.flashconv.op import ssm_conv as ssm_conv
from h3lm.flashconv.op import zero_state as zero_state
from h3lm.flashconv.state import H3State as H3State
from h3lm.flashconv.step import RingState as RingState
from h3lm.flashconv.step import StepOperators as StepOperators
from h3lm.flashconv.step import h3_step as h3_step
from h3lm.flashconv.step import h3_step_in_place as h3_step_in_place
