"""Predictions by hand, and what cannot be used for them."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import dump_svmlight_file

from bilevax.cli import main

LINES = ["size,age", "1,2", "3,4"]


@pytest.fixture
def a_model():
    return {
        "format": "bilevax model 1",
        "version": "0",
        "model": "ridge",
        "target": "y",
        "classes": None,
        "features": ["size", "age"],
        "constant_features": [],
        "penalties": [1.0, 2.0],
        "preprocessing": {
            "means": [0.0, 0.0], "scales": [1.0, 2.0], "target_mean": 10.0, "target_scale": 3.0
        },
        "standardised": {"coefficients": [[1.0, -1.0]], "intercepts": [0.5]},
    }  # fmt: skip


def one_feature(model):
    parts = {
        "features": ["size"],
        "penalties": [1.0],
        "preprocessing": model["preprocessing"] | {"means": [0.0], "scales": [1.0]},
        "standardised": {"coefficients": [[1.0]], "intercepts": [0.5]},
    }
    return model | parts


class TestPredict:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not a model: it is not a JSON file"),
            ("[]", "is not a model: its format is not 'bilevax model 1'"),
            ('{"format": "bilevax report 1"}', "is not a model: its format is not"),
            ('{"format": "bilevax model 1"}', "is not a whole model: it lacks 'preprocessing'"),
        ],
    )
    def test_not_a_model(self, refuse, write, content, message):
        path = write([content], "model.json")
        refuse(message, path, write(LINES), command="predict")

    def test_no_model(self, refuse, write, tmp_path):
        refuse("there is no file", tmp_path / "none.json", write(LINES), command="predict")

    def test_wrong_shapes(self, refuse, write, a_model):
        a_model["standardised"]["coefficients"] = [[1.0]]
        path = write([json.dumps(a_model)], "model.json")
        message = "its coefficients have the shape (1, 1), expected (1, 2)"
        refuse(message, path, write(LINES), command="predict")

    def test_missing_columns(self, refuse, write, a_model):
        path = write([json.dumps(a_model)], "model.json")
        data = write(["size,answer", "1,2"])
        refuse("lacks columns: 'age'", path, data, command="predict")

    def test_missing_values(self, refuse, write, a_model):
        path = write([json.dumps(a_model)], "model.json")
        data = write(["size,age", "1,2", ",3"])
        message = "has missing or infinite values in 'size' (1, the first in line 3)"
        refuse(message, path, data, command="predict")

    def test_a_file_that_cannot_be_written(self, refuse, write, a_model, tmp_path):
        path = write([json.dumps(a_model)], "model.json")
        arguments = [path, write(LINES), "--out", tmp_path / "none" / "x.csv"]
        refuse("cannot write", *arguments, command="predict")

    def test_over_its_own_input(self, refuse, write, a_model, tmp_path):
        path, data = write([json.dumps(a_model)], "model.json"), write(LINES)
        before = path.read_text(), data.read_text()
        for name, word in {"data.csv": "data", "model.json": "model"}.items():
            out = tmp_path / "out" / ".." / name
            message = f"--out {out} is the {word}; choose another file"
            refuse(message, path, data, "--out", out, command="predict")
        assert (path.read_text(), data.read_text()) == before

    def test_a_blank_line_in_one_column_is_a_missing_value(self, refuse, write, a_model):
        path = write([json.dumps(one_feature(a_model))], "model.json")
        data = write(["size", "1", "", "2"])
        message = "has missing or infinite values in 'size' (1, the first in line 3)"
        refuse(message, path, data, command="predict")

    def test_a_libsvm_file_with_more_features(self, refuse, tmp_path, write, a_model):
        a_model |= {"features": ["feature 1", "feature 3"], "constant_features": ["feature 2"]}
        path = write([json.dumps(a_model)], "model.json")
        data = write(["1 1:2 4:1"], "a.svm")
        message = "has 4 features, the model was trained on 3"
        refuse(message, path, data, command="predict")

    def test_a_libsvm_file_with_other_features(self, refuse, tmp_path, write, a_model):
        path = write([json.dumps(a_model)], "model.json")
        data = tmp_path / "a.svm"
        dump_svmlight_file(np.ones((3, 2)), np.ones(3), str(data), zero_based=False)
        refuse("lacks columns: 'size', 'age'", path, data, command="predict")


def test_predictions_by_hand_with_columns_in_any_order(write, a_model, capsys):
    path = write([json.dumps(a_model)], "model.json")
    data = write(["age,more,size", "2,text,1", "0,text,3"])
    assert main(["predict", str(path), str(data)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out == "prediction\n11.5\n20.5\n"  # 10 + 3 (size - age / 2 + 0.5)


def test_a_model_of_one_feature_predicts_from_one_column(write, a_model, capsys):
    path = write([json.dumps(one_feature(a_model))], "model.json")
    assert main(["predict", str(path), str(write(["size", "1", "3"]))]) == 0
    assert capsys.readouterr().out == "prediction\n14.5\n20.5\n"  # 10 + 3 (size + 0.5)


def test_parquet_and_csv_are_the_same(tmp_path, write, a_model):
    path = write([json.dumps(a_model)], "model.json")
    table = pd.DataFrame({"size": [1, 2], "age": [0.5, None]}).fillna(4)
    table.to_parquet(tmp_path / "data.parquet")
    table.to_csv(tmp_path / "data.csv", index=False)
    results = []
    for name in ("data.parquet", "data.csv"):
        out = tmp_path / f"{name}.out"
        assert main(["predict", str(path), str(tmp_path / name), "--out", str(out)]) == 0
        results.append(out.read_text())
    assert results[0] == results[1]
    assert re.fullmatch(r"prediction\n[\d.]+\n[\d.]+\n", results[0])
