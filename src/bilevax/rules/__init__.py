"""Rules: how the derivative of the solution map is formed at an inexact solution."""

from bilevax.rules._base import Rule as Rule
from bilevax.rules._base import Settings as Settings
from bilevax.rules._changes import Change as Change
from bilevax.rules._changes import ChangeOfVariables as ChangeOfVariables
from bilevax.rules._changes import DiagonalChange as DiagonalChange
from bilevax.rules._changes import ExpChange as ExpChange
from bilevax.rules._diagonals import ExactDiagonal as ExactDiagonal
from bilevax.rules._diagonals import HutchinsonDiagonal as HutchinsonDiagonal
from bilevax.rules._implicit import Implicit as Implicit
from bilevax.rules._implicit import resolve_linear_solver as resolve_linear_solver
from bilevax.rules._preconditioned import Preconditioned as Preconditioned
from bilevax.rules._reparameterized import Reparameterized as Reparameterized
from bilevax.rules._steps import CustomStep as CustomStep
from bilevax.rules._steps import GradientStep as GradientStep
from bilevax.rules._steps import JacobiStep as JacobiStep
from bilevax.rules._steps import NewtonStep as NewtonStep
from bilevax.rules._steps import Step as Step
from bilevax.rules._tasks import correct_tasks as correct_tasks
from bilevax.rules._tasks import pull_tasks as pull_tasks
from bilevax.rules._tasks import push_tasks as push_tasks
from bilevax.rules._tasks import with_failed as with_failed
