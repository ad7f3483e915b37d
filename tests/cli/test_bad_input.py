"""Whatever is wrong with data or options ends with exit code 2 and a message in one line."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import dump_svmlight_file

from bilevax.cli import files, main

ROWS = [f"{i % 7},{i * i % 11},{'yes' if i % 2 else 'no'}" for i in range(20)]
LINES = ["size,age,answer", *ROWS]
LOGISTIC = ["--target", "answer", "--model", "logistic"]


@pytest.fixture
def write(tmp_path):
    def write(lines, name="data.csv"):
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def refuse(tmp_path, capsys):
    """Expect exit code 2, one line that says why, and an output folder that is as it was."""

    def refuse(message, *arguments, command="tune"):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (out / "model.json").write_text("mine")
        extra = ["--out", str(out)] if command == "tune" and "--out" not in arguments else []
        assert main([command, *map(str, arguments), *extra]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"bilevax {command}: ")
        assert printed.err.count("\n") == 1
        assert message in printed.err
        assert [path.name for path in out.iterdir()] == ["model.json"]
        assert (out / "model.json").read_text() == "mine"

    return refuse


@pytest.fixture
def misuse(capsys, write):
    """Expect argparse's exit code 2 and its message."""

    def misuse(message, *arguments):
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        assert caught.value.code == 2
        assert message in capsys.readouterr().err

    return misuse


class TestFile:
    def test_missing(self, refuse, tmp_path):
        refuse("there is no file", tmp_path / "none.csv", *LOGISTIC)

    def test_unknown_extension(self, refuse, write):
        message = "by its extension '.xlsx'; known are .csv, .parquet, .pq, .svm, .svmlight"
        refuse(message, write(LINES, "data.xlsx"), *LOGISTIC)

    def test_folder(self, refuse, tmp_path):
        (tmp_path / "data.csv").mkdir()
        refuse("cannot read", tmp_path / "data.csv", *LOGISTIC)

    @pytest.mark.parametrize("name", ["data.csv", "data.svm"])
    def test_empty(self, refuse, tmp_path, name):
        (tmp_path / name).write_text("")
        target = LOGISTIC if name == "data.csv" else LOGISTIC[2:]
        refuse("is empty", tmp_path / name, *target)

    def test_not_text(self, refuse, tmp_path):
        (tmp_path / "data.csv").write_bytes(b"\xff\xfe,\x00\n1,2\n")
        refuse("is not a text file (in UTF-8)", tmp_path / "data.csv", *LOGISTIC)

    def test_not_parquet(self, refuse, write):
        refuse("is not a valid Parquet file", write(LINES, "data.parquet"), *LOGISTIC)

    def test_only_a_header(self, refuse, write):
        refuse("has no rows", write(LINES[:1]), *LOGISTIC)


class TestCsv:
    @pytest.mark.parametrize(
        ("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")]
    )
    def test_another_separator(self, refuse, write, separator, name):
        lines = [line.replace(",", separator) for line in LINES]
        refuse(f"is separated by {name}; turn them into commas", write(lines), *LOGISTIC)

    def test_one_column(self, refuse, write):
        refuse("has one column, no commas", write(["answer", "1", "2"]), *LOGISTIC)

    def test_no_header(self, refuse, write):
        lines = ["1,2,3", "4,5,6"]
        refuse("must hold the names of the columns", write(lines), *LOGISTIC)

    def test_duplicate_names(self, refuse, write):
        refuse("columns of the same name: 'size'", write(["size,size,answer", *ROWS]), *LOGISTIC)

    def test_a_column_without_a_name(self, refuse, write):
        refuse("column 2 of", write(["size,,answer", *ROWS]), *LOGISTIC)

    def test_rows_that_are_too_long(self, refuse, write):
        refuse("Expected 3 fields in line 4, saw 4", write([*LINES[:3], "1,2,no,4"]), *LOGISTIC)
        lines = ["size,age,answer", *(f"{row},1" for row in ROWS)]
        refuse("Expected 3 fields in line 2, saw 4", write(lines), *LOGISTIC)

    def test_missing_values(self, refuse, write):
        lines = [*LINES, ",1,yes", "?,,no", "1,inf,no"]
        message = "has missing or infinite values in 'size' (2), 'age' (2); fill them in"
        refuse(message, write(lines), *LOGISTIC)

    def test_missing_target_values(self, refuse, write):
        refuse("has 1 rows without a target", write([*LINES, "1,2,"]), *LOGISTIC)

    def test_text_columns(self, refuse, write):
        lines = ["city,size,answer", *(f"Rome,{row[2:]}" for row in ROWS)]
        message = "columns that are not numbers: 'city' (for example 'Rome'); turn them"
        refuse(message, write(lines), *LOGISTIC)

    def test_messages_have_one_line_whatever_is_in_the_file(self, refuse, write):
        lines = ['"two\nlines",answer', *('"a\nb",' + str(i % 2) for i in range(20))]
        refuse("'two lines' (for example 'a b')", write(lines), *LOGISTIC)


class TestTarget:
    def test_none(self, refuse, write):
        message = "is the target: 'size', 'age', 'answer'"
        refuse(message, write(LINES), "--model", "logistic")

    def test_unknown(self, refuse, write):
        arguments = ["--target", "Answer", "--model", "logistic"]
        message = "has no column 'Answer'; its columns are 'size', 'age', 'answer'"
        refuse(message, write(LINES), *arguments)

    def test_text_for_ridge(self, refuse, write):
        message = "is not a number (for example 'no'); ridge predicts numbers"
        refuse(message, write(LINES), "--target", "answer", "--model", "ridge")

    def test_constant_for_ridge(self, refuse, write):
        lines = ["a,y", *(f"{i},7" for i in range(20))]
        refuse("is 7 in all rows", write(lines), "--target", "y", "--model", "ridge")

    def test_one_class(self, refuse, write):
        lines = [line.replace("yes", "no") for line in LINES]
        refuse("has only one class, 'no', in its target", write(lines), *LOGISTIC)

    def test_three_classes_for_logistic(self, refuse, write):
        message = "has 3 classes ('maybe', 'no', 'yes'); --model logistic takes two, use --model m"
        refuse(message, write([*LINES, *["1,2,maybe"] * 5]), *LOGISTIC)

    def test_a_libsvm_file_has_its_own(self, refuse, write):
        lines = [f"{i % 2} 1:{i}" for i in range(20)]
        refuse("whose target stands in front of each line", write(lines, "a.svm"), *LOGISTIC)


class TestRows:
    def test_one(self, refuse, write):
        refuse("has 1 row; more are needed", write(LINES[:2]), *LOGISTIC)

    def test_fewer_than_folds(self, refuse, write):
        lines = ["a,y", "1,2", "2,3", "5,4"]
        message = "has 3 rows, fewer than the 5 folds of --cv"
        refuse(message, write(lines), "--target", "y", "--model", "ridge")

    def test_a_class_with_fewer_than_folds(self, refuse, write):
        lines = [*LINES, *["1,2,maybe"] * 4]
        message = "has classes with fewer rows than the 5 folds of --cv: 'maybe' (4)"
        refuse(message, write(lines), "--target", "answer", "--model", "multinomial")

    def test_no_feature_varies(self, refuse, write):
        lines = ["a,y", *(f"3,{i}" for i in range(20))]
        refuse("no feature of", write(lines), "--target", "y", "--model", "ridge")

    def test_numbers_that_overflow(self, refuse, write):
        lines = ["a,y", *(f"{1 + i}e307,{i}" for i in range(15))]
        message = "the standard deviation of 'a' overflows or vanishes; rescale the column"
        refuse(message, write(lines), "--target", "y", "--model", "ridge")


class TestLibsvm:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("1 1:2 one:3", "line 1 is '1 1:2 one:3', expected"),
            ("1 2:1 1:2", "the indices in line 1 must increase"),
            ("1 0:2 1:3", "has an index 0; the indices of a LIBSVM file start at 1"),
        ],
    )
    def test_invalid(self, refuse, write, line, message):
        refuse(message, write([line, "0 1:2"], "a.libsvm"), "--model", "logistic")

    def test_too_large(self, refuse, write, monkeypatch):
        monkeypatch.setattr(files, "MAX_ENTRIES", 10)
        refuse("has 2 rows and 6 features, too many", write(["1 6:2", "0 1:2"], "a.svm"), "--model",
               "logistic")  # fmt: skip


class TestGroups:
    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["feature,group", "size,1"], "lacks features of the data: 'age'"),
            (["feature,group", "size,1", "age,1", "x,2"], "that the data does not have: 'x'"),
            (["feature,group", "size,1", "age,1", "age,2"], "more than once: 'age'"),
            (["feature,set", "size,1", "age,1"], "has no column 'group'"),
            (["feature,group", "size,1", "age,"], "has 1 rows without a feature or a group"),
            (["feature;group", "size;1"], "is separated by semicolons"),
        ],
    )
    def test_wrong_content(self, refuse, write, lines, message):
        groups = write(lines, "groups.csv")
        refuse(message, write(LINES), *LOGISTIC, "--penalty", groups)

    def test_missing_file(self, refuse, write, tmp_path):
        refuse("there is no file", write(LINES), *LOGISTIC, "--penalty", tmp_path / "none.csv")

    def test_no_such_choice(self, refuse, write):
        message = "--penalty must be single, per-feature or a CSV file, got 'each'"
        refuse(message, write(LINES), *LOGISTIC, "--penalty", "each")


class TestValidation:
    def test_lacking_columns(self, refuse, write):
        other = write(["size,answer", "1,no"], "other.csv")
        refuse("lacks columns: 'age'", write(LINES), *LOGISTIC, "--validation", other)

    def test_lacking_target(self, refuse, write):
        other = write(["size,age", "1,2"], "other.csv")
        refuse("has no column 'answer'", write(LINES), *LOGISTIC, "--validation", other)

    def test_new_classes(self, refuse, write):
        other = write(["size,age,answer", "1,2,maybe"], "other.csv")
        message = "has classes that the data does not have: 'maybe'"
        refuse(message, write(LINES), *LOGISTIC, "--validation", other)

    def test_not_with_cv(self, misuse):
        misuse("not allowed with", "tune", "a.csv", *LOGISTIC, "--cv", "3", "--validation", "b.csv")


class TestOut:
    def test_a_file(self, refuse, write):
        path = write(LINES)
        refuse("cannot write to the folder", path, *LOGISTIC, "--out", path)

    def test_nothing_to_resume(self, refuse, write):
        refuse("there is nothing to --resume in", write(LINES), *LOGISTIC, "--resume")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cv", "1"], "argument --cv: must be 2 or more, got 1"),
        (["--cv", "few"], "argument --cv: must be a whole number, got 'few'"),
        (["--steps", "0"], "argument --steps: must be 1 or more, got 0"),
        (["--seed", "-1"], "argument --seed: must be 0 or more, got -1"),
        (["--accuracy", "0"], "argument --accuracy: must be between 0 and 1, got 0"),
        (["--accuracy", "nan"], "argument --accuracy: must be between 0 and 1, got nan"),
        (["--accuracy", "high"], "argument --accuracy: must be a number, got 'high'"),
        (["--out", " "], "argument --out: must name a folder"),
        (["--rule", "none"], "argument --rule: invalid choice: 'none'"),
        (["--model", "lasso"], "argument --model: invalid choice: 'lasso'"),
        (["--target"], "argument --target: expected one argument"),
    ],
)
def test_wrong_options(misuse, arguments, message):
    misuse(message, "tune", "a.csv", "--model", "ridge", *arguments)


def test_no_command_and_no_model(misuse):
    misuse("the following arguments are required: tune | predict")
    misuse("the following arguments are required: --model", "tune", "a.csv")


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
        refuse("has missing or infinite values in 'size' (1)", path, data, command="predict")

    def test_a_file_that_cannot_be_written(self, refuse, write, a_model, tmp_path):
        path = write([json.dumps(a_model)], "model.json")
        arguments = [path, write(LINES), "--out", tmp_path / "none" / "x.csv"]
        refuse("cannot write", *arguments, command="predict")

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


def test_predictions_by_hand_with_columns_in_any_order(write, a_model, capsys):
    path = write([json.dumps(a_model)], "model.json")
    data = write(["age,more,size", "2,text,1", "0,text,3"])
    assert main(["predict", str(path), str(data)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out == "prediction\n11.5\n20.5\n"  # 10 + 3 (size - age / 2 + 0.5)


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
