"""How fast hypergradients converge in the number of steps, against theory: `make rates`.

The experiments of R. Grazzi, L. Franceschi, M. Pontil, S. Salzo, "On the Iteration Complexity of
Hypergradient Computation", 2020, and of R. Grazzi, M. Pontil, S. Salzo, "Convergence Properties of
Stochastic Hypergradients", 2021, made with bilevax. Errors are those to a hypergradient that NumPy
computes in float64 with dense matrices.

1. Four inner problems with a symmetric T_1 (see `rates_problems.py`). With t inner and k adjoint
   steps, q the spectral radius of T_1 at the solution and kappa = cond(I - T_1), the errors are

     ITD      `Unrolled()`               t q^t
     AID-FP   `Implicit(Neumann(k))`     q^t + q^k
     AID-CG   `Implicit(CG(maxiter=k))`  q^t + p^k,   p = (sqrt(kappa) - 1) / (sqrt(kappa) + 1)

   times constants. They are measured at t = k, and against k alone where x has converged. Factors
   are fitted to relative errors between 1e-5 and 1e-12, for ITD as (c_1 + c_2 t) q^t, and compared
   on a log scale: with "speed" 2, log(fitted) / log(q), half the steps will do. Where T is affine
   in (x, y) together (biased regularisation), ITD and AID-FP are the same numbers, without a factor
   t. Else ITD should be above AID-FP at every t = k. Theory says so of the bounds; the errors
   follow unless terms of ITD's cancel, as in kernel ridge regression with kernels much wider than
   here. That can happen at the first steps too: what counts are errors below a tenth.
2. The equilibrium model z = tanh(W z + U u + b) with ||W|| = 0.5 and 0.9, of which T_1 is not
   symmetric: ITD, AID-FP, and AID with CG on the normal equations, BiCGStab and GMRES, at t = k. q
   is the largest spectral radius of T_1 over the batch. The other solvers have no factor of their
   own; what is held against them is the largest ||T_1||, their bound. At t = k the error of x
   comes first in the end, and that is q^t for all of them.
3. Stochastic implicit differentiation (SID) on real digits (see `rates_stochastic.py`): the mean
   squared error over keys against t, k and the number J of samples, each with the errors of the
   other two made small. With step sizes beta / (gamma + t) it falls as 1/t, 1/k and 1/J; with
   constant ones it comes to rest. The first two are those of the penalties' entries, in which F_2
   has no noise, with the exact g_1; the third is that of all entries, with g_1 from samples too.

Whatever is not as theory has it is listed as missed, and then the exit status is 1.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import outcome
import rates_equilibrium as equilibrium
import rates_figures as figures
import rates_problems as problems
import rates_stochastic as stochastic
from jax.flatten_util import ravel_pytree
from rates_contractions import adjoint_bound
from rates_fits import ROUNDING, fit_factor, fit_slope, speed_ratio
from tqdm import tqdm

import bilevax as bx

OUTPUT = Path(__file__).parent / "output" / "rates"
STEPS = [1, 3, 6, 12, 25, 45, 60, 75, 90, 110, 130, 150, 175, 200, 225, 250]
ADJOINT_STEPS = [1, 2, 3, 5, 7, 9, 12, 15, 18, 22, 26, 32, 38, 50, *range(65, 260, 20)]
CONVERGED = 1000  # inner steps
EQUILIBRIUM_STEPS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 46, 56, 66, 76, 88]
GMRES_STEPS = [2, 8, 16, 20, 24, 46, 56, 66]  # each is a program of its own
NORMS = [0.5, 0.9]
TOLERANCE = 0.05  # of speeds, and of factors where T_1 is not symmetric
SLOPE_TOLERANCE = 0.15
EQUAL = 1e-13  # relative to the hypergradient
USEFUL = 0.1  # the same, of errors that are compared
# ITD against AID-FP at every t = k.
ORDER = {"logistic": "above", "features": "above", "biased": "equal", "kernel": "above"}


class Method(NamedTuple):
    """A rule by k; `is_static` if every k is a program of its own."""

    rule: Callable[[Any], Any]
    is_static: bool = False


ITD = Method(lambda k: bx.Unrolled(), is_static=True)
FIXED_POINT = Method(lambda k: bx.Implicit(bx.Neumann(steps=k)))
METHODS = {
    "ITD": ITD,
    "AID-FP": FIXED_POINT,
    "AID-CG": Method(lambda k: bx.Implicit(bx.CG(rtol=0.0, maxiter=k))),
}
EQUILIBRIUM_METHODS = {
    "ITD": ITD,
    "AID-FP": FIXED_POINT,
    "AID-NormalCG": Method(lambda k: bx.Implicit(bx.NormalCG(rtol=0.0, maxiter=k))),
    "AID-BiCGStab": Method(lambda k: bx.Implicit(bx.BiCGStab(rtol=0.0, maxiter=k))),
    "AID-GMRES": Method(
        lambda k: bx.Implicit(bx.GMRES(rtol=0.0, maxiter=1, restart=k)), is_static=True
    ),
}


def relative_errors(
    pose: Callable[[Any], tuple[bx.Problem, Any]],
    method: Method,
    cases: Sequence[Any],
    exact: Sequence[np.ndarray],
    steps: Sequence[int],
    inner_steps: int | None = None,
) -> np.ndarray:
    """Return the relative errors of an estimator, a row per case and a column per number of steps.

    Args:
      pose: returns problem and outer objective of a case.
      method: the estimator.
      cases: with equal shapes.
      exact: their hypergradients, flat.
      steps: numbers k of adjoint steps, and t of inner steps too.
      inner_steps: t if it is the same for all k.
    """

    def estimate(t: Any, k: Any, case: Any) -> jax.Array:
        problem, outer = pose(case)
        solver = bx.FixedPointIteration(rtol=0.0, atol=0.0, maxiter=t)
        engine = bx.value_and_hypergradient(outer, problem, solver, method.rule(k))
        return ravel_pytree(engine(case.y, bx.cold_start(case.x0)).gradient)[0]

    @functools.partial(jax.jit, static_argnums=(0, 1) if method.is_static else ())
    def run(t: Any, k: Any, cases: Any) -> jax.Array:
        return jax.vmap(functools.partial(estimate, t, k))(cases)

    stacked = jax.tree.map(lambda *leaves: jnp.stack([*map(jnp.asarray, leaves)]), *cases)
    truth = np.stack(exact)
    columns = [np.asarray(run(inner_steps or k, k, stacked)) - truth for k in steps]
    errors = np.stack([np.linalg.norm(column, axis=1) for column in columns], axis=1)
    return errors / np.linalg.norm(truth, axis=1)[:, None]


def run_setting(name: str, seeds: int, step: Callable[[str], None]) -> dict[str, Any]:
    setting = problems.SETTINGS[name]
    cases = [setting.case(seed) for seed in range(seeds)]
    truths = [setting.truth(case) for case in cases]
    exact = [truth.gradient for truth in truths]
    q = np.array([truth.contraction for truth in truths])
    together, alone = {}, {}
    for method_name, method in METHODS.items():
        step(f"{setting.title}: {method_name}")
        measure = functools.partial(relative_errors, setting.problem, method, cases, exact)
        together[method_name] = measure(STEPS)
        if method_name != "ITD":
            alone[method_name] = measure(ADJOINT_STEPS, inner_steps=CONVERGED)
    sizes = [np.linalg.norm(gradient) for gradient in exact]
    bound, bound_alone = [], []
    for case, truth, size in zip(cases, truths, sizes, strict=True):
        bound.append(setting.conjugate_gradient_bound(case, truth, STEPS) / size)
        at = setting.derivatives(case.data, case.y, truth.x)
        bound_alone.append(adjoint_bound(at, np.array(ADJOINT_STEPS)) / size)

    def curve(errors: np.ndarray, steps: list[int], claims: dict[str, bool]) -> Any:
        factor = np.array([fit_factor(np.array(steps), row, "order" in claims) for row in errors])
        speed = speed_ratio(factor, q)
        if "speed" not in claims:
            claims["speed"] = bool(np.all(np.abs(speed - 1) <= TOLERANCE))
        return {"error": errors, "factor": factor, "speed": speed, "missed": missed(claims)}

    is_above, order = order_of(together["ITD"], together["AID-FP"], ORDER[name])
    curves = {
        "ITD": curve(together["ITD"], STEPS, {"order": order}),
        "AID-FP": curve(together["AID-FP"], STEPS, {}),
        "AID-CG": curve(together["AID-CG"], STEPS, {"bound": below(together["AID-CG"], bound)}),
    }
    curves_alone = {
        "AID-FP": curve(alone["AID-FP"], ADJOINT_STEPS, {}),
        # It has no factor of its own: it speeds up as eigenvalues are found.
        "AID-CG": curve(
            alone["AID-CG"],
            ADJOINT_STEPS,
            {"bound": below(alone["AID-CG"], bound_alone), "speed": True},
        ),
    }
    return {
        "name": name,
        "title": setting.title,
        "q": q,
        "condition": np.array([truth.conditioning for truth in truths]),
        "steps": STEPS,
        "curves": curves,
        "bound": np.array(bound),
        "adjoint_steps": ADJOINT_STEPS,
        "alone": curves_alone,
        "bound_alone": np.array(bound_alone),
        "affine": setting.affine,
        "itd_above": is_above,
        "order": ORDER[name],
    }


def below(errors: np.ndarray, bound: Any) -> bool:
    return bool(np.all(errors <= np.array(bound) * (1 + 1e-9) + ROUNDING))


def order_of(itd: np.ndarray, fixed_point: np.ndarray, expected: str) -> tuple[float, bool]:
    """Return at which part of the points ITD is not below AID-FP, and whether that is expected."""
    larger = np.maximum(itd, fixed_point)
    is_above = itd >= fixed_point
    part = float(is_above[larger >= ROUNDING].mean())
    if expected == "equal":
        return part, bool(np.all(np.abs(itd - fixed_point) <= EQUAL))
    return part, bool(np.all(is_above[(larger >= ROUNDING) & (larger <= USEFUL)]))


def missed(claims: dict[str, bool]) -> list[str]:
    return [name for name, is_met in claims.items() if not is_met]


def run_equilibrium(seeds: int, step: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run both norms together: they share programs."""
    cases = [equilibrium.draw(norm, seed) for norm in NORMS for seed in range(seeds)]
    truths = [equilibrium.truth(case) for case in cases]
    exact = [truth.gradient for truth in truths]
    errors, steps = {}, dict.fromkeys(EQUILIBRIUM_METHODS, EQUILIBRIUM_STEPS)
    steps["AID-GMRES"] = GMRES_STEPS
    for name, method in EQUILIBRIUM_METHODS.items():
        step(f"equilibrium: {name}")
        errors[name] = relative_errors(equilibrium.problem, method, cases, exact, steps[name])
    results = []
    for place, norm in enumerate(NORMS):
        part = slice(place * seeds, (place + 1) * seeds)
        q = np.array([truth.contraction for truth in truths[part]])
        sizes = np.array([truth.norm for truth in truths[part]])
        curves = {}
        for name, rows in errors.items():
            with_t = name == "ITD"
            factor = [fit_factor(np.array(steps[name]), row, with_t) for row in rows[part]]
            if name in ("ITD", "AID-FP"):
                claims = {"factor": bool(np.all(np.abs(factor / q - 1) <= TOLERANCE))}
            else:
                claims = {"bound": bool(np.all(factor <= sizes))}
            if name == "ITD":
                claims["order"] = order_of(rows[part], errors["AID-FP"][part], "above")[1]
            curves[name] = {
                "steps": steps[name],
                "error": rows[part],
                "factor": np.array(factor),
                "missed": missed(claims),
            }
        results.append({"norm": norm, "q": q, "size": sizes, "curves": curves})
    return results


def run_stochastic(keys: int, step: Callable[[str], None]) -> dict[str, Any]:
    estimator = stochastic.Estimator(stochastic.digits(), keys)
    studies = {}
    for name, study in stochastic.STUDIES.items():
        curves = {}
        for kind in study.step_sizes:
            step(f"SID: {name}, {kind} step size")
            squares = np.stack([estimator.errors(study.run(n, kind)) for n in study.counts])
            mean = squares.mean(axis=1)
            slope = fit_slope(np.array(study.counts), mean, study.first)
            if kind == "constant":
                claims = {"plateau": bool(abs(slope) <= SLOPE_TOLERANCE)}
            else:
                claims = {"slope": bool(abs(slope + 1) <= SLOPE_TOLERANCE)}
            curves[kind] = {
                "mean": mean,
                "deviation": squares.std(axis=1) / np.sqrt(keys),
                "slope": slope,
                "missed": missed(claims),
            }
        studies[name] = {"counts": study.counts, "first": study.first, "curves": curves}
    return {"keys": keys, "size": np.linalg.norm(estimator.truth.gradient), "studies": studies}


def all_missed(results: dict[str, Any]) -> list[str]:
    """Return everything that is not as theory has it, in words."""
    found = []
    for case in results["settings"]:
        for part, curves in (("t = k", case["curves"]), ("k alone", case["alone"])):
            found += [(f"{case['title']}, {part}, {name}", c) for name, c in curves.items()]
    for case in results["equilibrium"]:
        where = f"equilibrium, ||W|| = {case['norm']}"
        found += [(f"{where}, {name}", curve) for name, curve in case["curves"].items()]
    for name, study in results["stochastic"]["studies"].items():
        found += [(f"SID, {name}, {kind}", curve) for kind, curve in study["curves"].items()]
    return [f"{where}: {', '.join(curve['missed'])}" for where, curve in found if curve["missed"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--keys", type=int, default=100, help="of SID; default: %(default)s")
    options = parser.parse_args()
    if options.seeds < 1 or options.keys < 2:
        parser.error("--seeds must be at least 1, and --keys at least 2")
    began = time.perf_counter()
    jax.config.update("jax_enable_x64", True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").touch()  # fails now, not after all the work
    total = len(problems.SETTINGS) * len(METHODS) + len(EQUILIBRIUM_METHODS)
    total += sum(len(study.step_sizes) for study in stochastic.STUDIES.values())
    with tqdm(total=total, disable=None, leave=False) as bar:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        # Programs that run once compile faster without optimisations; those of SID run for long.
        jax.config.update("jax_disable_most_optimizations", True)
        settings = [run_setting(name, options.seeds, step) for name in problems.SETTINGS]
        models = run_equilibrium(options.seeds, step)
        jax.config.update("jax_disable_most_optimizations", False)
        sampled = run_stochastic(options.keys, step)
    results = {"settings": settings, "equilibrium": models, "stochastic": sampled}
    figures.draw_all(results, options.output)
    failures = all_missed(results)
    run = {
        "seeds": options.seeds,
        "seconds": time.perf_counter() - began,
        "missed": failures,
        **{name: metadata.version(name) for name in ("jax", "bilevax")},
    }
    print(*figures.table(results), sep="\n")
    outcome.write({"run": run, **results}, options.output)
    outcome.tell(failures)
    print(f"\n{run['seconds']:.0f} seconds; figures and all numbers are in {options.output}")
    if failures:
        parser.exit(1)


if __name__ == "__main__":
    main()
