"""What `bilevax tune` writes by default, judged by rows that it has not seen: `make heldout`.

Five data sets of scikit-learn: breast cancer (logistic), diabetes (ridge), diabetes with 30 columns
of noise (ridge), wine and digits (multinomial). Each is split five times at random: 70 % of the
rows are a file for the command line, which runs with its defaults, and the others are held out. For
each split,

  written   which model is in model.json: that of the tuned penalties, or of the best single one
  honest    the honest loss of the tuned penalties against that of the best single one, per cent
  spread    as stated by the command line, per cent
  held out  the loss of the held-out rows by what is written, against that of scikit-learn's model
            with the best single penalty, per cent
  seconds   wall time of the command

What is expected: what is written is never worse on held-out rows than the best single penalty by
more than the stated spread, and on average at least as good. Whatever is not so is listed as
missed, and then the exit status is 1.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import outcome
import pandas as pd
import tqdm
from scipy.special import softmax
from sklearn import datasets
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevax.cli import main as run_command_line

OUTPUT = Path(__file__).parent / "output" / "tuning_held_out"
SPLITS, HELD_OUT, NOISE_COLUMNS = 5, 0.3, 30
_ROUNDING = 1e-6  # of losses: two programs fit the same model


class Problem(NamedTuple):
    model: str
    features: np.ndarray
    target: np.ndarray


def load(name: str) -> Problem:
    model, loader = PROBLEMS[name]
    features, target = loader(return_X_y=True)
    if name == "diabetes and noise":
        noise = np.random.default_rng(0).normal(size=(len(features), NOISE_COLUMNS))
        features = np.hstack([features, noise])
    return Problem(model, features, target)


PROBLEMS = {
    "breast cancer": ("logistic", datasets.load_breast_cancer),
    "diabetes": ("ridge", datasets.load_diabetes),
    "diabetes and noise": ("ridge", datasets.load_diabetes),
    "wine": ("multinomial", datasets.load_wine),
    "digits": ("multinomial", datasets.load_digits),
}


def run(problem: Problem, seed: int) -> dict[str, Any]:
    labels = None if problem.model == "ridge" else problem.target
    parts = train_test_split(
        problem.features, problem.target, test_size=HELD_OUT, random_state=seed, stratify=labels
    )
    features, unseen, target, answers = map(np.asarray, parts)
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data.csv", Path(folder) / "out"
        frame = pd.DataFrame(features, columns=[f"x{j}" for j in range(features.shape[1])])
        frame.assign(y=target).to_csv(data, index=False)
        began = time.perf_counter()
        command = ["tune", str(data), "--target", "y", "--model", problem.model, "--out", str(out)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = run_command_line(command)
        seconds = time.perf_counter() - began
        model = json.loads((out / "model.json").read_text())
        report = json.loads((out / "report.json").read_text())
    columns = [int(name[1:]) for name in model["features"]]
    original = {name: np.array(value) for name, value in model["original"].items()}
    scores = unseen[:, columns] @ original["coefficients"].T + original["intercepts"]
    if problem.model == "logistic":
        scores = np.hstack([np.zeros_like(scores), scores])
    written = _loss(problem, scores, answers)
    penalty = report["losses"]["best_single"]["penalty"]
    single = _loss(problem, _single(problem, features, target, unseen, penalty), answers)
    honest = report["honest"]
    return {
        "code": code,
        "written": report["outcome"]["written"],
        "shrink": report["shrink"],
        "honest": honest["tuned"] / honest["best_single"] - 1,
        "spread": honest["spread"] / honest["best_single"],
        "stated": honest["spread"],
        "single": single,
        "held_out": written - single,
        "seconds": seconds,
    }


def _single(
    problem: Problem, features: np.ndarray, target: np.ndarray, unseen: np.ndarray, penalty: float
) -> np.ndarray:
    """Return scikit-learn's predictions or logits for unseen rows."""
    if problem.model == "ridge":
        model = Ridge(alpha=penalty * len(features))
        return make_pipeline(StandardScaler(), model).fit(features, target).predict(unseen)[:, None]
    model = LogisticRegression(C=1 / (penalty * len(features)), tol=1e-8, max_iter=10_000)
    return make_pipeline(StandardScaler(), model).fit(features, target).predict_log_proba(unseen)


def _loss(problem: Problem, scores: np.ndarray, answers: np.ndarray) -> float:
    if problem.model == "ridge":
        return float(np.mean((scores[:, 0] - answers) ** 2))
    chosen = softmax(scores, axis=1)[np.arange(len(answers)), answers]
    return float(-np.mean(np.log(chosen)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PROBLEMS, help="one data set")
    only = parser.parse_args().only
    names = [only] if only else list(PROBLEMS)
    print(
        f"{'':20}{'split':>6}  {'written':12}{'shrink':>7}{'honest':>9}{'spread':>9}"
        f"{'held out':>10}{'seconds':>9}"
    )
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    missed, changes = [], []
    bar = tqdm.tqdm(total=SPLITS * len(names), unit="run", disable=None)
    with tempfile.TemporaryDirectory() as cache, bar:
        # Splits of one data set have one shape.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for name in names:
            problem = load(name)
            for seed in range(SPLITS):
                result = run(problem, seed)
                results[name].append(result)
                change = result["held_out"] / result["single"]
                changes.append(change)
                bar.write(
                    f"{name:20}{seed:6}  {result['written']:12}{result['shrink']:7g}"
                    f"{100 * result['honest']:+8.2f}%{100 * result['spread']:8.2f}%"
                    f"{100 * change:+9.3f}%{result['seconds']:9.1f}"
                )
                sys.stdout.flush()
                bar.update()
                if result["held_out"] > result["stated"] + _ROUNDING * result["single"]:
                    missed.append(f"{name}, split {seed}: worse than the best single penalty")
                if result["code"] != 0:
                    missed.append(f"{name}, split {seed}: exit code {result['code']}")
    average = float(np.mean(changes))
    print(f"\non average {100 * average:+.3f} % against the best single penalty")
    if average > _ROUNDING:
        missed.append("on average the best single penalty is better")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    outcome.write({"runs": results, "average": average}, OUTPUT)
    outcome.tell(missed)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
