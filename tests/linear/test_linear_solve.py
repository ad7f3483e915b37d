"""The two entry points: failures, messages, defaults, empty systems, other people's solvers."""

import dataclasses
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

import bilevax as bx
from bilevax import OnFailure, Status
from bilevax.linear import default_rtol, transposable_solve
from tests.everyday import params
from tests.linear.systems import (
    GENERAL,
    POSITIVE_DEFINITE,
    SIZE,
    SYMMETRIC,
    relative_error,
    solve,
    vector,
    with_spectrum,
)

MATRIX = with_spectrum(np.linspace(1.0, 10.0, SIZE))
B = vector()
HOPELESS = bx.CG(rtol=1e-10, maxiter=1)
# Compiled programs cannot pass a `SolveError` on: JAX quotes it in an error of its own, which is a
# ValueError or a JaxRuntimeError depending on how the program was started.
RAISED = (bx.SolveError, jax.errors.JaxRuntimeError, ValueError)


def test_return_hands_back_what_there_is():
    v, report = solve(HOPELESS, MATRIX, B)
    assert report.status is Status.MAXITER
    np.testing.assert_allclose(v, (B @ B) / (B @ MATRIX @ B) * B)


def test_nan_takes_the_place_of_an_unfinished_solution():
    v, report = solve(HOPELESS, MATRIX, B, on_failure=OnFailure.NAN)
    assert report.status is Status.MAXITER
    assert np.all(np.isnan(v))


@pytest.mark.parametrize("policy", [OnFailure.NAN, OnFailure.RAISE])
def test_a_truncated_solution_is_no_failure(policy):
    v, report = solve(bx.CG(rtol=0.0, maxiter=1), MATRIX, B, on_failure=policy)
    assert report.status is Status.TRUNCATED
    np.testing.assert_allclose(v, (B @ B) / (B @ MATRIX @ B) * B)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (MATRIX, "linear solve ended with status MAXITER: raise `maxiter`, loosen `rtol`"),
        (-MATRIX, "linear solve ended with status INDEFINITE: start nearer to a minimum"),
        (0 * MATRIX, "linear solve ended with status BREAKDOWN: regularise the inner problem"),
        (np.nan * MATRIX, "linear solve ended with status NONFINITE: look for overflow"),
    ],
    ids=["maxiter", "indefinite", "breakdown", "nonfinite"],
)
def test_raise_names_the_status_and_the_remedy(matrix, message):
    with pytest.raises(RAISED, match=message):
        solve(HOPELESS, matrix, B, on_failure=OnFailure.RAISE)


@pytest.mark.parametrize("policy", [OnFailure.RETURN, OnFailure.NAN, OnFailure.RAISE])
def test_the_policy_holds_for_derivatives_too(policy):
    """With one eigenvalue one step solves for b = e_1, but not for the adjoint."""
    matrix, b, cotangent = np.diag(np.arange(1.0, SIZE + 1)), np.eye(SIZE)[0], np.ones(SIZE)

    def value(b):
        operator = bx.LinearOperator(lambda v: matrix @ v, POSITIVE_DEFINITE, b)
        v, report = bx.linear_solve(operator, b, HOPELESS, on_failure=policy)
        return cotangent @ v, report.status

    differentiate = jax.jit(jax.value_and_grad(value, has_aux=True))
    if policy is OnFailure.RAISE:
        with pytest.raises(RAISED, match="linear solve ended with status MAXITER"):
            jax.block_until_ready(differentiate(b))
        return
    (v, status), gradient = differentiate(b)
    assert (v, status) == (1.0, Status.CONVERGED)
    if policy is OnFailure.NAN:
        assert np.all(np.isnan(gradient))
    else:
        np.testing.assert_allclose(gradient, cotangent * SIZE / np.trace(matrix))


def test_a_single_system_cannot_be_dropped():
    with pytest.raises(
        ValueError, match=r"A linear solve by itself cannot be dropped: .*separable"
    ):
        solve(HOPELESS, MATRIX, B, on_failure=OnFailure.DROP)


def test_eager_calls_give_what_compiled_ones_give():
    operator = bx.LinearOperator(lambda v: MATRIX @ v, POSITIVE_DEFINITE, B)
    v, report = bx.linear_solve(operator, jnp.asarray(B), bx.CG(rtol=1e-10, maxiter=1000))
    compiled, compiled_report = solve(bx.CG(rtol=1e-10, maxiter=1000), MATRIX, B)
    np.testing.assert_allclose(v, compiled, rtol=1e-12)
    assert int(report.iterations) == compiled_report.iterations


@pytest.mark.parametrize("solver", [bx.CG(), bx.GMRES(), bx.Dense()], ids=repr)
def test_an_empty_system_has_an_empty_solution(solver):
    empty = {"a": jnp.zeros((0, 2))}
    operator = bx.LinearOperator(lambda v: v, POSITIVE_DEFINITE, empty)
    v, report = bx.linear_solve(operator, empty, solver)
    assert v["a"].shape == (0, 2)
    assert (report.status, report.iterations, report.residual) == (Status.CONVERGED, 0, 0)
    assert transposable_solve(operator, empty, solver)["a"].shape == (0, 2)


@pytest.mark.parametrize("structure", [GENERAL, SYMMETRIC, POSITIVE_DEFINITE])
def test_a_symmetric_operator_is_its_own_transpose(structure):
    matrix = np.arange(9.0).reshape(3, 3)
    operator = bx.LinearOperator(lambda v: matrix @ v, structure, jnp.ones(3))
    expected = matrix.T if structure is GENERAL else matrix
    np.testing.assert_allclose(operator.transpose.matvec(jnp.ones(3)), expected @ np.ones(3))
    assert structure.is_symmetric is (structure is not GENERAL)


def test_damped_operator():
    matrix = np.arange(9.0).reshape(3, 3)
    operator = bx.LinearOperator(lambda v: matrix @ v, GENERAL, jnp.ones(3)).damped(0.25)
    np.testing.assert_allclose(operator.matvec(jnp.ones(3)), matrix @ np.ones(3) + 0.25)


@pytest.mark.parametrize(("dtype", "wanted"), [(np.float32, 6.4e-6), (np.float64, 1.8e-12)])
def test_default_tolerance(dtype, wanted):
    np.testing.assert_allclose(default_rtol(jnp.ones(2, dtype)), wanted, rtol=0.02)


@pytest.mark.parametrize("kind", [bx.CG, bx.NormalCG, bx.GMRES, bx.BiCGStab])
def test_a_suggested_tolerance_is_taken_where_none_is_set(kind):
    assert kind().with_default_rtol(1e-3) == kind(rtol=1e-3)
    assert kind(rtol=0.0).with_default_rtol(1e-3) == kind(rtol=0.0)


@pytest.mark.parametrize("solver", [bx.Dense(), bx.Neumann(3)], ids=repr)
def test_solvers_without_a_tolerance_take_no_suggestion(solver):
    assert solver.with_default_rtol(1e-3) == solver


WITH_TOLERANCES = (bx.CG, bx.NormalCG, bx.GMRES, bx.BiCGStab)


@pytest.mark.parametrize("bad", [-1, -1e-9, float("nan")])
@pytest.mark.parametrize("field", ["rtol", "atol", "maxiter", "damping"])
@pytest.mark.parametrize("kind", WITH_TOLERANCES)
def test_numbers_must_not_be_negative(kind, field, bad):
    with pytest.raises(ValueError, match=f"`{field}` must not be negative, got {bad}"):
        kind(**{field: bad})


@pytest.mark.parametrize(
    "make",
    [
        bx.Dense,
        lambda damping: bx.Neumann(3, damping=damping),
        lambda damping: bx.LineaxSolver(lineax.LU(), damping=damping),
    ],
    ids=["Dense", "Neumann", "LineaxSolver"],
)
def test_damping_must_not_be_negative(make):
    with pytest.raises(ValueError, match=r"`damping` must not be negative, got -0\.5"):
        make(damping=-0.5)


def test_numbers_are_leaves_and_solvers_of_two_kinds_are_never_equal():
    solvers = [
        kind(rtol=1e-3, maxiter=5, damping=0.1) for kind in (bx.CG, bx.NormalCG, bx.BiCGStab)
    ]
    structures = [jax.tree.structure(solver) for solver in solvers]
    assert jax.tree.leaves(solvers[0]) == [1e-3, 0.0, 5, 0.1]
    assert len(set(structures)) == 3
    assert structures[0] != structures[1]
    assert jax.tree.structure(bx.CG(1e-3)) == jax.tree.structure(bx.CG(1e-5))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halving(bx.LinearSolver):
    """Someone's own solver, right for twice the identity."""

    atol: object
    damping: object = None

    def solve(self, operator, rhs, *, guess, prepared, transposed):
        status = jnp.asarray(int(Status.CONVERGED), jnp.int32)
        one = jnp.ones((), jnp.int32)
        return rhs / 2, bx.LinearReport(status, one, one, self.atol * jnp.ones(()))


def test_a_solver_of_ones_own_sees_a_right_hand_side_of_moderate_size():
    b = np.array([4.0, -2.0])
    v, report = solve(Halving(atol=8.0), 2 * np.eye(2), b)
    np.testing.assert_array_equal(v, [2.0, -1.0])
    assert report.residual == 8.0  # the absolute tolerance, in the unit of the scaled b
    for size in (2.0**600, 2.0**-600):
        v, report = solve(Halving(atol=8.0 * size), 2 * np.eye(2), size * b)
        np.testing.assert_array_equal(v, size * np.array([2.0, -1.0]))
        assert report.residual == 1.0  # of b / 2^603


PRECISIONS = {
    "64-32": (np.float64, np.float32),
    "32-16": (np.float32, np.float16),
    "32-b16": (np.float32, jnp.bfloat16),
    "b16-b16": (jnp.bfloat16, jnp.bfloat16),
}
WITH_PRECISIONS = [bx.CG(), bx.NormalCG(), bx.GMRES(), bx.BiCGStab(), bx.Dense()]
EVERYDAY = [*zip(WITH_PRECISIONS, [*PRECISIONS, "32-b16"], strict=True)]  # each of them once


@pytest.mark.parametrize(
    ("solver", "precision"),
    params(
        itertools.product(WITH_PRECISIONS, PRECISIONS),
        lambda *row: row in EVERYDAY,
        lambda part: part if isinstance(part, str) else type(part).__name__,
    ),
)
def test_mixed_and_low_precisions(solver, precision):
    """A solution is as accurate as the least precise leaf, and counts as converged."""
    wide, narrow = PRECISIONS[precision]
    matrix = with_spectrum(np.linspace(1.0, 3.0, SIZE))

    def product(v):
        image = jnp.asarray(matrix, wide) @ jnp.concatenate([v["wide"], v["narrow"].astype(wide)])
        return {"wide": image[:4], "narrow": image[4:].astype(narrow)}

    b = {"wide": jnp.ones(4, wide), "narrow": jnp.ones(4, narrow)}
    for structure in {GENERAL, POSITIVE_DEFINITE} if isinstance(solver, bx.Dense) else {GENERAL}:
        operator = bx.LinearOperator(product, structure, b)
        v, report = jax.jit(lambda solver, o=operator: bx.linear_solve(o, b, solver))(solver)
        assert Status(int(report.status)) is Status.CONVERGED
        assert (v["wide"].dtype, v["narrow"].dtype) == (wide, narrow)
        got = np.concatenate([np.asarray(leaf, float) for leaf in (v["wide"], v["narrow"])])
        # A relative residual of eps^(3/4), or of sqrt(eps) at the least; the condition number is 3.
        allowed = 3 * float(jnp.finfo(narrow).eps) ** 0.5
        assert relative_error(got, np.linalg.solve(matrix, np.ones(SIZE))) < allowed


def test_a_guess_of_another_size():
    operator = bx.LinearOperator(lambda v: v, POSITIVE_DEFINITE, B)
    message = r"`guess` must have as many entries as the unknown, 8; got float64\[3\]"
    with pytest.raises(TypeError, match=message):
        bx.linear_solve(operator, B, bx.CG(), guess=np.ones(3))


def test_preconditioners_must_be_functions_that_return_something_like_v():
    with pytest.raises(TypeError, match=r"`preconditioner` must be a function, got 2\.0"):
        bx.CG(preconditioner=2.0)
    message = r"`preconditioner` must return shapes and dtypes like `v`.*got float64\[\]"
    with pytest.raises(TypeError, match=message):
        solve(bx.GMRES(preconditioner=jnp.sum), MATRIX, B)


def test_a_batch_of_numbers_is_for_vmap():
    message = r"`rtol` of `CG` must be a single number, got float64\[2\]\. For a batch of them"
    with pytest.raises(TypeError, match=message):
        solve(bx.CG(rtol=np.ones(2)), MATRIX, B)


LINEAX = {
    "LU": (lineax.LU(), GENERAL),
    "Cholesky": (lineax.Cholesky(), POSITIVE_DEFINITE),
    "GMRES": (lineax.GMRES(rtol=1e-12, atol=0.0), SYMMETRIC),
}


@pytest.mark.parametrize(("solver", "structure"), LINEAX.values(), ids=LINEAX.keys())
def test_solvers_of_lineax(solver, structure):
    v, report = solve(bx.LineaxSolver(solver, damping=0.5), MATRIX, 1e-20 * B, structure=structure)
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.solve(MATRIX + 0.5 * np.eye(SIZE), 1e-20 * B)) < 1e-9
    assert report.iterations == -1 or report.iterations > 0
    assert report.products == -1


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_lineax_never_sees_a_guess_that_is_worse_than_zero(bad):
    solver = bx.LineaxSolver(lineax.CG(rtol=1e-10, atol=0.0))
    v, report = solve(solver, MATRIX, B, guess=np.full(SIZE, bad))
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.solve(MATRIX, B)) < 1e-9


def test_only_solvers_of_lineax_go_into_the_adapter():
    with pytest.raises(TypeError, match=r"`solver` must be .* for example `lineax.LU\(\)`; got 3"):
        bx.LineaxSolver(3)


def test_a_singular_matrix_breaks_down_in_lineax():
    singular = np.diag(np.arange(SIZE, dtype=float))
    _, report = solve(bx.LineaxSolver(lineax.LU()), singular, B, structure=GENERAL)
    assert report.status is Status.BREAKDOWN


WITHOUT_LINEAX = """
import sys
sys.modules["lineax"] = None
import bilevax as bx
try:
    bx.LineaxSolver(None)
except ImportError as error:
    print(error)
"""


def test_without_lineax_the_adapter_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LINEAX], capture_output=True, text=True, check=True
    )
    assert "install it with `pip install bilevax[lineax]`" in done.stdout


@pytest.mark.parametrize(
    "solver", [bx.GMRES(), bx.Dense(), bx.CG()], ids=lambda s: type(s).__name__
)
def test_a_right_hand_side_that_is_rounding_alone(solver):
    """Compiled into the same program as b, a solve is normalised by the b that it solves for.

    If b = y x - 1 were computed twice, once rounded to 0 and once not, v would be of size 1.
    """
    y = np.random.default_rng(0).uniform(0.2, 5.0, 64)
    x = 1 / y

    def solve(x, y):
        b = y * x - 1
        operator = bx.LinearOperator(lambda v: y * v, bx.Structure.GENERAL, b)
        return bx.linear_solve(operator, b, solver)[0]

    v = jax.jit(jax.vmap(solve))(x, y)
    np.testing.assert_allclose(v, np.zeros(64), atol=1e-14)  # |b| < 3e-16 and 1 / y <= 5
