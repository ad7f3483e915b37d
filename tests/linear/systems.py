"""Linear systems, NumPy's word on them, and one compiled solve that the tests here share."""

import functools

import jax
import numpy as np
from jax.custom_derivatives import linear_call

import bilevax as bx

POSITIVE_DEFINITE = bx.Structure.POSITIVE_DEFINITE
SYMMETRIC = bx.Structure.SYMMETRIC
GENERAL = bx.Structure.GENERAL
SIZE = 8  # one size for all, so that a solver is compiled once per dtype


@functools.partial(jax.jit, static_argnames=("structure", "transpose", "on_failure"))
def _solve(solver, matrix, rhs, guess, structure, transpose, on_failure):
    operator = bx.LinearOperator(lambda v: matrix @ v, structure, rhs)
    return bx.linear_solve(
        operator, rhs, solver, transpose=transpose, guess=guess, on_failure=on_failure
    )


def solve(
    solver,
    matrix,
    rhs,
    guess=None,
    *,
    structure=POSITIVE_DEFINITE,
    transpose=False,
    on_failure=bx.OnFailure.RETURN,
):
    """Return v and its report, as NumPy arrays, with the status as a `Status`."""
    v, report = _solve(solver, matrix, rhs, guess, structure, transpose, on_failure)
    report = jax.tree.map(np.asarray, report)
    return np.asarray(v), report._replace(status=bx.Status(int(report.status)))


@functools.partial(jax.jit, static_argnames="transposable")
def _solve_with_callbacks(solver, matrix, rhs, guess, transposable):
    def on_host(matrix, v):
        _products.append(None)
        return np.asarray(matrix) @ np.asarray(v)

    def multiply(matrix, v):
        return jax.pure_callback(on_host, rhs, matrix, v, vmap_method="sequential")

    def product(v):
        if not transposable:
            return multiply(matrix, v)
        return linear_call(multiply, lambda matrix, v: multiply(matrix.T, v), matrix, v)

    return bx.linear_solve(bx.LinearOperator(product, GENERAL, rhs), rhs, solver, guess=guess)[1]


_products = []


def count_products(solver, matrix, rhs, guess=None):
    """Return a report and the number of products with the matrix that were seen on the host."""
    _products.clear()
    transposable = not isinstance(solver, bx.Dense)  # which batches, and never transposes
    report = _solve_with_callbacks(solver, matrix, rhs, guess, transposable)
    report = jax.tree.map(np.asarray, report)
    return report, len(_products)


def with_spectrum(eigenvalues, seed=0):
    """Return a dense symmetric matrix that has these eigenvalues."""
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.normal(size=(len(eigenvalues), len(eigenvalues))))
    matrix = basis @ np.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def vector(seed=1, size=SIZE):
    return np.random.default_rng(seed).normal(size=size)


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def relative_residual(matrix, v, rhs):
    matrix, v, rhs = (np.asarray(part, np.float64) for part in (matrix, v, rhs))
    return np.linalg.norm(rhs - matrix @ v) / np.linalg.norm(rhs)


def conjugate_gradients(matrix, rhs, steps, preconditioner=None):
    """Return the iterates of Hestenes and Stiefel's method from zero, the first step's first."""
    apply = (lambda r: r) if preconditioner is None else (lambda r: preconditioner @ r)
    x, r = np.zeros_like(rhs), rhs.copy()
    z = apply(r)
    p, iterates = z.copy(), []
    for _ in range(steps):
        image = matrix @ p
        alpha = (r @ z) / (p @ image)
        x = x + alpha * p
        following = r - alpha * image
        following_z = apply(following)
        p = following_z + (following @ following_z) / (r @ z) * p
        r, z = following, following_z
        iterates.append(x)
    return iterates
