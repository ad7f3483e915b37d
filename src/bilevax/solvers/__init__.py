"""Inner solvers."""

from bilevax.solvers._base import Iterate as Iterate
from bilevax.solvers._base import Solver as Solver
from bilevax.solvers._conjugate_gradient import ConjugateGradient as ConjugateGradient
from bilevax.solvers._fixed_point import FixedPointIteration as FixedPointIteration
from bilevax.solvers._gradient_descent import AcceleratedGradient as AcceleratedGradient
from bilevax.solvers._gradient_descent import GradientDescent as GradientDescent
from bilevax.solvers._line_search import Backtracking as Backtracking
from bilevax.solvers._newton import Newton as Newton
from bilevax.solvers._optax import Optax as Optax
