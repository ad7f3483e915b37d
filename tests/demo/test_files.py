"""The user's own data: what is read, and what every refusal says."""

import re

import numpy as np
import pytest
from sklearn.datasets import dump_svmlight_file

from bilevax.demo import files
from bilevax.demo.data import DataError
from bilevax.demo.files import read_table


def csv_lines(rows=40, target=lambda i: "yes" if i % 2 else "no"):
    return ["size,age,answer", *(f"{i / 7},{i * i},{target(i)}" for i in range(rows))]


def refuse(path, message, target="answer"):
    """Expect one line that names the file and says what is wrong."""
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_table(path, target)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def test_csv(write):
    table = read_table(write(csv_lines()), "answer")
    assert table.name == "data"
    assert table.feature_names == ["size", "age"]
    assert table.class_names == ["no", "yes"]
    assert table.image_shape is None
    np.testing.assert_array_equal(table.labels, np.arange(40) % 2)
    np.testing.assert_array_equal(table.features[:, 0], np.arange(40) / 7)
    np.testing.assert_array_equal(table.features[:, 1], np.arange(40) ** 2)


def test_csv_may_have_quotes_spaces_blank_lines_and_a_byte_order_mark(write):
    rows = [f'{i}, "{2 * i}", {"1.0" if i % 2 else "1e1"}' for i in range(40)]
    table = read_table(write(['\ufeff"a, b", c ,"d"', "", *rows, ""]), "d")
    assert table.feature_names == ["a, b", "c"]
    assert table.class_names == ["1.0", "1e1"]
    np.testing.assert_array_equal(table.features[:, 1], 2 * np.arange(40))
    np.testing.assert_array_equal(table.labels, np.arange(40) % 2 == 0)


def test_numeric_classes_are_sorted_as_numbers(write):
    table = read_table(write(csv_lines(target=lambda i: str((i % 4) * 5))), "answer")
    assert table.class_names == ["0", "5", "10", "15"]
    np.testing.assert_array_equal(table.labels, np.arange(40) % 4)


@pytest.mark.parametrize(
    "names",
    [
        ["12345670", "12345671"],
        ["12345678901234567890", "12345678901234567891"],
        ["01", "1", "1.0"],
        ["1e400", "2e500"],
    ],
)
def test_numbers_stay_the_texts_that_they_are(write, names):
    table = read_table(write(csv_lines(target=lambda i: names[i % len(names)])), "answer")
    assert table.class_names == names
    lines = [f"{names[i % len(names)]} 1:{i} 2:{i % 7}" for i in range(40)]
    if "1e400" not in names:  # a target that is not finite
        assert read_table(write(lines, "data.svm"), None).class_names == names


def test_classes_are_in_natural_order(write):
    names = ["class-10", "class-2", "class-02", "other", "class-2b"]
    table = read_table(write(csv_lines(target=lambda i: names[i % 5])), "answer")
    assert table.class_names == ["class-02", "class-2", "class-2b", "class-10", "other"]
    np.testing.assert_array_equal(table.labels[:5], [3, 1, 0, 4, 2])


def test_svmlight(tmp_path):
    features = np.random.default_rng(0).normal(size=(45, 4))
    features[features < 0] = 0
    labels = np.arange(45) % 3 - 1
    path = tmp_path / "data.svm"
    dump_svmlight_file(features, labels, str(path), zero_based=False, comment="three classes")
    table = read_table(path, None)
    assert table.class_names == ["-1", "0", "1"]
    assert table.feature_names == ["feature 1", "feature 2", "feature 3", "feature 4"]
    np.testing.assert_allclose(table.features, features, rtol=1e-12)
    np.testing.assert_array_equal(table.labels, labels + 1)


class TestFile:
    def test_missing(self, tmp_path):
        refuse(tmp_path / "none.csv", "there is no file")

    def test_folder(self, tmp_path):
        refuse(tmp_path, "Is a directory")

    @pytest.mark.parametrize("text", ["", "\n  \n", "# only a comment\n"])
    def test_empty(self, tmp_path, text):
        path = tmp_path / "empty.csv"
        path.write_text(text)
        refuse(path, "is empty")

    def test_not_text(self, tmp_path):
        path = tmp_path / "data.xlsx"
        path.write_bytes(b"PK\x03\x04\xff\xfe\x00")
        refuse(path, "is not a text file (in UTF-8)")

    def test_bytes_that_are_zero(self, tmp_path):
        path = tmp_path / "data.csv"
        path.write_bytes(bytes(5000))
        refuse(path, "is not a text file: it has bytes that are zero")

    def test_too_large(self, write, monkeypatch):
        monkeypatch.setattr(files, "MAX_ENTRIES", 79)
        refuse(write(csv_lines()), "has 40 rows and 2 features, too many for this demo")


class TestCsv:
    def test_no_target(self, write):
        message = "say with --target which column of"
        refuse(write(csv_lines()), message, target=None)
        refuse(write(csv_lines()), "'size', 'age', 'answer'", target=None)

    def test_unknown_target(self, write):
        message = "has no column 'Answer'; its columns are 'size', 'age', 'answer'"
        refuse(write(csv_lines()), message, target="Answer")

    def test_long_lists_are_cut(self, write):
        names = [f"c{i}" for i in range(25)]
        refuse(write([",".join(names), ",".join("1" * 25)]), "'c9' and 15 more")

    def test_long_names_are_cut(self, write):
        lines = [f"{'a' * 5000},answer", "1,2"]
        refuse(write(lines), f"its columns are '{'a' * 25}...{'a' * 12}', 'answer'", target="x")

    def test_text_columns(self, write):
        lines = ["city,size,kind,answer"]
        lines += [f"Rome,{i},{i if i < 5 else 'b'},{i % 2}" for i in range(40)]
        message = "not numbers: 'city' (for example 'Rome'), 'kind' (for example 'b');"
        refuse(write(lines), message)

    def test_messages_have_one_line_whatever_is_in_the_file(self, write):
        refuse(write(['"two\nlines",answer', "1,2"]), "'two lines', 'answer'", target="x")
        lines = ["a,answer", *(f'"two\nlines",{i % 2}' for i in range(40))]
        refuse(write(lines), "'a' (for example 'two lines')")

    def test_missing_values(self, write):
        lines = csv_lines()
        lines[3], lines[5], lines[9] = ",1,yes", "NaN,1,no", "1,inf,no"
        refuse(write(lines), "missing or infinite values in 'size' (2), 'age' (1);")

    def test_missing_target_values(self, write):
        lines = csv_lines()
        lines[3] = "1,1,"
        refuse(write(lines), "missing or infinite values in the target 'answer' (1);")

    def test_one_class(self, write):
        lines = csv_lines(target=lambda i: "yes")
        refuse(write(lines), "has only one class, 'yes', in its target; two or more are needed")

    def test_quantity_as_target(self, write):
        message = (
            "has 40 different numbers in its target, which looks like a quantity; "
            "this demo does classification"
        )
        refuse(write(csv_lines(target=lambda i: str(i / 3))), message)

    def test_too_few_rows(self, write):
        refuse(write(csv_lines(rows=12)), "has 12 rows, too few: this demo needs 30")
        refuse(write(csv_lines(rows=0)), "has 0 rows, too few")

    def test_too_few_rows_of_a_class(self, write):
        lines = csv_lines(target=lambda i: "rare" if i < 5 else "yes" if i % 2 else "no")
        refuse(write(lines), "has classes with too few rows, under 6: 'rare' (5)")

    @pytest.mark.parametrize(
        ("separator", "word"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")]
    )
    def test_other_separators(self, write, separator, word):
        lines = [line.replace(",", separator) for line in csv_lines()]
        refuse(write(lines), f"is separated by {word}; this demo reads commas")

    def test_spaces_as_separators(self, write):
        lines = [line.replace(",", "  ") for line in csv_lines()]
        refuse(write(lines), "has one column, no commas; this demo reads commas")

    def test_no_header(self, write):
        refuse(write(["1,2,3", "4,5,6"]), "must hold the names of the columns")

    @pytest.mark.parametrize("target", [None, "kind"])
    def test_no_header_and_a_target_of_words(self, write, target):
        hint = "(does the first line hold the names of the columns?)"
        refuse(write(["5.1,3.5,setosa", "4.9,3.0,setosa"]), hint, target=target)
        refuse(write(["5.1,5.1,setosa", "4.9,3.0,setosa"]), hint, target=target)
        with pytest.raises(DataError) as caught:
            read_table(write(csv_lines()), target)
        assert hint not in str(caught.value)

    def test_only_the_target(self, write):
        lines = ["answer", *("yes" if i % 2 else "no" for i in range(40))]
        refuse(write(lines), "has no column besides the target 'answer'")

    def test_repeated_and_missing_names(self, write):
        refuse(write(["a,b,a,answer"]), "has columns of the same name: 'a'")
        refuse(write([",b,a,answer"]), "has no name", target="answer")

    def test_ragged_rows(self, write):
        lines = csv_lines()
        lines[4] = "1,2,3,yes"
        refuse(write(lines), "has 4 cells, the first line has 3")

    def test_broken_quotes(self, write):
        refuse(write(['a,"b"c,answer']), "is not a valid CSV file")


class TestSvmlight:
    def test_target_is_in_the_file(self, write):
        lines = [f"{i % 2} 1:{i} 2:3" for i in range(40)]
        refuse(write(lines), "leave out --target")

    @pytest.mark.parametrize(
        "line", ["1 two:2", "1 1:x", "yes 1:2", "1 1:2 3", "1 1:2:3", "1 -1:2", f"1 {'9' * 30}:1"]
    )
    def test_broken_line(self, write, line):
        path = write(["# a comment", *(f"{i % 2} 1:{i} 2:3 # {i}" for i in range(40)), line])
        message = f"line 42 is '{line}', expected 'label index:value index:value ...'"
        refuse(path, f"is not a valid svmlight file: {message}", target=None)

    def test_broken_first_line_is_known_by_the_name_of_the_file(self, write):
        path = write(["yes 1:2", *(f"{i % 2} 1:{i} 2:3" for i in range(40))], "data.svm")
        refuse(path, "is not a valid svmlight file: line 1 is 'yes 1:2', expected", target=None)

    @pytest.mark.parametrize("line", ["1 2:1 1:3", "1 1:1 1:3", "1 qid:3 2:1 1:3"])
    def test_indices_out_of_order(self, write, line):
        path = write([*(f"{i % 2} 1:{i} 2:3" for i in range(40)), line])
        message = f"the indices in line 41 must increase, got '{line}'"
        refuse(path, message, target=None)

    def test_missing_values(self, write):
        path = write([f"{i % 2} 1:{i} 2:{'nan' if i < 3 else 1}" for i in range(40)])
        refuse(path, "missing or infinite values in feature 2 (3);", target=None)

    def test_quantity_as_target(self, write):
        path = write([f"{i / 3} 1:{i}" for i in range(40)])
        refuse(path, "this demo does classification", target=None)
