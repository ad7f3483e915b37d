"""Fits of the study of rates."""

import numpy as np
from scipy.optimize import minimize_scalar, nnls

# Of errors relative to the hypergradient: below the first, rates are those of the slowest mode;
# below the second, they are rounding.
ASYMPTOTIC, ROUNDING = 1e-5, 1e-12
TIGHT = {"xatol": 1e-10}


def fit_factor(steps: np.ndarray, errors: np.ndarray, with_t: bool = False) -> float:
    """Return q where relative errors in the asymptotic range fall like c_1 q^t.

    With `with_t` the form is that of iterative differentiation, (c_1 + c_2 t) q^t, with c_1 and c_2
    not negative. NaN if there are not enough errors for a fit.
    """
    steps, errors = np.asarray(steps, float), np.asarray(errors, float)
    inside = (errors <= ASYMPTOTIC) & (errors >= ROUNDING)
    if inside.sum() < (4 if with_t else 3):
        return float("nan")
    t, values = steps[inside], np.log(errors[inside])
    plain = np.polyfit(t, values, 1)[0]
    if not with_t:
        return float(np.exp(plain))

    def misfit(rate: float) -> float:
        # The constants that make the relative errors of the fit smallest.
        basis = np.stack([np.ones_like(t), t / t[-1]], axis=1)
        basis *= np.exp(rate * t - values)[:, None]
        return nnls(basis, np.ones_like(t))[1]

    # A factor t can hide as much as 1 / t of the slope.
    lowest = plain - 2 / t[0]
    best = minimize_scalar(misfit, bounds=(lowest, plain), method="bounded", options=TIGHT)
    return float(np.exp(best.x))


def fit_slope(steps: np.ndarray, values: np.ndarray, first: float) -> float:
    """Return the least-squares slope on log-log axes, from a number of steps on."""
    inside = np.asarray(steps) >= first
    return float(np.polyfit(np.log(np.asarray(steps)[inside]), np.log(values[inside]), 1)[0])


def speed_ratio(fitted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return log q of the fit over the true one: how many steps a digit takes, truly over fitted.

    Stricter than q itself, for factors close to 1 differ by little.
    """
    return np.log(fitted) / np.log(true)
