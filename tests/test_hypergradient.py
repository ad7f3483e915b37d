"""The engine: value, hypergradient, warm start and report in one pure function."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import bilevax as bx
from tests.everyday import params, slow

# min over x of <x, H x> / 2 + sum(exp(y) x^2) / 2 - <B, x>;  g(x, y) = |x - A|^2 / 2 + sum(y^2).
H = np.array([[2.0, 0.5], [0.5, 1.0]])
B, A = np.array([1.0, 3.0]), np.array([0.2, 0.8])
X0, Y = np.zeros(2), np.array([-0.4, 0.3])
SOLVER = bx.GradientDescent(0.4)


def inner(x, y):
    # Constants in the dtype of x, so that float32 is not computed in float64.
    matrix, b = jnp.asarray(H, x.dtype), jnp.asarray(B, x.dtype)
    return x @ matrix @ x / 2 + jnp.sum(jnp.exp(y) * x**2) / 2 - b @ x


def outer(x, y):
    return jnp.sum((x - jnp.asarray(A, x.dtype)) ** 2) / 2 + jnp.sum(y**2)


def truth(y):
    """Return x*, the value and the gradient of h by NumPy."""
    matrix = H + np.diag(np.exp(y))
    x = np.linalg.solve(matrix, B)
    gradient = 2 * y - np.linalg.solve(matrix, x - A) * np.exp(y) * x
    return x, np.sum((x - A) ** 2) / 2 + np.sum(y**2), gradient


def make(solver=SOLVER, rule=None, **options):
    return bx.value_and_hypergradient(outer, bx.minimum(inner), solver, rule, **options)


def test_value_gradient_point_and_report():
    result = make()(Y, bx.cold_start(X0))
    x, value, gradient = truth(Y)
    np.testing.assert_allclose(result.x, x, rtol=1e-11)
    np.testing.assert_allclose(result.value, value, rtol=1e-11)
    np.testing.assert_allclose(result.gradient, gradient, rtol=1e-10)
    np.testing.assert_array_equal(result.warm.x, result.x)
    v = np.linalg.solve(H + np.diag(np.exp(Y)), x - A)
    np.testing.assert_allclose(result.warm.adjoint, v, rtol=1e-10)
    assert result.report.inner.status == result.report.adjoint.status == bx.Status.CONVERGED
    np.testing.assert_allclose(result.report.inner.initial_residual, np.linalg.norm(B))
    assert result.report.inner.residual <= 2e-12 * np.linalg.norm(B)
    assert result.report.adjoint.iterations == 2  # conjugate gradients in two dimensions
    assert result.report.inner.correction is None
    assert result.aux is None


RULES = {
    "implicit": bx.Implicit(),
    "forward": bx.Implicit(mode="forward"),
    "dense": bx.Implicit(bx.Dense()),
    "preconditioned": bx.Preconditioned(bx.Implicit(bx.Dense()), bx.NewtonStep(bx.Dense())),
    "exponential": bx.Reparameterized(bx.Implicit(bx.Dense()), bx.ExpChange()),
    "diagonal": bx.Reparameterized(bx.Implicit(bx.Dense()), bx.DiagonalChange()),
}


@pytest.mark.parametrize(
    "name", params(zip(RULES, strict=True), lambda name: name not in ("dense", "exponential"))
)
def test_equals_the_gradient_through_the_solution_map(name):
    # At a rough solution, where the rules differ from the truth and from one another.
    solver = bx.GradientDescent(0.4, maxiter=3)
    result = make(solver, RULES[name])(Y, bx.cold_start(X0))
    solve = bx.solution_map(bx.minimum(inner), solver, RULES[name])
    value, gradient = jax.jit(jax.value_and_grad(lambda y: outer(solve(X0, y), y)))(Y)
    np.testing.assert_allclose(result.value, value, rtol=1e-14)
    np.testing.assert_allclose(result.gradient, gradient, rtol=1e-13)
    # Newton's step is exact on this quadratic; the other rules are not at this x.
    is_exact = np.linalg.norm(result.gradient - truth(Y)[2]) < 1e-10
    assert is_exact == (name == "preconditioned")
    assert result.report.inner.status == bx.Status.MAXITER
    assert result.report.inner.iterations == 3
    has_correction = name == "preconditioned"
    assert (result.report.inner.correction is not None) == has_correction


def test_the_default_rule_is_implicit():
    solver = bx.GradientDescent(0.4, maxiter=3)
    default = make(solver)(Y, bx.cold_start(X0))
    implicit = make(solver, bx.Implicit())(Y, bx.cold_start(X0))
    np.testing.assert_array_equal(default.gradient, implicit.gradient)


def test_roots_and_fixed_points():
    root = bx.root(lambda x, y: jax.grad(inner)(x, y))
    fixed_point = bx.fixed_point(lambda x, y: x - 0.4 * jax.grad(inner)(x, y))
    for problem, solver in ((root, SOLVER), (fixed_point, bx.FixedPointIteration())):
        rule = bx.Implicit(bx.Dense())
        result = bx.value_and_hypergradient(outer, problem, solver, rule)(Y, bx.cold_start(X0))
        np.testing.assert_allclose(result.value, truth(Y)[1], rtol=1e-11)
        np.testing.assert_allclose(result.gradient, truth(Y)[2], rtol=1e-10)


# Auxiliary output.


def test_aux_is_whatever_the_outer_objective_returns_besides():
    def with_aux(x, y):
        return outer(x, y), {"x": x, "count": jnp.int32(3), "none": None}

    engine = bx.value_and_hypergradient(with_aux, bx.minimum(inner), SOLVER, has_aux=True)
    for run in (engine, jax.jit(engine)):
        result = run(Y, bx.cold_start(X0))
        np.testing.assert_allclose(result.value, truth(Y)[1], rtol=1e-11)
        np.testing.assert_allclose(result.gradient, truth(Y)[2], rtol=1e-10)
        np.testing.assert_array_equal(result.aux["x"], result.x)
        assert result.aux["count"] == 3 and result.aux["none"] is None


# Warm starts.


def test_a_second_call_at_the_same_y_takes_no_iterations():
    # With an absolute tolerance; a relative one asks for less than ||F|| at the warm start.
    engine = make(bx.GradientDescent(0.4, atol=1e-10))
    cold = engine(Y, bx.cold_start(X0))
    again = engine(Y, cold.warm)
    assert cold.report.inner.iterations > 0 and cold.report.adjoint.iterations > 0
    assert again.report.inner.iterations == 0 and again.report.adjoint.iterations == 0
    assert again.report.inner.status == again.report.adjoint.status == bx.Status.CONVERGED
    np.testing.assert_array_equal(again.x, cold.x)
    np.testing.assert_array_equal(again.warm.adjoint, cold.warm.adjoint)
    np.testing.assert_allclose(again.gradient, cold.gradient, rtol=1e-14)


def test_a_second_call_with_default_tolerances_takes_no_inner_iterations():
    engine = make()
    again = engine(Y, engine(Y, bx.cold_start(X0)).warm)
    assert again.report.inner.iterations == 0


def test_a_warm_start_at_a_nearby_y_takes_fewer_iterations():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(30, 30))
    matrix = matrix @ matrix.T / 30 + 0.1 * np.eye(30)
    problem = bx.minimum(lambda x, y: x @ matrix @ x / 2 + jnp.sum(jnp.exp(y) * x**2) - jnp.sum(x))
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum(x**2),
        problem,
        bx.GradientDescent(0.15, atol=1e-6),
        bx.Implicit(bx.CG(atol=1e-6)),
    )
    y, cold_start = np.zeros(30), bx.cold_start(np.zeros(30))
    warm = engine(y, cold_start).warm
    nearby = y + 1e-4
    cold, warm = engine(nearby, cold_start).report, engine(nearby, warm).report
    assert 0 < warm.inner.iterations < 0.7 * cold.inner.iterations
    assert 0 < warm.adjoint.iterations < 0.7 * cold.adjoint.iterations
    assert warm.inner.status == warm.adjoint.status == bx.Status.CONVERGED


def test_the_start_changes_nothing_but_the_cost():
    engine = make()
    cold = engine(Y, bx.cold_start(X0))
    poor = engine(Y, bx.WarmStart(np.array([5.0, -9.0]), np.array([1e6, -1e6]), X0))
    np.testing.assert_allclose(poor.value, cold.value, rtol=1e-10)
    np.testing.assert_allclose(poor.gradient, cold.gradient, rtol=1e-10)


def test_an_outlier_leaves_no_trace():
    """At an extreme y, ||F(x0, y)|| is huge; the tolerance at the next y must not refer to it."""
    engine = make(bx.Newton(rtol=1e-6))
    warm = bx.cold_start(np.ones(2))
    for y in (Y, Y + 40.0, Y):
        result = engine(y, warm)
        warm = result.warm
    assert result.report.inner.status == bx.Status.CONVERGED
    np.testing.assert_allclose(result.x, truth(Y)[0], rtol=1e-5)
    np.testing.assert_allclose(result.gradient, truth(Y)[2], rtol=1e-4)


@pytest.mark.parametrize("on_failure", [bx.OnFailure.RETURN, bx.OnFailure.NAN])
def test_after_a_failure_the_next_solve_starts_cold(on_failure):
    engine = make(on_failure=on_failure)
    failed = engine(Y + np.inf, bx.cold_start(X0))
    assert failed.report.inner.status == bx.Status.NONFINITE
    np.testing.assert_array_equal(failed.warm.x, X0)
    np.testing.assert_allclose(engine(Y, failed.warm).gradient, truth(Y)[2], rtol=1e-10)


def test_the_tolerance_refers_to_the_cold_start():
    rtol = 1e-3
    engine = make(bx.GradientDescent(0.4, rtol=rtol, atol=0.0))
    cold = engine(Y, bx.cold_start(X0))
    near = truth(Y)[0] + 0.9 * (cold.x - truth(Y)[0])
    assert engine(Y, cold.warm._replace(x=near)).report.inner.iterations == 0


def test_a_cold_start_is_x0_and_zero():
    warm = bx.cold_start({"a": 2.0, "b": np.ones(2, np.float32)})
    assert isinstance(warm, bx.WarmStart)
    assert warm.x["a"] == 2 and warm.x["a"].dtype == jnp.float64 and not warm.x["a"].weak_type
    np.testing.assert_array_equal(warm.x["b"], np.ones(2))
    assert warm.adjoint["b"].dtype == jnp.float32
    assert jax.tree.structure(warm.adjoint) == jax.tree.structure(warm.x)
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(warm.adjoint))
    jax.tree.map(np.testing.assert_array_equal, warm.start, warm.x)


def test_warm_starts_of_a_change_whose_z_has_another_structure():
    change = bx.ChangeOfVariables(
        lambda z, y: jnp.exp(jnp.stack([z["first"], z["second"]])),
        lambda x, y: {"first": jnp.log(x[0]), "second": jnp.log(x[1])},
    )
    engine = make(rule=bx.Reparameterized(bx.Implicit(bx.CG()), change))
    x0 = np.ones(2)
    first = engine(Y, bx.cold_start(x0))
    second = engine(Y, first.warm)
    assert first.report.adjoint.iterations == 2 and second.report.adjoint.iterations == 0
    np.testing.assert_allclose(second.gradient, truth(Y)[2], rtol=1e-10)

    def step(warm, _):
        result = engine(Y, warm)
        return result.warm, result.report.adjoint.iterations

    _, iterations = jax.lax.scan(step, bx.cold_start(x0), length=2)
    assert iterations.tolist() == [2, 0]


# Transformations.


@pytest.mark.parametrize("name", [slow("implicit"), "preconditioned"])
def test_jit_equals_eager(name):
    engine = make(bx.GradientDescent(0.4, maxiter=5), RULES[name])
    eager, jitted = engine(Y, bx.cold_start(X0)), jax.jit(engine)(Y, bx.cold_start(X0))
    assert jax.tree.structure(jitted) == jax.tree.structure(eager)
    for got, want in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
        assert got.dtype == want.dtype
        # Residuals of a direct solve are rounding errors.
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-15)


def test_vmap_equals_a_loop_lane_by_lane():
    engine = make(bx.GradientDescent(0.4, maxiter=50))
    y = np.stack([Y, Y + 0.5, np.array([9.0, 0.0]), Y - 3.0])  # the third one diverges
    x0 = np.stack([X0, X0 + 0.1, X0 - 0.1, X0])
    result = jax.vmap(lambda y, x0: engine(y, bx.cold_start(x0)))(y, x0)
    statuses = [bx.Status.CONVERGED, bx.Status.CONVERGED, bx.Status.DIVERGED, bx.Status.MAXITER]
    assert result.report.inner.status.tolist() == statuses
    for lane in range(4):
        alone = engine(y[lane], bx.cold_start(x0[lane]))
        lane_of = jax.tree.map(lambda leaf, lane=lane: leaf[lane], result)
        np.testing.assert_allclose(lane_of.x, alone.x, rtol=1e-13)
        np.testing.assert_allclose(lane_of.value, alone.value, rtol=1e-13)
        np.testing.assert_allclose(lane_of.gradient, alone.gradient, rtol=1e-13)
        np.testing.assert_allclose(lane_of.warm.adjoint, alone.warm.adjoint, rtol=1e-13)
        assert lane_of.report.inner.iterations == alone.report.inner.iterations
        assert lane_of.report.adjoint.status == alone.report.adjoint.status
        assert lane_of.report.adjoint.iterations == alone.report.adjoint.iterations


def test_a_training_loop_in_scan_equals_a_python_loop():
    engine = make(rule=bx.Preconditioned(bx.Implicit(), bx.NewtonStep()))
    optimizer = optax.adam(0.1)

    def outer_step(carry, _):
        y, state, warm = carry
        result = engine(y, warm)
        updates, state = optimizer.update(result.gradient, state, y)
        return (optax.apply_updates(y, updates), state, result.warm), result.report

    carry = start = (jnp.asarray(Y), optimizer.init(jnp.asarray(Y)), bx.cold_start(X0))
    for _ in range(4):
        carry, report = outer_step(carry, None)
    end, reports = jax.jit(lambda start: jax.lax.scan(outer_step, start, length=4))(start)
    for got, want in zip(jax.tree.leaves(end), jax.tree.leaves(carry), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    assert jnp.all(reports.inner.status == bx.Status.CONVERGED)
    assert reports.inner.iterations[-1] == report.inner.iterations
    # The same steps with NumPy's gradients.
    y, state = jnp.asarray(Y), optimizer.init(jnp.asarray(Y))
    for _ in range(4):
        updates, state = optimizer.update(jnp.asarray(truth(np.asarray(y))[2]), state, y)
        y = optax.apply_updates(y, updates)
    np.testing.assert_allclose(end[0], y, rtol=1e-9)


def test_traced_values_that_are_closed_over():
    def run(data, rate):
        problem = bx.minimum(lambda x, y: inner(x, y) + (B - data) @ x)
        engine = bx.value_and_hypergradient(
            lambda x, y: jnp.sum((x - data) ** 2), problem, bx.GradientDescent(rate)
        )
        return engine(Y, bx.cold_start(X0)).gradient

    matrix = H + np.diag(np.exp(Y))
    data = np.stack([B, A])
    for got in (jax.vmap(run)(data, np.array([0.4, 0.3])), [jax.jit(run)(d, 0.4) for d in data]):
        for lane in range(2):
            x = np.linalg.solve(matrix, data[lane])
            want = -np.linalg.solve(matrix, 2 * (x - data[lane])) * np.exp(Y) * x
            np.testing.assert_allclose(got[lane], want, rtol=1e-10)


def test_functions_with_data_as_partials():
    problem = bx.minimum(Partial(lambda data, x, y: inner(x, y) + data @ x, B - A))
    outer_of = Partial(lambda data, x, y: jnp.sum(x * data), A)
    result = bx.value_and_hypergradient(outer_of, problem, SOLVER)(Y, bx.cold_start(X0))
    matrix = H + np.diag(np.exp(Y))
    x = np.linalg.solve(matrix, A)
    np.testing.assert_allclose(result.value, x @ A, rtol=1e-10)
    want = -np.linalg.solve(matrix, A) * np.exp(Y) * x
    np.testing.assert_allclose(result.gradient, want, rtol=1e-10)


# Kinds of y and x.


def test_integer_and_key_leaves_of_y_get_float0():
    def shifted(x, y):
        noise = jax.random.normal(y["key"], x.shape)
        return jnp.sum((x - y["w"][y["index"]] - noise) ** 2) / 2

    y = {"w": jnp.arange(3.0), "index": jnp.array([2, 0]), "key": jax.random.key(0)}
    engine = bx.value_and_hypergradient(
        lambda x, y: x @ A + jnp.sum(y["w"] ** 2), bx.minimum(shifted), SOLVER
    )
    for run in (engine, jax.jit(engine)):
        gradient = run(y, bx.cold_start(X0)).gradient
        want = np.array([A[1], 0, A[0]]) + 2 * np.arange(3)
        np.testing.assert_allclose(gradient["w"], want, rtol=1e-10)
        for name in ("index", "key"):
            assert gradient[name].dtype == jax.dtypes.float0
            assert gradient[name].shape == y[name].shape


def test_pytrees_and_an_outer_objective_that_ignores_x_or_y():
    problem = bx.minimum(lambda x, y: jnp.sum(y["a"] * x["u"] ** 2 / 2 - x["u"]) + x["v"] ** 2)
    warm = bx.cold_start({"u": np.zeros(2), "v": 1.0})
    y = {"a": np.array([1.0, 2.0]), "unused": 3.0}
    result = bx.value_and_hypergradient(lambda x, y: jnp.sum(x["u"]), problem, SOLVER)(y, warm)
    np.testing.assert_allclose(result.gradient["a"], -1 / y["a"] ** 2, rtol=1e-10)
    assert result.gradient["unused"] == 0
    result = bx.value_and_hypergradient(lambda x, y: y["unused"] ** 2, problem, SOLVER)(y, warm)
    np.testing.assert_array_equal(result.gradient["a"], np.zeros(2))
    assert result.gradient["unused"] == 6
    assert result.report.adjoint.status == bx.Status.CONVERGED


def test_an_x_without_entries():
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum(y**2),
        bx.minimum(lambda x, y: jnp.sum(x) * 0.0 + 0 * jnp.sum(y)),
        SOLVER,
    )
    result = engine(Y, bx.cold_start(np.zeros(0)))
    np.testing.assert_allclose(result.gradient, 2 * Y)
    assert result.report.inner.status == result.report.adjoint.status == bx.Status.CONVERGED


def test_float32_stays_float32():
    y, warm = jnp.asarray(Y, jnp.float32), bx.cold_start(jnp.zeros(2, jnp.float32))
    result = make()(y, warm)
    for leaf in jax.tree.leaves(result):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    assert result.report.inner.status == result.report.adjoint.status == bx.Status.CONVERGED
    # rtol is 6.4e-6 and the condition number is below 3.
    np.testing.assert_allclose(result.value, truth(Y)[1], rtol=2e-5)
    np.testing.assert_allclose(result.gradient, truth(Y)[2], rtol=4e-5)


def test_plain_numbers_for_y_and_x():
    problem = bx.minimum(lambda x, y: y * x**2 / 2 - x)
    result = bx.value_and_hypergradient(lambda x, y: x * y**2, problem, SOLVER)(
        2.0, bx.cold_start(0.0)
    )
    np.testing.assert_allclose([result.value, result.gradient], [2.0, 1.0], rtol=1e-10)


# Policies; what each failure is, is tested in test_failure.py.


def test_a_failed_inner_solve_is_returned_or_nan():
    rate = bx.GradientDescent(3.0)
    result = make(rate)(Y, bx.cold_start(X0))
    assert result.report.inner.status == bx.Status.DIVERGED
    assert np.all(np.isfinite(result.x)) and np.isfinite(result.value)
    result = make(rate, on_failure=bx.OnFailure.NAN)(Y, bx.cold_start(X0))
    assert result.report.inner.status == bx.Status.DIVERGED
    for leaf in (result.x, result.value, result.gradient):
        assert np.all(np.isnan(leaf))
