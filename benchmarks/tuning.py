"""Penalties tuned by `bilevax tune` beside grids of single ones: `make tuning`.

Three data sets of scikit-learn with the same five folds for all: breast cancer (logistic), diabetes
(ridge) and digits (multinomial). For each,

  tuned       the cross-validated loss of one penalty per feature, as `bilevax tune` finds them
  grid        the lowest loss of 100 single penalties from 100 to 1e-6, by the same program
  first run   wall time from standardised rows to the last fit, compilation included
  compiled    the same without compilation: the first step counts as an average one
  sklearn     wall time of RidgeCV (100 alphas) or LogisticRegressionCV (100 Cs), on standardised
              features and the same folds, with default tolerances, and the lowest loss it saw

and for digits

  by hand     the same in JAX by a program for these data alone (`tuning_by_hand.py`): the limit
  accurate    LogisticRegressionCV with a tolerance of 1e-6 in place of 1e-4, which is too loose for
              weak penalties

What is expected: tuned is no worse than grid, the requested accuracy is reached, and on digits the
first run takes less time than scikit-learn. Whatever is not so is listed as missed, and then the
exit status is 1.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import outcome
import tuning_by_hand
from sklearn import datasets
from sklearn.linear_model import LogisticRegressionCV, RidgeCV

import bilevax as bx
from bilevax.cli import folds as splits
from bilevax.cli import tuning
from bilevax.cli.choices import RULES, Kind
from bilevax.cli.data import Data
from bilevax.cli.report import loss_unit
from bilevax.cli.rows import Rows, as_rows, standardise
from bilevax.cli.search import BATCH, Evaluator

OUTPUT = Path(__file__).parent / "output" / "tuning"
GRID = np.logspace(2, -6, 100)
FOLDS, ACCURACY, STEPS = 5, 1e-2, 500


class Problem(NamedTuple):
    kind: Kind
    rows: Rows
    target: np.ndarray
    masks: splits.Masks
    unit: float


PROBLEMS = {
    "breast cancer": (Kind.LOGISTIC, datasets.load_breast_cancer),
    "diabetes": (Kind.RIDGE, datasets.load_diabetes),
    "digits": (Kind.MULTINOMIAL, datasets.load_digits),
}


def load(name: str) -> Problem:
    kind, loader = PROBLEMS[name]
    features, target = loader(return_X_y=True)
    features = features[:, features.max(axis=0) > features.min(axis=0)]
    names = [str(j) for j in range(features.shape[1])]
    is_ridge = kind is Kind.RIDGE
    classes = None if is_ridge else [str(label) for label in np.unique(target)]
    data = Data(names, features, target, classes, [])
    scaling = standardise(data)
    plan = splits.cross_validation(None if is_ridge else target, len(target), FOLDS, seed=0)
    unit = loss_unit(kind, scaling)
    return Problem(kind, as_rows(data, scaling, kind), target, plan.search, unit)


def run_ours(problem: Problem) -> dict[str, Any]:
    began = time.perf_counter()
    folds = splits.make_folds(problem.rows, problem.masks)
    evaluator = Evaluator(problem.rows)
    index = np.arange(len(problem.rows.noise))
    grid = tuning.search_grid(evaluator, folds, len(index))
    with tempfile.TemporaryDirectory() as folder:
        settings = tuning.Settings(RULES[0], ACCURACY, STEPS)
        checkpoints = Path(folder)
        run = tuning.tune(
            problem.rows, folds, index, grid, settings, shrink=0.0, checkpoints=checkpoints
        )
    tuned = tuning.finish(evaluator, folds, index, grid, run)
    first_run = time.perf_counter() - began
    others = run.seconds.total * run.steps / max(run.steps - 1, 1)
    compiled = evaluator.seconds - evaluator.compile_seconds + others
    logs = np.repeat(np.log(GRID)[:, None], len(index), axis=1)
    losses, weights = [], None
    for k in range(0, len(GRID), BATCH):
        found = evaluator.evaluate(folds, logs[k : k + BATCH], 1e-8, weights)
        losses.append(found.mean.min())
        weights = found.weights[-1]
    return {
        "tuned": problem.unit * float(tuned.losses.mean[1]),
        "grid": problem.unit * float(min(losses)),
        "steps": run.steps,
        "accuracy_reached": run.outcome is bx.Outcome.CONVERGED,
        "first_run": first_run,
        "compiled": compiled,
    }


def run_sklearn(problem: Problem, **tolerance: Any) -> dict[str, Any]:
    features, masks = problem.rows.features, problem.masks
    pairs = zip(masks.train[:-1], masks.held_out[:-1], strict=True)
    cv = [(np.flatnonzero(train), np.flatnonzero(held_out)) for train, held_out in pairs]
    alphas = GRID * len(features) * (1 - 1 / FOLDS)
    began = time.perf_counter()
    if problem.kind is Kind.RIDGE:
        scoring = "neg_mean_squared_error"
        model = RidgeCV(alphas=alphas, cv=cv, scoring=scoring).fit(features, problem.target)
        loss = -float(model.best_score_)  # type: ignore[arg-type]
    else:
        options: dict[str, Any] = {"Cs": 1 / alphas, "cv": cv, "scoring": "neg_log_loss"}
        options |= {"l1_ratios": (0.0,), "use_legacy_attributes": False}  # as they are to be
        model = LogisticRegressionCV(**options, **tolerance)
        loss = -model.fit(features, problem.target).scores_.mean(axis=0).max()
    return {"sklearn": time.perf_counter() - began, "sklearn_loss": float(loss)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PROBLEMS, help="one data set")
    only = parser.parse_args().only
    jax.config.update("jax_enable_x64", True)
    results, missed = {}, []
    print(f"{'':14}{'loss':>30}{'':8}{'seconds':>38}")
    print(
        f"{'':14}{'tuned':>10}{'grid':>10}{'sklearn':>10}{'steps':>8}"
        f"{'first run':>19}{'compiled':>10}{'sklearn':>9}"
    )
    for name in [only] if only else PROBLEMS:
        problem = load(name)
        result = run_ours(problem) | run_sklearn(problem)
        results[name] = result
        print(
            f"{name:14}{result['tuned']:10.5g}{result['grid']:10.5g}{result['sklearn_loss']:10.5g}"
            f"{result['steps']:8}{result['first_run']:19.2f}{result['compiled']:10.2f}"
            f"{result['sklearn']:9.2f}",
            flush=True,
        )
        if problem.kind is Kind.MULTINOMIAL:
            folds = splits.make_folds(problem.rows, problem.masks).choosing
            by_hand = tuning_by_hand.tune(problem.rows, folds, ACCURACY, STEPS)
            accurate = run_sklearn(problem, tol=1e-6, max_iter=1000)
            result |= {"by_hand": by_hand._asdict(), "accurate": accurate}
            first_run = by_hand.compiling + by_hand.running
            print(
                f"  {'by hand':12}{by_hand.loss:10.5g}{by_hand.steps:28}{first_run:19.2f}"
                f"{by_hand.running:10.2f}\n"
                f"  {'accurate':12}{accurate['sklearn_loss']:30.5g}{accurate['sklearn']:46.2f}",
                flush=True,
            )
        if not result["tuned"] <= result["grid"]:
            missed.append(f"{name}: the tuned loss is above that of the grid")
        if not result["accuracy_reached"]:
            missed.append(f"{name}: the accuracy was not reached in {STEPS} steps")
    if "digits" in results and results["digits"]["first_run"] >= results["digits"]["sklearn"]:
        missed.append("digits: the first run takes no less time than LogisticRegressionCV")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    outcome.write(results, OUTPUT)
    outcome.tell(missed)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
