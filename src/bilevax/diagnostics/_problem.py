"""Is an inner problem what it is declared to be: smooth, symmetric, positive, of full rank."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._operator import Structure
from bilevax._problems import Minimum, Problem

PyTree = Any
_LARGEST_MATRIX = 200  # unknowns; of larger systems Lanczos sees the ends of the spectrum
_PROBES = 8
_REACH = 2.0**-5  # how far a line through x goes, in the unit of x
# Gauss-Legendre on (0, 1): exact for polynomials of degree 5.
_NODES = 0.5 + 0.5 * np.sqrt(0.6) * np.array([-1.0, 0.0, 1.0])
_WEIGHTS = np.array([5.0, 8.0, 5.0]) / 18


class ProblemCheck(NamedTuple):
    """What an inner problem is like near one point (x, y).

    Printed, it is a table, with what was found and what to do about it. Nothing here depends on the
    units of x (entry by entry), of f, or of the equations of a root: the numbers are those of
    B = R F_1 C, with diagonal R and C that make rows and columns of unit length.

    Attributes:
      findings: what is wrong, a tuple of texts that begin with "not finite", "out of range",
        "kinks", "not symmetric", "indefinite" or "singular"; empty where nothing was found.
      kink: the largest part of a change of F along a short piece of a line that its derivatives
        do not explain; it vanishes with the length of the piece if F is smooth.
      distance: how far from x that piece is, in the unit of x (root mean square in units C).
      asymmetry: ||B v - B^T v|| / ||B v|| of random v; NaN for `Structure.GENERAL`.
      curvature: the smallest and the largest eigenvalue of B; NaN for `Structure.GENERAL`.
      rank: of B, where it is small enough for a matrix; -1 where it is not.
      dimension: the number of unknowns.
      size: the root mean square of x, |f(x, y)| (NaN without an objective), and the largest entry
        of F(x, y).
      spread: the largest entry of C over the smallest: how far apart the units of x are.

    Example:
      >>> import bilevax as bx
      >>> check = bx.check_problem(bx.minimum(lambda x, y: y * x**2 + abs(x)), 0.0, 1.0)
      >>> check.findings[0].split(":")[0]
      'kinks'
    """

    findings: tuple[str, ...]
    kink: float
    distance: float
    asymmetry: float
    curvature: tuple[float, float]
    rank: int
    dimension: int
    size: tuple[float, float, float]
    spread: float

    def __str__(self) -> str:
        (low, high), (x, f, largest) = self.curvature, self.size
        rank = "not computed" if self.rank < 0 else str(self.rank)
        lines = [
            f"{'unknowns':<12} {self.dimension:>10}   rank {rank}",
            f"{'size':<12} {x:>10.1e}   of x; f {f:.1e}, F {largest:.1e}",
            f"{'units':<12} {self.spread:>10.1e}   largest over smallest, among the entries of x",
            f"{'kink':<12} {self.kink:>10.1e}   of a change of F, at distance {self.distance:.1e}",
            f"{'asymmetry':<12} {self.asymmetry:>10.1e}",
            f"{'curvature':<12} {low:>10.1e}   to {high:.1e}",
        ]
        return "\n".join([*lines, *(self.findings or ("nothing was found",))])


def check_problem(problem: Problem, x: PyTree, y: PyTree, *, seed: int = 0) -> ProblemCheck:
    """Look for what makes solvers and hypergradients fail: kinks, wrong structure, no curvature.

    Along random lines x + s d the change of F is compared with the integral of its derivative,

        F(x + b d) - F(x + a d)   against   integral from a to b of F_1(x + s d) d ds,

    on pieces that are cut in two where the two differ most. Of a smooth F nothing is left to
    explain in the end; a kink of f, where F jumps, and one of F, where F_1 does, stay what they
    are. Lines reach 3 % of the size of x from it, so kinks farther away are not seen.

    F_1 is compared with its transpose where it is declared symmetric, and its eigenvalues tell
    whether it is positive definite where that is declared: from the matrix for up to 200 unknowns,
    by 40 steps of Lanczos' method beyond. All of that in units in which rows and columns of F_1
    are of length one, which a few products with random signs find.

    It runs one compiled program and decides in Python, so not under `jax.jit`. What it does not
    find may still be there. F_1 should be positive definite near a solution; far away it need not
    be, and what is found there is no fault.

    Args:
      problem: `minimum(f)`, `root(F)`, `fixed_point(T)`, or many of one kind by `separable`.
      x: where to look, such as the last iterate of a solver that did not converge.
      y: the outer variable.
      seed: of the random directions.

    Returns:
      A `ProblemCheck`; `print` it.

    Raises:
      TypeError: if the problem does not fit x, or anything here is traced.
      ValueError: if `seed` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> saddle = bx.minimum(lambda x, y: x[0] ** 2 - y * x[1] ** 2)
      >>> print(check_problem(saddle, jnp.ones(2), 1.0).findings[0])
      indefinite: the Hessian has eigenvalues of both signs. Start nearer to a minimum, or declare \
`structure=Structure.SYMMETRIC`.

    Source:
      D. Ruiz, "A Scaling Algorithm to Equilibrate Both Rows and Columns Norms in Matrices", 2001;
      A. Bradley, "Algorithms for the Equilibration of Matrices and Their Application to
      Limited-Memory Quasi-Newton Methods", 2010.
    """
    checks.is_component("problem", problem, Problem, "minimum(objective)")
    checks.inner_variable(x)
    checks.outer_variable(y)
    checks.not_negative("seed", seed, whole=True)
    x, y = trees.as_arrays(x), trees.as_arrays(y)
    problem.check(x, y)
    if trees.dimension(x) == 0:
        raise TypeError(f"`x` must have entries, got {checks.describe(x)}.")
    measured = _measure(problem, x, y, seed)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(measured)):
        raise TypeError(
            "`check_problem` decides in Python, so it cannot run inside of `jax.jit`, `jax.grad` "
            "or `jax.vmap`, but something here is traced. Call it outside, with numbers."
        )
    return _judge(problem, x, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), measured))


class _Measured(NamedTuple):  # arrays of JAX, and then of NumPy
    value: Any
    optimality: Any  # F, flat
    units: Any  # C
    asymmetry: Any
    matrix: Any  # B, or the tridiagonal one of Lanczos' method
    misfits: Any  # per line: what is left to explain of a change of F
    variations: Any  # what its derivatives explain of it
    noise: Any  # the size of the terms in F
    places: Any


def _judge(problem: Problem, x: PyTree, found: _Measured) -> ProblemCheck:
    epsilon, dimension = trees.epsilon(x), trees.dimension(x)
    flat = np.asarray(ravel_pytree(x)[0], np.float64)
    largest = np.max(np.abs(found.optimality))
    is_symmetric, findings = problem.structure.is_symmetric, []
    name = "Hessian" if isinstance(problem, Minimum) else "Jacobian F_1"
    is_finite = np.isfinite(largest) and np.all(np.isfinite(found.matrix))
    rank, curvature = -1, (np.nan, np.nan)
    if not is_finite:
        findings.append(
            "not finite: F(x, y) or its derivative has infinities or NaN at this x. Look for "
            "overflow, log(0) or 0/0."
        )
    limits = np.finfo(jax.dtypes.canonicalize_dtype(ravel_pytree(x)[0].dtype))
    low, high = 1e3 * np.sqrt(limits.tiny), 1e-3 * np.sqrt(limits.max)
    if is_finite and largest > 0 and not low < largest < high:
        findings.append(
            f"out of range: F(x, y) is of size {largest:.0e}, whose square {limits.dtype} does not "
            "hold. Multiply the objective or the residual by a constant."
        )
    kinks = found.misfits - 0.05 * found.variations - 1e3 * epsilon * found.noise
    kinks = np.where(np.isfinite(kinks), kinks, -np.inf)
    line = int(np.argmax(kinks))
    explained = found.misfits[line] + found.variations[line]
    kink = found.misfits[line] / explained if explained > 0 else 0.0
    if kinks[line] > 0:
        findings.append(
            "kinks: F jumps or bends near this x, as it does for abs, max, or relu. Newton's "
            "steps, line searches and hypergradients need two derivatives: smooth the kink, solve "
            "the `fixed_point` of a proximal step, or start elsewhere."
        )
    asymmetry = float(np.max(found.asymmetry)) if is_symmetric else np.nan
    if is_symmetric and asymmetry > epsilon**0.5:
        findings.append(
            f"not symmetric: the {name} and its transpose are {asymmetry:.0e} apart. Declare "
            "`structure=Structure.GENERAL`."
        )
    if is_finite:
        rank, curvature, texts = _spectrum(problem, name, found.matrix, dimension, epsilon)
        findings += texts
    value = float(np.abs(found.value)) if isinstance(problem, Minimum) else np.nan
    return ProblemCheck(
        tuple(findings),
        float(kink),
        float(found.places[line]),
        asymmetry,
        curvature,
        rank,
        dimension,
        (float(np.sqrt(np.mean(flat**2))), value, float(largest)),
        float(np.max(found.units) / np.min(found.units)),
    )


def _spectrum(
    problem: Problem, name: str, matrix: np.ndarray, dimension: int, epsilon: float
) -> tuple[int, tuple[float, float], list[str]]:
    """Return rank, extreme eigenvalues (of symmetric ones), and what is wrong with them."""
    is_whole, findings = len(matrix) == dimension, []
    rounding = 100 * epsilon * np.sqrt(dimension)
    rank, curvature = -1, (np.nan, np.nan)
    if problem.structure.is_symmetric:
        values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        curvature = float(values[0]), float(values[-1])
        size, sizes = np.max(np.abs(values)), np.abs(values)
    else:
        sizes = np.linalg.svd(matrix, compute_uv=False)
        size = np.max(sizes)
    if is_whole:
        rank = int(np.sum(sizes > rounding * size))
    if problem.structure is Structure.POSITIVE_DEFINITE and curvature[0] < -rounding * size:
        both = "eigenvalues of both signs" if curvature[1] > 0 else "no positive eigenvalue"
        findings.append(
            f"indefinite: the {name} has {both}. Start nearer to a minimum, or declare "
            "`structure=Structure.SYMMETRIC`."
        )
    if is_whole and rank < dimension:
        findings.append(
            f"singular: the {name} has rank {rank} of {dimension}, so that the solution is not "
            "unique. Regularise the inner problem, or set `damping` on the linear solver."
        )
    return rank, curvature, findings


@jax.jit
def _measure(problem: Problem, x: PyTree, y: PyTree, seed: Any) -> _Measured:
    flat, unravel = ravel_pytree(x)
    keys = jax.random.split(jax.random.key(seed), 4)

    def optimality(u: jax.Array) -> jax.Array:
        return ravel_pytree(problem.optimality(unravel(u), y))[0]

    value = problem.function(x, y) if isinstance(problem, Minimum) else jnp.nan
    image, product = jax.linearize(optimality, flat)
    transposed = jax.linear_transpose(product, flat)
    rows, columns = _equilibrate(
        jax.vmap(product), jax.vmap(lambda v: transposed(v)[0]), flat, keys[0]
    )
    if problem.structure.is_symmetric:
        rows = columns = jnp.sqrt(rows) * jnp.sqrt(columns)

    def scaled(v: jax.Array) -> jax.Array:
        return rows * product(columns * v)

    signs = jax.random.rademacher(keys[1], (_PROBES, flat.size), flat.dtype)
    forward = jax.vmap(scaled)(signs)
    backward = jax.vmap(lambda v: columns * transposed(rows * v)[0])(signs)
    apart, size = (jax.vmap(trees.scaled_norm)(v) for v in (forward - backward, forward))
    if flat.size <= _LARGEST_MATRIX:
        matrix = jax.vmap(scaled)(jnp.eye(flat.size, dtype=flat.dtype)).T
    else:
        start = jax.random.normal(keys[2], flat.shape, flat.dtype)
        matrix = _lanczos(scaled, start, 40)

    # The unit of x, and where x is zero that of its distance from a solution.
    extent = trees.scaled_norm(flat / columns) / flat.size**0.5
    step = trees.scaled_norm(rows * image) / flat.size**0.5
    extent = jnp.where(extent > 0, extent, jnp.where(step > 0, step, 1))
    uniform = jax.random.uniform(keys[3], (_PROBES, flat.size), flat.dtype, -1.0, 1.0)
    misfits, variations, places = jax.vmap(
        lambda v, key: _kink(optimality, flat, extent * columns * v, rows, key)
    )(uniform, jax.random.split(keys[2], _PROBES))
    noise = trees.scaled_norm(rows * product(flat)) + trees.scaled_norm(rows * image)
    return _Measured(
        jnp.asarray(value),
        image,
        columns,
        apart / jnp.where(size > 0, size, 1),
        matrix,
        misfits,
        variations,
        noise,
        places,
    )


def _equilibrate(
    product: Any, transposed: Any, like: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return R and C, so that the rows and the columns of R A C are about of unit length.

    Lengths are those of products with random signs. A row or a column of zeros keeps its unit.
    """

    def lengths(images: jax.Array) -> jax.Array:
        size = jnp.max(jnp.abs(images), axis=0)
        unit = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
        return unit * jnp.sqrt(jnp.mean((images / unit) ** 2, axis=0))

    def halve(scale: jax.Array, length: jax.Array) -> jax.Array:
        usable = (length > 0) & jnp.isfinite(length)
        return scale / jnp.sqrt(jnp.where(usable, length, 1))

    def step(i: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, columns = state
        signs = jax.random.rademacher(
            jax.random.fold_in(key, i), (2, _PROBES, like.size), like.dtype
        )
        by_row = rows * lengths(product(columns * signs[0]))
        by_column = columns * lengths(transposed(rows * signs[1]))
        return halve(rows, by_row), halve(columns, by_column)

    # Each halves the distance of all units from one, in orders of magnitude.
    return jax.lax.fori_loop(0, 12, step, (jnp.ones_like(like), jnp.ones_like(like)))


def _lanczos(product: Any, start: jax.Array, steps: int) -> jax.Array:
    """Return the tridiagonal matrix of Lanczos' method with full orthogonalisation."""
    start = start / trees.norm(start)
    basis = jnp.zeros((steps, start.size), start.dtype).at[0].set(start)

    def step(i: Any, state: Any) -> Any:
        basis, matrix = state
        image = product(basis[i])
        matrix = matrix.at[i, i].set(basis[i] @ image)
        for _ in range(2):
            image = image - basis.T @ (basis @ image)
        length = trees.norm(image)
        following = image / jnp.where(length > 0, length, 1)
        # What is written beyond the end is dropped.
        basis = basis.at[i + 1].set(following, mode="drop")
        matrix = matrix.at[i + 1, i].set(length, mode="drop").at[i, i + 1].set(length, mode="drop")
        return basis, matrix

    empty = jnp.zeros((steps, steps), start.dtype)
    return jax.lax.fori_loop(0, steps, step, (basis, empty))[1]


def _kink(
    function: Any, x: jax.Array, direction: jax.Array, rows: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return misfit, variation and distance of the worst short piece of a line through x."""
    # A bend of F is seen inside of a piece only, so pieces are cut at random places, not at x.
    cuts = int(np.ceil(np.log2(2 * _REACH / trees.epsilon(x) ** (1 / 3)) / np.log2(1 / 0.6)))
    places = jax.random.uniform(key, (cuts,), x.dtype, 0.4, 0.6)

    def at(s: jax.Array) -> jax.Array:
        return function(x + s * direction)

    def judge(a: jax.Array, b: jax.Array, at_a: jax.Array, at_b: jax.Array) -> Any:
        nodes = a + (b - a) * _NODES.astype(x.dtype)
        slopes = jax.vmap(lambda s: rows * jax.jvp(at, (s,), (jnp.ones_like(s),))[1])(nodes)
        weights = (b - a) * _WEIGHTS.astype(x.dtype)
        misfit = trees.scaled_norm(rows * (at_b - at_a) - weights @ slopes)
        return misfit, weights @ jax.vmap(trees.scaled_norm)(slopes)

    def cut(i: Any, piece: Any) -> Any:
        a, b, at_a, at_b, *_ = piece
        middle = a + places[i] * (b - a)
        at_middle = at(middle)
        ends = jnp.stack([a, middle]), jnp.stack([middle, b])
        values = jnp.stack([at_a, at_middle]), jnp.stack([at_middle, at_b])
        misfits, variations = jax.vmap(judge)(*ends, *values)
        # A part with points where F is not defined tells nothing.
        worst = jnp.argmax(jnp.where(jnp.isfinite(misfits), misfits, -1))
        return tuple(leaf[worst] for leaf in (*ends, *values, misfits, variations))

    reach = jnp.asarray(_REACH, x.dtype)
    nothing = jnp.zeros((), x.dtype)
    piece = (-reach, reach, at(-reach), at(reach), nothing, nothing)
    a, b, _, _, misfit, variation = jax.lax.fori_loop(0, cuts, cut, piece)
    return misfit, variation, jnp.abs(a + b) / 2
