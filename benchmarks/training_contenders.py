"""The contenders of `training.py`: training runs by bilevax, and as users of its peers write them.

All take the same outer steps; what differs is where a hypergradient comes from.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxopt
import lineax as lx
import numpy as np
import optax
import optimistix as optx
from jaxopt import linear_solve
from training_problems import Training

import bilevax as bx

RTOL = 1e-8  # the tight tolerance
MAXITER = 20_000
HISTORY = 400  # steps that are remembered, more than are taken
ADAPTIVE = "warm x and v, Adaptive"
ADAPTIVE_NEWTON = ADAPTIVE + ", Newton"  # with the inner solver of that name
COLD = "cold, tight"


class Contender(NamedTuple):
    """A way to train.

    Attributes:
      library: whose solvers do it.
      name: how.
      rule: which derivative: "implicit" or "Newton".
      start: () -> the carry before the first step.
      step: carry -> carry.
      read: carry -> (y, x near x*(y)).
      tally: carry -> `Counts` of all steps; None where they are not known.
    """

    library: str
    name: str
    rule: str
    start: Callable[[], Any]
    step: Callable[[Any], Any]
    read: Callable[[Any], tuple[jax.Array, jax.Array]]
    tally: Callable[[Any], "Counts"] | None = None


class Counts(NamedTuple):
    """What each step cost."""

    gradients: np.ndarray  # in gradients of f, all included
    products: np.ndarray  # Hessian-vector products


def outer_optimizer(problem: Training) -> optax.GradientTransformation:
    """Return gradient descent with momentum; its step is tuned with exact hypergradients."""
    return optax.sgd(problem.step, 0.9, nesterov=True)


def contenders(problem: Training) -> Iterator[Contender]:
    yield from ours(problem)
    yield from jaxopts(problem)
    yield from optimistixes(problem)


# On digits it needs half the gradients of AcceleratedGradient from the cold start.
SOLVER = bx.ConjugateGradient(maxiter=MAXITER)
RULES = {
    "implicit": bx.Implicit(),
    "Newton": bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep()),
}
STARTS = {  # at the tight tolerance
    COLD: (False, False),
    "warm x, tight": (True, False),
    "warm x and v, tight": (True, True),
}
SCHEDULES = {
    "warm x and v, Geometric": bx.Geometric(),
    "warm x and v, Harmonic": bx.Harmonic(),
    "warm x and v, Logarithmic": bx.Logarithmic(5.0),
    ADAPTIVE: bx.Adaptive(),
}


def ours(problem: Training) -> Iterator[Contender]:
    for kind, rule in RULES.items():
        engine = bx.value_and_hypergradient(
            problem.outer, bx.minimum(problem.objective), SOLVER, rule
        )
        optimizer = outer_optimizer(problem)
        for name, (warm_x, warm_v) in STARTS.items():
            step = bx.make_step(
                engine,
                optimizer,
                schedule=bx.Constant(RTOL),
                warm_x=warm_x,
                warm_adjoint=warm_v,
            )
            yield _of_step(problem, name, kind, step)
        for name, schedule in SCHEDULES.items():
            step = bx.make_step(engine, optimizer, schedule=schedule)
            yield _of_step(problem, name, kind, step)
        # How many products are in its inner solves is not known.
        newton = bx.value_and_hypergradient(
            problem.outer, bx.minimum(problem.objective), bx.Newton(), rule
        )
        step = bx.make_step(newton, optimizer, schedule=bx.Adaptive())
        yield _of_step(problem, ADAPTIVE_NEWTON, kind, step)._replace(tally=None)
        if kind == "implicit":
            step = bx.hoag(engine)
            yield _of_step(problem, "HOAG, with its own steps", kind, step)


def _of_step(problem: Training, name: str, kind: str, step: bx.OuterStep) -> Contender:
    return Contender(
        "bilevax",
        name,
        kind,
        lambda: step.init(problem.y0, problem.x0, history=HISTORY),
        step,
        lambda state: (state.y, state.warm.x),
        functools.partial(_counts, step, kind == "Newton"),
    )


def _counts(step: bx.OuterStep, corrected: bool, state: bx.BilevelState) -> Counts:
    """Count gradients of f: a gradient of g is one, a product with a Hessian two.

    Whatever XLA may share between the parts of a step is counted each time.
    """
    taken = int(state.step)
    history = jax.tree.map(lambda leaf: np.asarray(leaf[:taken]), state.history)
    has_tolerance = not isinstance(step.schedule, bx.Logarithmic)
    guarded = step.warm_x and step.schedule.safeguarded and has_tolerance
    fixed = sum(
        (
            1,  # the scale: F at the cold start
            2 * guarded,  # the safeguard: F at the start, and at the cold one
            1 + 3,  # F at the start, and its rounding error: a linearisation and a product
            corrected,  # F and the linearisation of the correction
            1 + 1 + 2,  # gradient of g, linearisation and mixed derivative of the adjoint
        )
    )
    # F at 2 points and after 3 Newton steps that linearise; two adjoints; three numbers to judge.
    certified = np.where(np.isfinite(history.certificate), 2 + 6 + 2 * 4 + 5, 0)
    # An inner step linearises, multiplies, and evaluates F at the next point, if the first trial
    # is accepted, as near a solution it is.
    products = history.products + history.inner_iterations
    gradients = fixed + 2 * history.inner_iterations + 2 * products + certified
    return Counts(gradients, products)


def _plain(
    problem: Training, library: str, name: str, solve: Callable[[jax.Array, jax.Array], jax.Array]
) -> Contender:
    """Return the plain recipe: solve from x0, differentiate, step."""
    optimizer = outer_optimizer(problem)

    def h(y: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = solve(problem.x0, y)
        return problem.outer(x, y), x

    def step(carry: Any) -> Any:
        y, state, _, _ = carry
        (value, x), gradient = jax.value_and_grad(h, has_aux=True)(y)
        updates, state = optimizer.update(gradient, state)
        return jnp.asarray(optax.apply_updates(y, updates)), state, value, x

    return Contender(
        library,
        name,
        "implicit",
        lambda: (problem.y0, optimizer.init(problem.y0), jnp.zeros(()), problem.x0),
        step,
        lambda carry: (carry[0], carry[3]),
    )


def jaxopts(problem: Training) -> Iterator[Contender]:
    """JAXopt; adjoints by conjugate gradients, which is faster than its default."""
    adjoint = functools.partial(linear_solve.solve_cg, tol=RTOL, maxiter=MAXITER)
    # Its tolerances are absolute.
    tol = RTOL * float(jnp.linalg.norm(jax.grad(problem.objective)(problem.x0, problem.y0)))
    options: Any = {"tol": tol, "maxiter": MAXITER, "implicit_diff_solve": adjoint}
    solvers = {
        "LBFGS": jaxopt.LBFGS(problem.objective, **options),
    }
    for name, solver in solvers.items():
        yield _plain(problem, "JAXopt", name, lambda x, y, s=solver: s.run(x, y).params)
    if problem.is_quadratic:
        gradient = jax.grad(problem.objective)

        @jaxopt.implicit_diff.custom_root(gradient, solve=adjoint)
        def solve(x: jax.Array, y: jax.Array) -> jax.Array:
            def product(v: jax.Array) -> jax.Array:
                return jax.jvp(lambda x: gradient(x, y), (x,), (v,))[1]

            return x - adjoint(product, gradient(x, y))

        yield _plain(problem, "JAXopt", "solve_cg", solve)


def optimistixes(problem: Training) -> Iterator[Contender]:
    """Optimistix; adjoints by conjugate gradients, which is faster than its default."""
    linear_solver = lx.CG(rtol=RTOL, atol=RTOL, max_steps=MAXITER)
    options: Any = {
        "max_steps": MAXITER,
        "adjoint": optx.ImplicitAdjoint(linear_solver),
        "tags": frozenset({lx.positive_semidefinite_tag}),
    }
    minimisers = {
        "LBFGS": optx.LBFGS(rtol=RTOL, atol=RTOL),
    }

    def objective(x: jax.Array, y: jax.Array) -> jax.Array:
        return problem.objective(x, y)

    for name, solver in minimisers.items():
        yield _plain(
            problem,
            "Optimistix",
            name,
            lambda x, y, s=solver: optx.minimise(objective, s, x, y, **options).value,
        )
    newton = optx.Newton(rtol=RTOL, atol=RTOL, linear_solver=linear_solver)
    gradient = jax.grad(objective)
    yield _plain(
        problem,
        "Optimistix",
        "Newton, CG",
        lambda x, y: optx.root_find(gradient, newton, x, y, **options).value,
    )
