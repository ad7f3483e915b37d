"""A preconditioner of the problem: fewer products, and the same numbers as without it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import bilevax as bx
from tests.everyday import params, slow

RNG = np.random.default_rng(0)
SIZE = 12
FACTOR = RNG.normal(size=(15, SIZE))
MATRIX = FACTOR.T @ FACTOR / 15
RHS = RNG.normal(size=SIZE)
Y = np.exp(3 * RNG.normal(size=SIZE))  # a diagonal over six orders of magnitude
X0 = np.zeros(SIZE)
OUTER = RNG.normal(size=SIZE)
# F(x, y) = (A + K + diag(y)) x - b, with K antisymmetric for roots.
SKEW = RNG.normal(size=(SIZE, SIZE)) / 4
SKEW = SKEW - SKEW.T


def objective(x, y):
    return 0.5 * x @ (MATRIX @ x) + 0.5 * y @ x**2 - RHS @ x


def residual(x, y):
    return (MATRIX + SKEW) @ x + y * x - RHS


def exact(x, y, v):
    return jnp.linalg.solve(MATRIX + jnp.diag(y), v)


def diagonal(x, y, v):
    return v / (np.diag(MATRIX) + y)


def closed_form(matrix, y):
    """Return x* and the gradient of <c, x*> in y."""
    matrix = matrix + np.diag(y)
    x = np.linalg.solve(matrix, RHS)
    return x, -np.linalg.solve(matrix.T, OUTER) * x


def solve_with_hessian(problem, solver, y=Y):
    jacobian = problem.linearize(jnp.asarray(X0), y)[1]
    return bx.linear_solve(jacobian, jnp.asarray(OUTER), solver)


def test_a_solve_with_the_inverse_takes_one_step():
    v, report = solve_with_hessian(bx.minimum(objective, preconditioner=exact), bx.CG())
    assert int(report.iterations) == 1
    np.testing.assert_allclose(v, np.linalg.solve(MATRIX + np.diag(Y), OUTER), rtol=1e-10)
    _, without = solve_with_hessian(bx.minimum(objective), bx.CG())
    _, rough = solve_with_hessian(bx.minimum(objective, preconditioner=diagonal), bx.CG())
    assert int(without.iterations) > SIZE + 2 > int(rough.iterations)


@pytest.mark.parametrize("solver", [bx.GMRES(restart=2, maxiter=1), bx.BiCGStab(maxiter=2)])
@pytest.mark.parametrize("transpose", [False, True])
def test_solves_of_a_general_jacobian_and_its_transpose(solver, transpose):
    def inverse(x, y, v):
        return jnp.linalg.solve(MATRIX + SKEW + jnp.diag(y), v)

    problem = bx.root(residual, preconditioner=inverse)
    jacobian = problem.linearize(jnp.asarray(X0), Y)[1]
    v, report = bx.linear_solve(jacobian, jnp.asarray(OUTER), solver, transpose=transpose)
    matrix = MATRIX + SKEW + np.diag(Y)
    expected = np.linalg.solve(matrix.T if transpose else matrix, OUTER)
    np.testing.assert_allclose(v, expected, rtol=1e-9)
    assert report.status == bx.Status.CONVERGED
    jacobian_alone = bx.root(residual).linearize(jnp.asarray(X0), Y)[1]
    _, without = bx.linear_solve(jacobian_alone, jnp.asarray(OUTER), solver, transpose=transpose)
    assert without.status != bx.Status.CONVERGED
    # An operator knows the preconditioner of its transpose.
    pre = jacobian.transpose.preconditioner
    np.testing.assert_allclose(pre(jnp.asarray(OUTER)), np.linalg.solve(matrix.T, OUTER), rtol=1e-9)


# Each kind of problem, both preconditioners, and both modes with either of them.
EVERYDAY = {
    ("minimum", exact, "forward"),
    ("minimum", diagonal, "reverse"),
    ("root", diagonal, "forward"),
    ("fixed point", exact, "reverse"),
}


@pytest.mark.parametrize(
    ("kind", "preconditioner", "mode"),
    params(
        itertools.product(
            ["minimum", "root", "fixed point"], [None, exact, diagonal], ["reverse", "forward"]
        ),
        lambda *row: row in EVERYDAY,
        lambda argument: getattr(argument, "__name__", str(argument)),
    ),
)
def test_solutions_and_derivatives_do_not_depend_on_it(kind, preconditioner, mode):
    if kind == "minimum":
        problem, matrix = bx.minimum(objective, preconditioner=preconditioner), MATRIX
    elif kind == "root":
        problem, matrix = bx.root(residual, preconditioner=preconditioner), MATRIX + SKEW
    else:
        problem = bx.fixed_point(lambda x, y: x - residual(x, y), preconditioner=preconditioner)
        matrix = MATRIX + SKEW
    solve = bx.solution_map(problem, bx.Newton(rtol=1e-12), bx.Implicit(mode=mode))
    x, gradient = closed_form(matrix, Y)
    np.testing.assert_allclose(solve(X0, Y), x, rtol=1e-8, atol=1e-10)
    found = jax.jit(jax.grad(lambda y: OUTER @ solve(X0, y)))(Y)
    np.testing.assert_allclose(found, gradient, rtol=1e-6, atol=1e-9)
    if mode == "forward":
        tangent = jax.jvp(lambda y: OUTER @ solve(X0, y), (Y,), (np.ones(SIZE),))[1]
        np.testing.assert_allclose(tangent, gradient.sum(), rtol=1e-6)


def test_gradients_of_what_it_closes_over_are_those_of_the_objective():
    def value(scale, count):
        def scaled(x, y):
            return scale * objective(x, y) + 0.25 * jnp.sum(x**4)

        def inverse(x, y, v):  # closes over a traced float and a traced integer
            return exact(x, y, v) / scale * count

        problem = bx.minimum(scaled, preconditioner=inverse)
        return OUTER @ bx.solution_map(problem, bx.Newton(rtol=1e-13))(X0, Y)

    gradient, by_count = jax.jit(jax.grad(value, argnums=(0, 1), allow_int=True))(2.0, 3)
    step, value = 1e-4, jax.jit(value)
    difference = (value(2.0 + step, 3) - value(2.0 - step, 3)) / (2 * step)
    np.testing.assert_allclose(gradient, difference, rtol=1e-6)
    assert by_count.dtype == jax.dtypes.float0


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
def test_of_separable_problems_it_takes_the_task(mode):
    tasks = {"scale": np.array([1.0, 30.0, 1000.0]), "power": np.array([0, 1, 2])}

    def of_task(x, y, task):
        return task["scale"] * objective(x, y) + task["power"] * jnp.sum(x)

    def inverse(x, y, v, task):
        assert v.shape == (SIZE,)
        return exact(x, y, v) / task["scale"]

    def value(scale, y):
        problem = bx.minimum(of_task, preconditioner=inverse)
        problem = bx.separable(problem, tasks | {"scale": scale})
        solve = bx.solution_map(problem, bx.Newton(rtol=1e-13), bx.Implicit(mode=mode))
        return jnp.sum(solve(jnp.zeros((3, SIZE)), y) @ OUTER)

    by_scale, by_y = jax.jit(jax.grad(value, argnums=(0, 1)))(tasks["scale"], Y)
    # x = H^{-1} (b - power / scale), task by task.
    hessian, part = MATRIX + np.diag(Y), tasks["power"] / tasks["scale"]
    v = np.linalg.solve(hessian, OUTER)
    x = np.linalg.solve(hessian, (RHS - part[:, None]).T).T
    np.testing.assert_allclose(by_scale, part / tasks["scale"] * v.sum(), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(by_y, -v * x.sum(axis=0), rtol=1e-6, atol=1e-10)

    problem = bx.separable(bx.minimum(of_task, preconditioner=inverse), tasks)
    _, report = bx.Implicit(bx.CG()).pullback(
        problem, jnp.zeros((3, SIZE)), Y, jnp.tile(OUTER, (3, 1))
    )
    np.testing.assert_array_equal(report.solve.iterations, 1)


def test_what_does_not_depend_on_the_vector_is_computed_once():
    def inverse(x, y, v):
        factor = jax.scipy.linalg.cho_factor(MATRIX + jnp.diag(y))
        return jax.scipy.linalg.cho_solve(factor, v)

    problem = bx.minimum(objective, preconditioner=inverse)
    program = jax.make_jaxpr(lambda y: solve_with_hessian(problem, bx.CG(), y)[0])(Y)

    def names(jaxpr, inside):
        for equation in jaxpr.eqns:
            yield equation.primitive.name, inside
            for part in jaxprs_in_params(equation.params):
                yield from names(part, inside or equation.primitive.name == "while")

    factorisations = [inside for name, inside in names(program.jaxpr, False) if name == "cholesky"]
    assert factorisations == [False]
    assert ("triangular_solve", True) in set(names(program.jaxpr, False))


@pytest.mark.parametrize("rule", [None, bx.Implicit(mode="forward"), bx.Unrolled(), bx.OneStep()])
def test_it_need_not_have_derivatives(rule):
    def from_elsewhere(x, y, v):
        shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return v / (np.diag(MATRIX) + jax.pure_callback(np.asarray, shape, y))

    problem = bx.minimum(objective, preconditioner=from_elsewhere)
    solve = bx.solution_map(problem, bx.Newton(rtol=1e-12), rule)

    def gradient(y):
        return jax.grad(lambda y: OUTER @ solve(X0, y))(y)

    def total(y):
        first = gradient(y)
        return jnp.sum(first), first

    second, first = jax.jit(jax.grad(total, has_aux=True))(Y)
    x, expected = closed_form(MATRIX, Y)
    np.testing.assert_allclose(first, expected, rtol=1e-6, atol=1e-9)
    # The sum is -<v, x> with v = H^{-1} c, and both depend on y.
    inverse = np.linalg.inv(MATRIX + np.diag(Y))
    v = inverse @ OUTER
    np.testing.assert_allclose(second, v * (inverse @ x) + x * (inverse @ v), rtol=1e-6, atol=1e-9)


def test_an_operator_of_all_tasks_has_it_too():
    problem = bx.minimum(
        lambda x, y, t: t * objective(x, y), preconditioner=lambda x, y, v, t: exact(x, y, v) / t
    )
    problem = bx.separable(problem, np.array([1.0, 5.0]))
    jacobian = problem.linearize(jnp.zeros((2, SIZE)), Y)[1]
    v = jnp.asarray(RNG.normal(size=(2, SIZE)))
    np.testing.assert_allclose(jacobian.preconditioner(jacobian.matvec(v)), v, rtol=1e-8)


def test_a_solver_keeps_its_own_and_others_take_none():
    problem, plain = bx.minimum(objective, preconditioner=exact), bx.minimum(objective)
    own = bx.CG(preconditioner=lambda v: v)
    for solver in (own, bx.NormalCG(), bx.Dense()):
        (_, one), (_, other) = (solve_with_hessian(p, solver) for p in (problem, plain))
        assert int(one.iterations) == int(other.iterations)
        assert int(one.products) == int(other.products)


def test_in_other_coordinates_there_is_none():
    change = bx.DiagonalChange(lambda x, y: 1 / (1 + y))
    rule = bx.Reparameterized(bx.Implicit(bx.CG(rtol=1e-12)), change)
    x, gradient = closed_form(MATRIX, Y)
    products = []
    for preconditioner in (exact, None):
        problem = bx.minimum(objective, preconditioner=preconditioner)
        found, report = rule.pullback(problem, x, Y, jnp.asarray(OUTER))
        np.testing.assert_allclose(found, gradient, rtol=1e-6, atol=1e-9)
        products.append(int(report.solve.products))
    assert products[0] == products[1] > 2


def test_under_vmap_in_both_precisions():
    ys = np.stack([Y, 2 * Y, Y**0.5])
    for dtype, rtol in ((np.float64, 1e-7), (np.float32, 2e-3)):

        def in_dtype(function, dtype=dtype):
            return lambda *arguments: function(*arguments).astype(dtype)

        problem = bx.minimum(in_dtype(objective), preconditioner=in_dtype(exact))
        solve = bx.solution_map(problem, bx.Newton())

        def value(y, solve=solve, dtype=dtype):
            return solve(X0.astype(dtype), y) @ OUTER.astype(dtype)

        found = jax.jit(jax.vmap(jax.grad(value)))(ys.astype(dtype))
        assert found.dtype == dtype
        expected = np.stack([closed_form(MATRIX, y)[1] for y in ys])
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_engines_and_certificates_use_it():
    def loss(x, y):
        return OUTER @ x

    reports = []
    for preconditioner in (exact, None):
        problem = bx.minimum(objective, preconditioner=preconditioner)
        engine = bx.value_and_hypergradient(
            loss, problem, bx.ConjugateGradient(rtol=1e-3), bx.Implicit(), certified=True
        )
        result = engine(Y, bx.cold_start(X0))
        reports.append(result.report)
        wrong = np.linalg.norm(result.gradient - closed_form(MATRIX, Y)[1])
        np.testing.assert_allclose(result.report.certificate.absolute, wrong, rtol=1e-2)
    assert int(reports[0].adjoint.iterations) == 1
    # Five solves of one step, with a product each for what is left, beside solves of many steps.
    assert int(reports[0].certificate.products) <= 11
    assert 2 * int(reports[0].certificate.products) < int(reports[1].certificate.products)


@pytest.mark.parametrize("pose", [bx.minimum, bx.root, bx.fixed_point])
def test_what_is_no_preconditioner_is_refused(pose):
    with pytest.raises(TypeError, match=r"`preconditioner` must be a function, got 2\.0"):
        pose(objective, preconditioner=2.0)


def test_what_returns_no_vector_is_refused():
    problem = bx.minimum(objective, preconditioner=lambda x, y, v: jnp.sum(v))
    message = r"`preconditioner` must return shapes and dtypes like `v`.*float64\[12\].*float64\[\]"
    with pytest.raises(TypeError, match=message):
        bx.solution_map(problem, bx.Newton())(X0, Y)
    problem = bx.minimum(objective, preconditioner=lambda x, y, v: [v])
    with pytest.raises(TypeError, match="`preconditioner` must return a pytree like `v`"):
        bx.Implicit().pullback(problem, X0, Y, OUTER)
