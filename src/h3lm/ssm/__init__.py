"""What a state space model is: its parameters and its views."""

from h3lm.ssm.diagonal import DiagonalSSM as DiagonalSSM
from h3lm.ssm.diagonal import discretize as discretize
from h3lm.ssm.dplr import DPLRSSM as DPLRSSM
from h3lm.ssm.dplr import DPLRSystem as DPLRSystem
from h3lm.ssm.hints import ParameterHint as ParameterHint
from h3lm.ssm.hints import SSMModule as SSMModule
from h3lm.ssm.hippo import diagonal_eigenvalues as diagonal_eigenvalues
from h3lm.ssm.hippo import legs_matrices as legs_matrices
from h3lm.ssm.hippo import legs_normal_plus_low_rank as legs_normal_plus_low_rank
from h3lm.ssm.operators import ChunkOperators as ChunkOperators
from h3lm.ssm.operators import DiagonalSystem as DiagonalSystem
from h3lm.ssm.shared_modes import SharedModesSSM as SharedModesSSM
from h3lm.ssm.shared_modes import TiedDiagonalSSM as TiedDiagonalSSM
from h3lm.ssm.shift import ShiftSSM as ShiftSSM
