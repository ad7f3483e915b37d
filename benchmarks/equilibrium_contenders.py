"""The contenders of `equilibrium.py`: one hypergradient of an equilibrium model by each library.

The layer is z = tanh(W z + U u + b), the loss that of a linear read-out. "stacked" solves one
system for the whole batch, "per example" has every example stop by itself, under `vmap`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxopt
import lineax as lx
import numpy as np
import optimistix as optx
from jaxopt import linear_solve

import bilevax as bx

DIM, BATCH, INPUTS, OUTPUTS = 512, 256, 128, 10
STEPS = [*range(4, 11), *range(12, 24, 2)]
MAXITER = 200


class Data(NamedTuple):
    """An equilibrium model: arrays of JAX or NumPy, or their shapes."""

    weights: tuple[Any, Any, Any]  # W, U, b
    inputs: Any  # (batch, inputs)
    readout: Any  # (outputs, dim)
    targets: Any  # (batch, outputs)


class Contender(NamedTuple):
    """A way to compute the hypergradient.

    Attributes:
      library: whose solvers do it.
      name: which of them.
      kind: "tuned"; "default" for what the library does untold; "reference" for what is not of the
        library alone.
      gradient: (numbers, data) -> cotangents of W, U and b.
      fields: the names of the numbers.
      ladder: the numbers to try.
    """

    library: str
    name: str
    kind: str
    gradient: Callable[[Any, Data], Any]
    fields: tuple[str, ...] = ()
    ladder: Sequence[tuple[Any, ...]] = ((),)


def make_data(matrix: str, norm: float) -> Data:
    """Draw a model whose W has this spectral norm: a Gaussian matrix, or an orthogonal one."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((DIM, DIM))
    if matrix == "orthogonal":
        weight = np.linalg.qr(weight)[0]
    weights = (
        norm * weight / np.linalg.norm(weight, 2),
        rng.standard_normal((DIM, INPUTS)) / np.sqrt(INPUTS),
        0.1 * rng.standard_normal(DIM),
    )
    inputs = rng.standard_normal((BATCH, INPUTS))
    readout = rng.standard_normal((OUTPUTS, DIM)) / np.sqrt(DIM)
    targets = rng.standard_normal((BATCH, OUTPUTS))
    return jax.tree.map(np.float32, Data(weights, inputs, readout, targets))


def true_gradient(data: Data) -> tuple[np.ndarray, ...]:
    """Return the hypergradient in float64: iterations until they stop to change anything."""
    data = jax.tree.map(np.float64, data)
    W, U, b = data.weights
    drive = data.inputs @ U.T + b
    z = _iterate(lambda z: np.tanh(z @ W.T + drive), np.zeros((BATCH, DIM)))
    slope = 1 - z**2
    cotangent = (z @ data.readout.T - data.targets) @ data.readout / BATCH
    v = slope * _iterate(lambda v: (slope * v) @ W + cotangent, cotangent)
    return v.T @ z, v.T @ data.inputs, v.sum(axis=0)


def _iterate(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    for _ in range(5000):
        x, previous = function(x), x
        if np.linalg.norm(x - previous) <= 1e-14 * np.linalg.norm(x):
            return x
    raise RuntimeError("the iteration for the true gradient does not converge")


def layer(z: jax.Array, weights: Any, u: jax.Array) -> jax.Array:
    """Return T(z) for one example or a batch."""
    W, U, b = weights
    return jnp.tanh(z @ W.T + u @ U.T + b)


def loss(z: jax.Array, data: Data) -> jax.Array:
    return jnp.mean(jnp.sum((z @ data.readout.T - data.targets) ** 2, axis=1)) / 2


def through(
    solve: Callable[[Any, jax.Array, jax.Array], jax.Array], data: Data, stacked: bool
) -> Any:
    """Return the gradient of the loss through solve(weights, u, z0), which finds z."""

    def objective(weights: Any) -> jax.Array:
        each = functools.partial(solve, weights)
        z0 = jnp.zeros((BATCH, DIM))
        return loss((each if stacked else jax.vmap(each))(data.inputs, z0), data)

    return jax.grad(objective)(data.weights)


def by_hand(numbers: Any, data: Data) -> Any:
    """Return what the fewest products give: U u once, T_1 from the last T, no stopping test."""
    steps, terms = numbers
    W, U, b = data.weights
    drive = data.inputs @ U.T + b
    # The first step, from zero, is free.
    z = jax.lax.fori_loop(1, steps, lambda _, z: jnp.tanh(z @ W.T + drive), jnp.tanh(drive))
    cotangent = jax.grad(loss)(z, data)
    slope = 1 - z**2
    v = jax.lax.fori_loop(1, terms, lambda _, v: (slope * v) @ W + cotangent, cotangent)
    v = slope * v
    return v.T @ z, v.T @ data.inputs, v.sum(axis=0)


def with_jax(numbers: Any, data: Data) -> Any:
    """Return what a user writes by hand: the layer and its derivatives by JAX."""
    steps, terms = numbers
    step = functools.partial(layer, weights=data.weights, u=data.inputs)
    z = jax.lax.fori_loop(0, steps, lambda _, z: step(z), jnp.zeros((BATCH, DIM)))
    cotangent = jax.grad(loss)(z, data)
    _, pull = jax.vjp(lambda z, weights: layer(z, weights, data.inputs), z, data.weights)
    v = jax.lax.fori_loop(1, terms, lambda _, v: pull(v)[0] + cotangent, cotangent)
    return pull(v)[1]


def bilevax(
    solver: Callable[..., bx.Solver], rule: Callable[..., bx.Rule]
) -> Callable[[Any, Data], Any]:
    """Use a solver and a rule, made of the numbers, on every example."""

    def gradient(numbers: Any, data: Data) -> Any:
        engine = bx.value_and_hypergradient(
            lambda z, _: loss(z, data),
            bx.separable(bx.fixed_point(layer), data.inputs),
            solver(*numbers),
            rule(*numbers),
        )
        return engine(data.weights, bx.cold_start(jnp.zeros((BATCH, DIM)))).gradient

    return gradient


def with_jaxopt(
    make: Callable[..., Any], solver: Callable[..., Any] | None, stacked: bool
) -> Callable[[Any, Data], Any]:
    """Use make(T, ...) and a linear solver, of which the tolerances are the numbers."""

    def gradient(numbers: Any, data: Data) -> Any:
        options: dict[str, Any] = {}
        if numbers:
            tol, linear_tol = numbers
            assert solver is not None
            options = {
                "tol": tol,
                "maxiter": MAXITER,
                "implicit_diff_solve": functools.partial(solver, tol=linear_tol),
            }

        def solve(weights: Any, u: jax.Array, z0: jax.Array) -> jax.Array:
            return make(layer, **options).run(z0, weights, u).params

        return through(solve, data, stacked)

    return gradient


def neumann(matvec: Callable[[jax.Array], jax.Array], b: jax.Array, tol: jax.Array) -> jax.Array:
    """Solve (T_1 - I)^T v = b by a Neumann series of `tol` terms, as JAXopt lets users do."""
    return jax.lax.fori_loop(1, tol, lambda _, v: v + matvec(v) - b, -b)


def with_optimistix(
    linear_solver: Callable[..., Any] | None, stacked: bool
) -> Callable[[Any, Data], Any]:
    """Use a fixed-point iteration and a linear solver of Lineax."""

    def gradient(numbers: Any, data: Data) -> Any:
        tol, *rest = numbers
        solver = optx.FixedPointIteration(rtol=tol, atol=tol)
        adjoint = optx.ImplicitAdjoint()
        if linear_solver is not None:
            # Cotangents of the mean over a batch are small: entries of about 1e-3.
            adjoint = optx.ImplicitAdjoint(linear_solver(rtol=rest[0], atol=1e-3 * rest[0]))

        def solve(weights: Any, u: jax.Array, z0: jax.Array) -> jax.Array:
            return optx.fixed_point(
                lambda z, arguments: layer(z, *arguments),
                solver,
                z0,
                (weights, u),
                max_steps=MAXITER,
                adjoint=adjoint,
            ).value

        return through(solve, data, stacked)

    return gradient


def normal_cg(rtol: Any, atol: Any) -> Any:
    return lx.Normal(lx.CG(rtol, atol, norm=optx.rms_norm))


def decades(first: float, last: float) -> list[float]:
    """Return powers of ten and of their square root, from a larger one down."""
    return [10.0**-power for power in np.arange(first, last + 0.1, 0.5)]


def contenders() -> list[Contender]:
    pairs = [(k, m) for k in STEPS for m in (k - 1, k, k + 1)]
    followed = [(t, m) for t in decades(1.5, 4.5) for m in STEPS]
    solved = [(t, r) for t in decades(1.5, 4.5) for r in decades(1.5, 4.5)]
    few = [(t, r) for t in decades(2, 4.5)[::2] for r in decades(1.5, 4.5)]
    iteration, implicit = bx.FixedPointIteration, bx.Implicit

    def fixed(steps: Any, terms: Any) -> bx.Solver:
        return iteration(rtol=0.0, atol=0.0, maxiter=steps)

    def series(_: Any, terms: Any) -> bx.Rule:
        return implicit(bx.Neumann(terms))

    def stopped(memory: int) -> Callable[..., bx.Solver]:
        return lambda rtol, _: iteration(rtol=rtol, maxiter=MAXITER, memory=memory)

    def adjoint(solver: Callable[..., Any], **options: Any) -> Callable[..., bx.Rule]:
        return lambda _, rtol: implicit(solver(rtol=rtol, **options))

    found = [
        Contender("by hand", "fewest products", "reference", by_hand, ("steps", "terms"), pairs),
        Contender("by hand", "vjp of the layer", "reference", with_jax, ("steps", "terms"), pairs),
    ]

    def add(library: str, name: str, gradient: Any, fields: str = "", ladder: Any = ((),)) -> None:
        kind = "default" if name.startswith("defaults") else "tuned"
        found.append(Contender(library, name, kind, gradient, tuple(fields.split()), ladder))

    def ours(name: str, solver: Any, rule: Any, fields: str = "", ladder: Any = ((),)) -> None:
        add("bilevax", name, bilevax(solver, rule), fields, ladder)

    ours("Picard steps, Neumann", fixed, series, "steps terms", pairs)
    ours("Picard, Neumann", stopped(0), series, "rtol terms", followed)
    ours("Picard, BiCGStab", stopped(0), adjoint(bx.BiCGStab), "rtol adjoint_rtol", solved)
    ours("Picard, GMRES(8)", stopped(0), adjoint(bx.GMRES, restart=8), "rtol adjoint_rtol", few)
    for memory in (2, 5):
        ours(f"Anderson({memory}), Neumann", stopped(memory), series, "rtol terms", followed[1::2])
    ours("defaults", iteration, implicit)
    ours("defaults, Anderson(5)", lambda: iteration(memory=5), implicit)

    picard, anderson = jaxopt.FixedPointIteration, jaxopt.AndersonAcceleration
    fields = "tol adjoint_tol"
    for stacked, how in ((True, "stacked"), (False, "per example")):
        # The tolerance is absolute; the norm of the whole batch is 16 times that of an example.
        ladder = [((16 if stacked else 1) * 10 * t, r) for t, r in solved]
        use = functools.partial(with_jaxopt, stacked=stacked)
        bicgstab = linear_solve.solve_bicgstab
        add("JAXopt", f"Picard, BiCGStab, {how}", use(picard, bicgstab), fields, ladder)
        for memory in (2, 5):
            make = functools.partial(anderson, history_size=memory)
            name = f"Anderson({memory}), BiCGStab, {how}"
            add("JAXopt", name, use(make, bicgstab), fields, ladder[::2])
        gmres = functools.partial(linear_solve.solve_gmres, restart=8)
        add("JAXopt", f"Picard, GMRES(8), {how}", use(picard, gmres), fields, ladder[::2])
        add("JAXopt", f"defaults, Picard, {how}", use(picard, None))
        add("JAXopt", f"defaults, Anderson, {how}", use(anderson, None))
    ladder = [(160 * t, m) for t, m in followed]
    own = with_jaxopt(picard, neumann, stacked=True)
    name = "Picard, user's own Neumann, stacked"
    found.append(Contender("JAXopt", name, "reference", own, ("tol", "terms"), ladder))

    for stacked, how in ((True, "stacked"), (False, "per example")):
        use = functools.partial(with_optimistix, stacked=stacked)
        add("Optimistix", f"Picard, BiCGStab, {how}", use(lx.BiCGStab), fields, few)
        gmres = functools.partial(lx.GMRES, restart=8, norm=optx.rms_norm)
        add("Optimistix", f"Picard, GMRES(8), {how}", use(gmres), fields, few)
        add("Optimistix", f"Picard, CG on A^T A, {how}", use(normal_cg), fields, few)
        add("Optimistix", f"defaults, {how}", use(None), "tol", [(1e-5,)])
    return found
