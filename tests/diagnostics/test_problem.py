"""What `check_problem` finds, and what it must not find in smooth problems, in any units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import Structure, check_problem
from tests.everyday import slow

RNG = np.random.default_rng(0)
ROWS, SIZE = 30, 6
A, B = RNG.normal(size=(ROWS, SIZE)), RNG.normal(size=ROWS)
SIGNS = np.sign(B)
X = np.array([0.5, -0.7, 0.9, 0.3, -0.2, 1.1])


def kinds(check):
    return [text.split(":")[0] for text in check.findings]


# One objective for all, so that one program serves: y tells what it is a sum of.
TERMS = ("squares", "logistic", "cosh", "penalty", "lasso", "hinge", "max", "saddle")


def objective(x, y):
    """Return factor * f(units * x), f a weighted sum of terms."""
    weights, units, factor = y
    u = units * x
    margins = SIGNS * (A @ u)
    parts = {
        "squares": jnp.mean((A @ u - B) ** 2) / 2,
        "logistic": jnp.mean(jnp.logaddexp(0.0, -margins)),
        "cosh": jnp.mean(jnp.cosh(A @ u - B)),
        "penalty": jnp.sum(u**2) / 20,
        "lasso": jnp.sum(jnp.abs(u)),
        "hinge": jnp.mean(jnp.maximum(0.0, 1 - margins)),
        # Not jnp.max, whose derivative asks which entries of a product equal its largest one.
        "max": jnp.maximum(jnp.maximum(u[0], u[1]), u[2]),
        "saddle": -jnp.sum(u[:2] ** 2),
    }
    return factor * sum(weights[name] * parts[name] for name in TERMS)


def y_of(units=None, factor=1.0, dtype=float, **weights):
    units = np.ones(SIZE) if units is None else units
    given = {name: np.asarray(weights.get(name, 0.0), dtype) for name in TERMS}
    return given, np.asarray(units, dtype), np.asarray(factor, dtype)


def check(u, units=None, factor=1.0, dtype=float, seed=0, **weights):
    """Check the problem at the point that is u in the units of f."""
    units = np.ones(SIZE) if units is None else units
    x = jnp.asarray(u / units, dtype)
    return check_problem(bx.minimum(objective), x, y_of(units, factor, dtype, **weights), seed=seed)


SMOOTH = [
    {"squares": 1.0, "penalty": 1.0},
    {"logistic": 1.0, "penalty": 1.0},
    {"cosh": 1.0, "penalty": 1e-3},
    {"squares": 1.0},
    {"cosh": 30.0, "logistic": 10.0, "squares": 1e-3},
]


def test_smooth_problems_in_any_units_raise_no_alarm():
    random = np.random.default_rng(1)
    for k in range(50):
        units, factor = 10.0 ** random.uniform(-6, 6, SIZE), 10.0 ** random.uniform(-6, 6)
        u = random.normal(size=SIZE) * 10.0 ** random.uniform(-2, 0.5)
        u = u * (random.random(SIZE) < 0.8)  # some entries are zero, as at many starts
        found = check(u, units, factor, seed=k, **SMOOTH[k % len(SMOOTH)])
        assert found.findings == (), (k, found)
        assert found.rank == SIZE and found.curvature[0] > 0
        assert found.kink < 1e-6 and found.asymmetry < 1e-12


def test_what_is_measured_does_not_depend_on_units():
    """Eigenvalues of B are those of a matrix with a diagonal of one, up to how it was scaled."""
    units, factor = 10.0 ** np.array([-6, 6, 0, 3, -3, 1.0]), 1e5
    plain = check(X, squares=1.0, penalty=1.0)
    other = check(X, units, factor, squares=1.0, penalty=1.0)
    np.testing.assert_allclose(other.curvature, plain.curvature, rtol=0.1)
    # C is the inverse root of the diagonal of the Hessian, but for random signs.
    hessian = A.T @ A / ROWS + np.eye(SIZE) / 10
    scale = 1 / np.sqrt(np.linalg.norm(hessian, axis=1)) / units
    np.testing.assert_allclose(other.spread, scale.max() / scale.min(), rtol=1.0)
    value = factor * (np.mean((A @ X - B) ** 2) / 2 + X @ X / 20)
    gradient = factor * units * (A.T @ (A @ X - B) / ROWS + X / 10)
    wanted = np.sqrt(np.mean((X / units) ** 2)), value, np.max(np.abs(gradient))
    np.testing.assert_allclose(other.size, wanted, rtol=1e-10)


# A point with three margins of exactly one is where three hinges are.
AT_HINGES = np.linalg.lstsq(SIGNS[:3, None] * A[:3], np.ones(3), rcond=None)[0]
KINKS = {
    "lasso": (np.where(np.arange(SIZE) < 3, X, 0.0), {"squares": 1.0, "lasso": 0.1}),
    "near a kink": (np.where(np.arange(SIZE) < 3, X, 1e-4), {"squares": 1.0, "lasso": 0.1}),
    "hinge": (AT_HINGES, {"hinge": 1.0, "penalty": 1.0}),
    "max": (np.full(SIZE, 0.7), {"max": 0.3, "penalty": 1.0}),
    "at zero": (np.zeros(SIZE), {"squares": 1.0, "lasso": 1e-3}),
}


@pytest.mark.parametrize("name", KINKS)
def test_kinks_are_found_in_any_units(name):
    u, weights = KINKS[name]
    random = np.random.default_rng(2)
    for k in range(20):
        units, factor = 10.0 ** random.uniform(-6, 6, SIZE), 10.0 ** random.uniform(-6, 6)
        found = check(u, units, factor, seed=k, **weights)
        assert kinds(found) == ["kinks"], (k, found)
        assert found.kink > 0.05 and found.distance < 0.03


@pytest.mark.parametrize("seed", range(5))
def test_kinks_that_are_far_away_are_not_seen(seed):
    assert check(np.where(X > 0, 1.0, -1.0), squares=1.0, lasso=0.1, seed=seed).findings == ()


def test_curvature_of_both_signs_is_found():
    found = check(X, squares=1.0, saddle=3.0)
    assert kinds(found) == ["indefinite"] and "Start nearer to a minimum" in found.findings[0]
    hessian = A.T @ A / ROWS - 6 * np.diag(np.arange(SIZE) < 2)
    assert (
        np.sign(found.curvature).tolist() == np.sign(np.linalg.eigvalsh(hessian)[[0, -1]]).tolist()
    )
    # Declared, it is no fault.
    saddle = bx.minimum(objective, structure=Structure.SYMMETRIC)
    assert check_problem(saddle, X, y_of(squares=1.0, saddle=3.0)).findings == ()


@pytest.mark.parametrize("factor", [1e-170, 1e170])
def test_what_does_not_fit_into_the_numbers_is_out_of_range(factor):
    assert kinds(check(X, factor=factor, squares=1.0, penalty=1.0)) == ["out of range"]


def test_what_is_not_finite():
    assert kinds(check(np.full(SIZE, np.inf), squares=1.0)) == ["not finite"]
    assert "log(0)" in check(np.full(SIZE, np.nan), squares=1.0).findings[0]


@pytest.mark.slow
def test_in_float32():
    random = np.random.default_rng(3)
    for k in range(40):
        units = 10.0 ** random.uniform(-3, 3, SIZE)
        u = random.normal(size=SIZE)
        found = check(u, units, 10.0 ** random.uniform(-3, 3), np.float32, k, **SMOOTH[k % 4])
        assert found.findings == (), (k, found)
    for u, weights in (KINKS[name] for name in ("lasso", "hinge", "max")):
        assert kinds(check(u, dtype=np.float32, **weights)) == ["kinks"]
    assert kinds(check(X, factor=1e-20, dtype=np.float32, squares=1.0)) == ["out of range"]


# Roots, fixed points, and many of one kind.


def vector_field(x, y):
    """Return rows * F(units * x), F a sum of terms."""
    weights, units, rows = y
    u = units * x
    parts = {
        "general": A[:SIZE] @ u,
        "symmetric": A.T @ A @ u / ROWS,
        "tanh": jnp.tanh(u) + 2 * u,
        "relu": jax.nn.relu(u) + u,
        "flat": A[:SIZE, :4] @ (A[6:10] @ u),
    }
    return rows * (sum(weights[name] * part for name, part in parts.items()) - 0.3)


def check_root(u, structure=Structure.GENERAL, units=None, rows=None, seed=0, **weights):
    names = ("general", "symmetric", "tanh", "relu", "flat")
    units, rows = (np.ones(SIZE) if v is None else v for v in (units, rows))
    y = {name: np.asarray(weights.get(name, 0.0)) for name in names}, units, rows
    return check_problem(bx.root(vector_field, structure=structure), u / units, y, seed=seed)


def test_roots_in_units_of_their_unknowns_and_of_their_equations():
    random = np.random.default_rng(4)
    for k in range(40):
        units, rows = 10.0 ** random.uniform(-6, 6, (2, SIZE))
        u = random.normal(size=SIZE)
        smooth = [{"general": 1.0}, {"symmetric": 1.0}, {"general": 0.5, "tanh": 1.0}][k % 3]
        found = check_root(u, units=units, rows=rows, seed=k, **smooth)
        assert found.findings == () and found.rank == SIZE, (k, found)
        assert np.isnan([found.asymmetry, *found.curvature, found.size[1]]).all()
        flat = check_root(u, units=units, rows=rows, seed=k, flat=1.0)
        assert kinds(flat) == ["singular"] and flat.rank == 4
        bent = check_root(0 * u, units=units, rows=rows, seed=k, relu=1.0, symmetric=0.1)
        assert kinds(bent) == ["kinks"], (k, bent)


def test_a_structure_that_does_not_hold_is_found():
    found = check_root(X, Structure.SYMMETRIC, general=1.0)
    assert kinds(found) == ["not symmetric"] and "Structure.GENERAL" in found.findings[0]
    assert check_root(X, Structure.SYMMETRIC, symmetric=1.0).findings == ()
    units = 10.0 ** np.array([-6, 6, 0, 3, -3, 1.0])
    found = check_root(X, Structure.SYMMETRIC, units, units, symmetric=1.0, tanh=1.0)
    assert found.findings == ()  # D A D is symmetric in any units
    found = check_root(X, Structure.SYMMETRIC, units, 1 / units, symmetric=1.0, tanh=1.0)
    assert kinds(found) == ["not symmetric"]


def network(weights, y):
    hidden = jax.nn.relu(weights["in"] @ y + weights["bias"])
    return (weights["out"] @ hidden - 1.0) ** 2 + 0.01 * sum(
        jnp.sum(leaf**2) for leaf in jax.tree.leaves(weights)
    )


def test_a_relu_network_at_a_kink_and_far_from_one():
    """With biases of zero and an input of zero all units are at their kink."""
    random = np.random.default_rng(5)
    weights = {
        "in": jnp.asarray(random.normal(size=(5, 3))),
        "bias": jnp.zeros(5),
        "out": jnp.asarray(random.normal(size=5)),
    }
    assert "kinks" in kinds(check_problem(bx.minimum(network), weights, jnp.zeros(3)))
    open_units = dict(weights, bias=jnp.full(5, 9.0), out=0.02 * weights["out"])
    assert "kinks" not in kinds(check_problem(bx.minimum(network), open_units, jnp.ones(3)))


@pytest.mark.slow
def test_fixed_points_and_separable_problems():
    layer = bx.fixed_point(lambda x, y: jnp.tanh(0.3 * A[:SIZE] @ x + y))
    assert check_problem(layer, X, 0.1).findings == ()
    tasks = bx.separable(
        bx.minimum(lambda x, y, a: jnp.cosh(x - a) + y * jnp.abs(x)), jnp.arange(3.0)
    )
    assert check_problem(tasks, np.ones(3), 0.0).findings == ()
    assert kinds(check_problem(tasks, np.array([1.0, 0.0, 2.0]), 0.3)) == ["kinks"]


@pytest.mark.parametrize("size", [slow(150), 250])
def test_many_unknowns(size):
    """Beyond 200 Lanczos' method sees the ends of the spectrum, and no rank is computed."""

    def chain(x, y):
        return jnp.sum(jnp.cosh(x)) + y * jnp.sum(x[1:] * x[:-1])

    x = np.zeros(size)
    found = check_problem(bx.minimum(chain), x, 0.4)  # eigenvalues from 0.2 to 1.8
    assert found.findings == () and found.rank == (size if size <= 200 else -1)
    low, high = found.curvature
    np.testing.assert_allclose((low / high), 0.2 / 1.8, rtol=0.3)
    assert kinds(check_problem(bx.minimum(chain), x, 0.6)) == ["indefinite"]  # from -0.2


# Reports and bad input.


def test_the_table_says_what_was_found():
    u, weights = KINKS["lasso"]
    text = str(check(u, **weights))
    assert "rank 6" in text and "kinks: F jumps or bends near this x" in text
    assert str(check(X, squares=1.0)).endswith("nothing was found")


def test_remedies_of_solves_that_do_not_converge_suggest_it():
    assert "`check_problem`" in bx.Status.MAXITER.remedy
    assert "`check_problem`" in bx.Status.STALLED.remedy


def test_bad_input():
    problem = bx.minimum(lambda x, y: jnp.sum(x**2))
    with pytest.raises(TypeError, match=r"`problem` must be a Problem, for example `minimum"):
        check_problem(lambda x, y: x, X, 1.0)
    with pytest.raises(TypeError, match=r"`x` must be a floating array"):
        check_problem(problem, 3, 1.0)
    with pytest.raises(TypeError, match=r"`x` must have entries, got float64\[0\]"):
        check_problem(problem, np.zeros(0), 1.0)
    with pytest.raises(TypeError, match=r"`objective` must return a scalar, got float64\[6\]"):
        check_problem(bx.minimum(lambda x, y: x), X, 1.0)
    with pytest.raises(TypeError, match=r"cannot run inside of `jax\.jit`"):
        jax.jit(lambda x: check_problem(problem, x, 1.0).kink)(X)
    with pytest.raises(ValueError, match="`seed` must not be negative, got -1"):
        check_problem(problem, X, 1.0, seed=-1)
