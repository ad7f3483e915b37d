"""The outer loop: training runs on hypergradients."""

from bilevax.outer._adaptive import Adaptive as Adaptive
from bilevax.outer._checkpointing import Checkpointer as Checkpointer
from bilevax.outer._checkpointing import Identity as Identity
from bilevax.outer._checkpointing import OpenCheckpoints as OpenCheckpoints
from bilevax.outer._hoag import hoag as hoag
from bilevax.outer._maid import MaidStep as MaidStep
from bilevax.outer._maid import maid as maid
from bilevax.outer._minimize import minimize as minimize
from bilevax.outer._result import MinimizeResult as MinimizeResult
from bilevax.outer._result import Seconds as Seconds
from bilevax.outer._schedules import Constant as Constant
from bilevax.outer._schedules import Geometric as Geometric
from bilevax.outer._schedules import Harmonic as Harmonic
from bilevax.outer._schedules import Logarithmic as Logarithmic
from bilevax.outer._schedules import Schedule as Schedule
from bilevax.outer._scipy import ScipyObjective as ScipyObjective
from bilevax.outer._scipy import scipy_objective as scipy_objective
from bilevax.outer._state import Best as Best
from bilevax.outer._state import BilevelHistory as BilevelHistory
from bilevax.outer._state import BilevelState as BilevelState
from bilevax.outer._state import Milestone as Milestone
from bilevax.outer._state import Outcome as Outcome
from bilevax.outer._step import OuterStep as OuterStep
from bilevax.outer._step import make_step as make_step
