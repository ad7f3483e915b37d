"""The estimators of the study of hypergradient errors equal the reference data."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import efficiency_problems as study
from tests.everyday import slow

DIRECTORY = pathlib.Path(__file__).parents[1] / "reference"
FILES = {"ridge": "diabetes_ridge.json", "logistic": "synthetic_logistic.json"}
CASES = [("ridge", "linear"), ("ridge", "quadratic"), ("logistic", "logistic")]


@functools.cache
def load(inner, outer):
    """Return the data as the study draws them, the iterates, and their estimates by name."""
    data = json.loads((DIRECTORY / FILES[inner]).read_text())
    keys = {"linear": "b_out", "quadratic": ("A_out", "b_out"), "logistic": ("X_val", "t_val")}
    train, outer_data, y, x0 = jax.tree.map(
        lambda key: jnp.array(data[key]), (("X", "t"), keys[outer], "y", "x_star")
    )
    iterates = next(case for case in data["cases"] if case["outer"] == outer)["iterates"]
    points = jnp.array([iterate["x"] for iterate in iterates])
    estimates = {
        name: np.array([iterate["estimates"][name] for iterate in iterates])
        for name in iterates[0]["estimates"]
    }
    return study.Draw(train, outer_data, y, x0), points, estimates


@pytest.mark.parametrize("inner, outer", CASES)
def test_the_reference_has_every_rule_that_is_studied(inner, outer):
    ideal = {"ideal_change_affine"} if inner == "logistic" else set()
    assert load(inner, outer)[2].keys() == study.RULES.keys() - ideal


# The quadratic outer objective meets all rules, the logistic regression the other inner problem.
@pytest.mark.parametrize("inner, outer", [slow(*CASES[0]), *CASES[1:]])
def test_estimators(inner, outer):
    draw, points, expected = load(inner, outer)

    @jax.jit
    def evaluate(draw, points):
        problem, objective = study.problems(inner, outer, draw)

        def at(x):
            rules = {name: study.RULES[name](draw.y) for name in expected}
            return {
                name: study.hypergradient(objective, problem, rule, x, draw.y)
                for name, rule in rules.items()
            }

        return jax.vmap(at)(points)

    for name, got in evaluate(draw, points).items():
        distance = np.linalg.norm(got - expected[name], axis=1)
        np.testing.assert_array_less(distance, 1e-8 * np.linalg.norm(expected[name], axis=1))
