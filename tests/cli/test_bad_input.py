"""Whatever is wrong with data or options ends with exit code 2 and a message in one line."""

import io

import pandas as pd
import pytest

from bilevax.cli import files, main
from bilevax.cli.choices import MISSING

ROWS = [f"{i % 7},{i * i % 11},{'yes' if i % 2 else 'no'}" for i in range(20)]
LINES = ["size,age,answer", *ROWS]
LOGISTIC = ["--target", "answer", "--model", "logistic"]


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
        message = "has no column besides the target 'answer'"
        refuse(message, write(["answer", "1", "2"]), *LOGISTIC)
        message = "has no column 'answer'; its columns are 'size answer'"
        refuse(message, write(["size answer", "1 2", "2 3"]), *LOGISTIC)

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
        message = (
            "has missing or infinite values in 'size' (2, the first in line 22), "
            "'age' (2, the first in line 23); fill them in"
        )
        refuse(message, write(lines), *LOGISTIC)

    def test_lines_are_counted_as_in_the_file(self, refuse, write):
        lines = ["", LINES[0], "", *ROWS[:3], "  ", "1,,yes"]
        refuse("'age' (1, the first in line 8)", write(lines), *LOGISTIC)

    def test_rows_of_other_files_are_counted_from_one(self, refuse, tmp_path):
        path = tmp_path / "data.parquet"
        pd.DataFrame({"size": [1.0, 2.0, None], "answer": [1, 0, 1]}).to_parquet(path)
        refuse("'size' (1, the first in row 3)", path, *LOGISTIC)

    def test_missing_target_values(self, refuse, write):
        message = "has 1 row without a target, the first in line 22; remove such rows, or rename"
        refuse(message, write([*LINES, "1,2,"]), *LOGISTIC)

    @pytest.mark.parametrize("text", MISSING)
    def test_texts_that_count_as_missing(self, refuse, write, text):
        lines = [line.replace("no", text) for line in LINES]
        message = (
            "has 10 rows without a target, the first in line 2; remove such rows, or rename a "
            "class that counts as missing: ?, NA, N/A, NaN, nan, NULL, null, None and 11 more "
            "(see bilevax tune --help)"
        )
        refuse(message, write(lines), *LOGISTIC)

    def test_they_are_what_pandas_takes_for_missing(self):
        text = "\n".join(["a,b", ",0", *(f"{text},0" for text in MISSING if text != "?")])
        assert pd.read_csv(io.StringIO(text))["a"].isna().all()

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
        columns = "its columns are 'size', 'age', 'answer'"
        message = f"has no column 'Answer'; {columns}; did you mean 'answer'?\n"
        refuse(message, write(LINES), *arguments)
        arguments[1] = "weight"
        refuse(f"has no column 'weight'; {columns}\n", write(LINES), *arguments)

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

    def test_too_few_for_folds_of_folds(self, refuse, write):
        message = "has too few rows for an honest score, which leaves out folds of folds: "
        target = ["--target", "y", "--cv", "2"]
        lines = ["a,y", "1,2", "2,3", "5,4"]
        advice = "raise --cv, or give --no-honest-score"
        refuse(f"{message}the data (3); {advice}", write(lines), *target, "--model", "ridge")
        lines = ["a,y", *(f"{i},{'yes' if i < 3 else 'no'}" for i in range(9))]
        refuse(f"{message}'yes' (3); {advice}", write(lines), *target, "--model", "logistic")

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
            (
                ["feature,group", "size,1", "age,"],
                "has 1 row without a feature or a group, the first in line 3",
            ),
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

    def test_one_row_has_nothing_to_judge(self, refuse, write):
        other = write(["size,age,answer", "1,2,no"], "other.csv")
        message = "has 1 row, an honest score needs more: add rows, or give --no-honest-score"
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
        (["--shrink", "-1"], "argument --shrink: must be 0 or more, got -1"),
        (["--shrink", "inf"], "argument --shrink: must be 0 or more, got inf"),
        (["--shrink", "strong"], "argument --shrink: must be a number, got 'strong'"),
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
