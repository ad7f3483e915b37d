"""Linear solvers, and the two functions that call them."""

from bilevax.linear._base import LinearSolver as LinearSolver
from bilevax.linear._base import default_rtol as default_rtol
from bilevax.linear._cg import CG as CG
from bilevax.linear._dense import Dense as Dense
from bilevax.linear._krylov import GMRES as GMRES
from bilevax.linear._krylov import BiCGStab as BiCGStab
from bilevax.linear._lineax import LineaxSolver as LineaxSolver
from bilevax.linear._neumann import Neumann as Neumann
from bilevax.linear._normal_cg import NormalCG as NormalCG
from bilevax.linear._solve import linear_solve as linear_solve
from bilevax.linear._solve import transposable_solve as transposable_solve
