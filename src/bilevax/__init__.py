"""Differentiable bilevel programming in JAX.

    min over y of  h(y) = g(x*(y), y)      where x*(y) solves an inner problem

F(x, y) = 0 is the inner problem: F is the gradient of an objective, a residual, or x - T(x, y).
F_1, F_2, g_1, g_2 are partial derivatives in the first and in the second argument.

`solution_map` makes y -> x*(y) a function that `jax.grad`, `jax.vmap` and `jax.jit` go through;
`value_and_hypergradient` returns the gradient of h with a report. See the README for a tour.

The family of estimators, with d = dim x, T inner steps that contract by q, k steps of the adjoint
solve (p < q for conjugate gradients), K steps differentiated, J batches; time in gradients of f:

| estimator                                | memory      | time        | error              |
|------------------------------------------|-------------|-------------|--------------------|
| `Implicit()`                             | d           | T + 2 k     | q^T + p^k          |
| `Preconditioned(Implicit(), NewtonStep())` | d         | T + 4 k     | (q^T)^2 + p^k      |
| `Implicit(Neumann(k))`                   | d           | T + 2 k     | q^T + q^k          |
| `Unrolled()`                             | T d         | 4 T         | T q^T              |
| `Unrolled(checkpoints="sqrt")`           | sqrt(T) d   | 5 T         | T q^T              |
| `Unrolled(last=K)`                       | K d         | T + 6 K     | q^T + q^K          |
| `Unrolled(mode="forward")`               | d per entry | 2 T per entry | T q^T            |
| `OneStep()`                              | d           | T + 3       | q                  |
| `stochastic_hypergradient(...)`          | d           | batches     | squared: 1/T + 1/k + 1/J |
"""

from bilevax._failure import OnFailure as OnFailure
from bilevax._failure import SolveError as SolveError
from bilevax._iterative import IterativeRule as IterativeRule
from bilevax._iterative import OneStep as OneStep
from bilevax._iterative import Unrolled as Unrolled
from bilevax._operator import LinearOperator as LinearOperator
from bilevax._operator import Structure as Structure
from bilevax._problems import Problem as Problem
from bilevax._problems import fixed_point as fixed_point
from bilevax._problems import minimum as minimum
from bilevax._problems import root as root
from bilevax._results import LinearReport as LinearReport
from bilevax._results import RuleReport as RuleReport
from bilevax._results import SolveReport as SolveReport
from bilevax._separable import Separable as Separable
from bilevax._separable import separable as separable
from bilevax._solution_map import SolutionMap as SolutionMap
from bilevax._solution_map import implicit_function as implicit_function
from bilevax._solution_map import solution_map as solution_map
from bilevax._status import Status as Status
from bilevax.certificates import AbsoluteAccuracy as AbsoluteAccuracy
from bilevax.certificates import Accuracy as Accuracy
from bilevax.certificates import Certificate as Certificate
from bilevax.certificates import EfficiencyConstant as EfficiencyConstant
from bilevax.certificates import RelativeAccuracy as RelativeAccuracy
from bilevax.certificates import efficiency_constant as efficiency_constant
from bilevax.certificates import hypergradient_error as hypergradient_error
from bilevax.diagnostics import HypergradientCheck as HypergradientCheck
from bilevax.diagnostics import ProblemCheck as ProblemCheck
from bilevax.diagnostics import RuleTable as RuleTable
from bilevax.diagnostics import assert_hypergradient as assert_hypergradient
from bilevax.diagnostics import check_hypergradient as check_hypergradient
from bilevax.diagnostics import check_problem as check_problem
from bilevax.diagnostics import recommend_rule as recommend_rule
from bilevax.hypergradient import Engine as Engine
from bilevax.hypergradient import Hypergradient as Hypergradient
from bilevax.hypergradient import HypergradientReport as HypergradientReport
from bilevax.hypergradient import WarmStart as WarmStart
from bilevax.hypergradient import cold_start as cold_start
from bilevax.hypergradient import value_and_hypergradient as value_and_hypergradient
from bilevax.linear import CG as CG
from bilevax.linear import GMRES as GMRES
from bilevax.linear import BiCGStab as BiCGStab
from bilevax.linear import Dense as Dense
from bilevax.linear import LinearSolver as LinearSolver
from bilevax.linear import LineaxSolver as LineaxSolver
from bilevax.linear import Neumann as Neumann
from bilevax.linear import NormalCG as NormalCG
from bilevax.linear import linear_solve as linear_solve
from bilevax.outer import Adaptive as Adaptive
from bilevax.outer import Best as Best
from bilevax.outer import BilevelHistory as BilevelHistory
from bilevax.outer import BilevelState as BilevelState
from bilevax.outer import Checkpointer as Checkpointer
from bilevax.outer import Constant as Constant
from bilevax.outer import Geometric as Geometric
from bilevax.outer import Harmonic as Harmonic
from bilevax.outer import Logarithmic as Logarithmic
from bilevax.outer import Milestone as Milestone
from bilevax.outer import MinimizeResult as MinimizeResult
from bilevax.outer import OpenCheckpoints as OpenCheckpoints
from bilevax.outer import Outcome as Outcome
from bilevax.outer import OuterStep as OuterStep
from bilevax.outer import Schedule as Schedule
from bilevax.outer import ScipyObjective as ScipyObjective
from bilevax.outer import Seconds as Seconds
from bilevax.outer import hoag as hoag
from bilevax.outer import make_step as make_step
from bilevax.outer import minimize as minimize
from bilevax.outer import scipy_objective as scipy_objective
from bilevax.rules import Change as Change
from bilevax.rules import ChangeOfVariables as ChangeOfVariables
from bilevax.rules import CustomStep as CustomStep
from bilevax.rules import DiagonalChange as DiagonalChange
from bilevax.rules import ExactDiagonal as ExactDiagonal
from bilevax.rules import ExpChange as ExpChange
from bilevax.rules import GradientStep as GradientStep
from bilevax.rules import HutchinsonDiagonal as HutchinsonDiagonal
from bilevax.rules import Implicit as Implicit
from bilevax.rules import JacobiStep as JacobiStep
from bilevax.rules import NewtonStep as NewtonStep
from bilevax.rules import Preconditioned as Preconditioned
from bilevax.rules import Reparameterized as Reparameterized
from bilevax.rules import Rule as Rule
from bilevax.rules import Step as Step
from bilevax.solvers import AcceleratedGradient as AcceleratedGradient
from bilevax.solvers import Backtracking as Backtracking
from bilevax.solvers import ConjugateGradient as ConjugateGradient
from bilevax.solvers import FixedPointIteration as FixedPointIteration
from bilevax.solvers import GradientDescent as GradientDescent
from bilevax.solvers import Iterate as Iterate
from bilevax.solvers import Newton as Newton
from bilevax.solvers import Optax as Optax
from bilevax.solvers import Solver as Solver
from bilevax.stochastic import DescentHistory as DescentHistory
from bilevax.stochastic import DescentResult as DescentResult
from bilevax.stochastic import EpochSampler as EpochSampler
from bilevax.stochastic import HostSampler as HostSampler
from bilevax.stochastic import Sampler as Sampler
from bilevax.stochastic import SamplerState as SamplerState
from bilevax.stochastic import StochasticEngine as StochasticEngine
from bilevax.stochastic import StochasticHypergradient as StochasticHypergradient
from bilevax.stochastic import StochasticProblem as StochasticProblem
from bilevax.stochastic import StochasticReport as StochasticReport
from bilevax.stochastic import StochasticState as StochasticState
from bilevax.stochastic import UniformSampler as UniformSampler
from bilevax.stochastic import decreasing as decreasing
from bilevax.stochastic import sihd as sihd
from bilevax.stochastic import stochastic_fixed_point as stochastic_fixed_point
from bilevax.stochastic import stochastic_hypergradient as stochastic_hypergradient
from bilevax.stochastic import stochastic_minimum as stochastic_minimum
