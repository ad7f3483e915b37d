"""Whatever is in model.json, there is a message in one line or finite predictions."""

import copy
import json

import numpy as np
import pytest

from bilevax.cli import main
from bilevax.cli.fitted import read_model

LINES = ["size,age", "1,2", "3,4"]
FORMAT = "bilevax model 1"


def make_model(kind="ridge"):
    classes = {"ridge": None, "logistic": ["no", "yes"], "multinomial": ["a", "b", "c"]}[kind]
    outputs = 3 if kind == "multinomial" else 1
    mean, scale = (10.0, 3.0) if classes is None else (0.0, 1.0)
    return {
        "format": FORMAT,
        "model": kind,
        "target": "y",
        "classes": classes,
        "features": ["size", "age"],
        "constant_features": ["height"],
        "penalties": [1.0, 2],
        "preprocessing": {
            "means": [0.0, 0.0], "scales": [1.0, 2.0], "target_mean": mean, "target_scale": scale
        },
        "standardised": {"coefficients": [[1.0, -1.0]] * outputs, "intercepts": [0.5] * outputs},
    }  # fmt: skip


def changed(model, path, value):
    model = copy.deepcopy(model)
    *folders, name = path.split("/")
    entries = model
    for folder in folders:
        entries = entries[folder]
    entries[name] = value
    return model


LARGE = 10**400
FAULTS = [
    ("ridge", "model", "lasso", "its model must be one of ridge, logistic, multinomial"),
    ("ridge", "model", None, "its model must be one of"),
    ("ridge", "model", ["ridge"], "its model must be one of"),
    ("ridge", "target", 3, "its target must be text"),
    ("ridge", "features", [], "it has no features"),
    ("ridge", "features", None, "its features must be a list of texts"),
    ("ridge", "features", "size", "its features must be a list of texts"),
    ("ridge", "features", [["size"], "age"], "its features must be text"),
    ("ridge", "features", ["size", "size"], "its features are repeated: 'size'"),
    ("ridge", "features", ["size", "\ud800"], "its features must be text that UTF-8 can hold"),
    ("ridge", "constant_features", ["age"], "features are among its constant_features: 'age'"),
    ("ridge", "constant_features", {}, "its constant_features must be a list of texts"),
    ("ridge", "classes", ["no", "yes"], "its classes must be null, for it is a ridge model"),
    ("logistic", "classes", None, "its classes must be a list of texts"),
    ("logistic", "classes", ["no"], "it has 1 class, a logistic model has two"),
    ("logistic", "classes", ["a", "b", "c"], "it has 3 classes, a logistic model has two"),
    ("multinomial", "classes", ["no"], "it has 1 class, a multinomial model has two or more"),
    ("multinomial", "classes", ["a", "b", "b"], "its classes are repeated: 'b'"),
    ("multinomial", "classes", ["a", "b"], "its coefficients have the shape (3, 2), expected (2,"),
    ("logistic", "model", "multinomial", "its coefficients have the shape (1, 2), expected (2, 2)"),
    ("ridge", "model", "logistic", "its classes must be a list of texts"),
    ("logistic", "model", "ridge", "its classes must be null"),
    ("ridge", "preprocessing", [], "its preprocessing must be an object"),
    ("ridge", "standardised", None, "its standardised must be an object"),
    ("ridge", "preprocessing/scales", [1.0, 0.0], "its scales must be positive"),
    ("ridge", "preprocessing/scales", [1.0, -2.0], "its scales must be positive"),
    ("ridge", "preprocessing/scales", [1.0, float("nan")], "its scales must be finite"),
    ("ridge", "preprocessing/scales", [1.0, None], "its scales must be numbers"),
    ("ridge", "preprocessing/scales", 1.0, "its scales have the shape (), expected (2,)"),
    ("ridge", "preprocessing/means", [0.0, "0"], "its means must be numbers"),
    ("ridge", "preprocessing/means", [0.0, True], "its means must be numbers"),
    ("ridge", "preprocessing/means", [0.0, LARGE], "its means must be finite"),
    ("ridge", "preprocessing/means", [0.0, float("inf")], "its means must be finite"),
    ("ridge", "preprocessing/target_mean", None, "its target_mean must be numbers"),
    ("ridge", "preprocessing/target_scale", 0, "its target_scale must be positive"),
    ("logistic", "preprocessing/target_scale", 2.0, "its target_mean and target_scale must be 0"),
    ("ridge", "penalties", [1.0], "its penalties have the shape (1,), expected (2,)"),
    ("ridge", "penalties", [1.0, -1.0], "its penalties must be positive"),
    ("ridge", "standardised/coefficients", [[1.0], [1.0, 2.0]], "in lists of one length"),
    ("ridge", "standardised/coefficients", [[[1.0, 2.0]]], "its coefficients must be numbers"),
    ("ridge", "standardised/intercepts", [float("-inf")], "its intercepts must be finite"),
]


@pytest.mark.parametrize(("kind", "path", "value", "message"), FAULTS)
def test_entries_that_are_wrong(refuse, write, kind, path, value, message):
    model = write([json.dumps(changed(make_model(kind), path, value))], "model.json")
    refuse("is not a whole model: ", model, write(LINES), command="predict")
    refuse(message, model, write(LINES), command="predict")


@pytest.mark.parametrize("path", ["features", "model", "preprocessing/scales", "standardised"])
def test_entries_that_lack(refuse, write, path):
    model = make_model()
    *folders, name = path.split("/")
    entries = model[folders[0]] if folders else model
    del entries[name]
    path = write([json.dumps(model)], "model.json")
    refuse(f"it lacks '{name}'", path, write(LINES), command="predict")


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 900 + "]" * 900, "\x00", "NaN", ""])
def test_files_that_are_none(refuse, write, text):
    refuse("is not a model: its", write([text], "a.json"), write(LINES), command="predict") if (
        text.endswith("]") or text == "NaN"
    ) else refuse("is not a JSON file", write([text], "a.json"), write(LINES), command="predict")


def test_lists_in_lists_are_no_numbers(refuse, write):
    deep = []
    for _ in range(400):
        deep = [deep]
    model = write([json.dumps(changed(make_model(), "penalties", deep))], "model.json")
    refuse("its penalties must be numbers, in lists of", model, write(LINES), command="predict")


def test_features_that_overflow_are_refused(refuse, write):
    model = changed(make_model("logistic"), "preprocessing/scales", [1e-300, 2.0])
    path = write([json.dumps(model)], "model.json")
    message = "the prediction of row 2 overflows: its features are too far"
    refuse(message, path, write(["size,age", "0,2", "1e300,1"]), command="predict")


@pytest.mark.parametrize("seed", range(100))
def test_random_changes_end_with_a_message_or_finite_predictions(seed, write, capsys):
    rng = np.random.default_rng(seed)
    model = make_model(rng.choice(["ridge", "logistic", "multinomial"]))
    junk = [None, True, 0, -1, 1e308, 5e-324, LARGE, float("nan"), "x", "", [], [[]], {}, ["x"]]
    for _ in range(rng.integers(1, 3)):
        entries = model
        while True:
            keys = range(len(entries)) if isinstance(entries, list) else list(entries)
            key = keys[rng.integers(len(keys))]
            child = entries[key]
            if not (isinstance(child, list | dict) and child) or rng.random() < 0.3:
                break
            entries = child
        if key != "format":
            entries[key] = junk[rng.integers(len(junk))]
    path, data = write([json.dumps(model)], "model.json"), write(LINES)
    code = main(["predict", str(path), str(data)])
    printed = capsys.readouterr()
    assert code in (0, 2)
    if code == 2:
        assert printed.err.startswith("bilevax predict: ") and printed.err.count("\n") == 1
        assert "Error" not in printed.err
    else:
        assert np.isfinite(read_model(path).coefficients).all()
        assert not any(word in printed.out for word in ("nan", "inf"))
        assert len(printed.out.splitlines()) == 3
