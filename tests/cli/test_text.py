"""Texts stay texts, and messages count lines as people do."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import bilevax
from bilevax._frontend.numbers import varies
from bilevax._frontend.words import in_order
from bilevax.cli.choices import Kind
from bilevax.cli.data import prepare, prepare_validation
from bilevax.cli.files import read_groups, read_table
from bilevax.cli.rows import as_rows, standardise

KINDS = [
    ["01", "1"],
    ["1", "1.0"],
    ["12345678901234567890", "12345678901234567891"],
    ["1e400", "2e500"],
    ["FALSE", "TRUE"],
    ["no", "yes"],
    ["0x10", "1_0"],
]


@pytest.mark.parametrize("labels", KINDS, ids=str)
def test_labels_of_csv_files_stay_texts(write, labels):
    lines = ["a,y", *(f"{i},{labels[i % 2]}" for i in range(6))]
    data = prepare(read_table(write(lines), ["y"]), "y", Kind.LOGISTIC)
    assert data.classes == labels
    np.testing.assert_array_equal(data.target, np.arange(6) % 2)
    # A file of one kind of label, which might pass for numbers, is as good as any other.
    few = read_table(write(["a,y", *(f"{i},{labels[1]}" for i in range(3))], "few.csv"), ["y"])
    np.testing.assert_array_equal(prepare_validation(few, "y", data).target, [1, 1, 1])


@pytest.mark.parametrize("labels", KINDS[:3], ids=str)
def test_labels_of_libsvm_files_stay_texts(write, labels):
    lines = [f"{labels[i % 2]} 1:{i}" for i in range(6)]
    assert prepare(read_table(write(lines, "a.svm")), None, Kind.LOGISTIC).classes == labels


def test_labels_of_parquet_files_are_those_of_csv_files(tmp_path):
    columns = {
        "1 2": [1, 2], "1 2 ": [1.0, 2.0], "0.5 1": [0.5, 1.0], "False True": [True, False],
        "9007199254740993 9007199254740994": [2**53 + 1, 2**53 + 2], "no yes": ["yes", "no "],
    }  # fmt: skip
    for words, values in columns.items():
        pd.DataFrame({"a": [1, 2], "y": values}).to_parquet(tmp_path / "a.parquet")
        table = read_table(tmp_path / "a.parquet", ["y"])
        assert prepare(table, "y", Kind.LOGISTIC).classes == words.split()


def test_labels_that_look_alike_are_one_class(write):
    lines = ["a,y", "1,yes", '2,"yes "', "3,  yes", "4,no", '5,"n\to"', "6,n o"]
    data = prepare(read_table(write(lines), ["y"]), "y", Kind.MULTINOMIAL)
    assert data.classes == ["n o", "no", "yes"]
    np.testing.assert_array_equal(data.target, [2, 2, 2, 1, 0, 0])
    gaps = read_table(write(["a,y", '1,"NA "', "2,x"], "b.csv"), ["y"])
    assert list(gaps.columns["y"].isna()) == [True, False]


def test_names_in_group_files_stay_texts(write):
    names = ["01", "1", "1.0", "NA", "TRUE", "1e400"]
    groups = ["007", "7", "7.0", "NULL", "None", "2e500"]
    lines = ["feature,group", *map(",".join, zip(names, groups, strict=True))]
    assert read_groups(write(lines), names) == dict(zip(names, groups, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_no_order_merges_texts(seed):
    rng = np.random.default_rng(seed)
    letters = list("01.e-") if seed % 2 else list("01ab")
    names = ["".join(rng.choice(letters, rng.integers(1, 5))) for _ in range(30)]
    names = [name for name in names if seed % 2 == 0 or name.strip("e-.").isdigit()] or ["1"]
    assert sorted(in_order(names)) == sorted(set(names))
    assert in_order(names) == in_order(names[::-1])
    assert in_order(["10", "9", "1e0", "01"]) == ["01", "1e0", "9", "10"]


class TestLines:
    QUOTED = ("size,note,y", '1,"a', 'b",1', "2,c,2")

    def test_cells_of_many_lines(self, refuse, write):
        target = ["--target", "y", "--model", "ridge"]
        lines = ['size,"no\nte",y', '1,"2', '",1', "", "2,3,2", ",3,4"]
        refuse("'size' (1, the first in line 7)", write(lines), *target)
        lines = [*self.QUOTED, "1,2,3,4"]
        refuse("Expected 3 fields in line 5, saw 4", write(lines), *target)

    def test_a_quote_that_is_not_closed(self, refuse, write):
        message = "is not a valid CSV file: unexpected end of data, in the record that starts in"
        lines = [*self.QUOTED, '3,"d,4', "5,6,7"]
        refuse(f"{message} line 5", write(lines), "--target", "y", "--model", "ridge")

    @pytest.mark.parametrize(
        ("separator", "word"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")]
    )
    def test_decimal_commas(self, refuse, write, separator, word):
        rows = [[f"{i},5", f"{i * i % 7},25"] for i in range(8)]
        lines = [separator.join(row) for row in [["size", "y"], *rows]]
        message = f"is separated by {word}; turn them into commas (and decimal commas into points)"
        refuse(message, write(lines), "--target", "y", "--model", "ridge")
        lines[0] = separator.join(["size, cm", "age", "y"])
        message = f"Expected 2 fields in line 2, saw 3 (is it separated by {word}?)"
        refuse(message, write(lines), "--target", "y", "--model", "ridge")

    def test_separators_in_names_are_no_separators(self, write):
        assert list(read_table(write(["a;b;c,y", "1,2"])).columns) == ["a;b;c", "y"]


class TestVariation:
    @pytest.mark.parametrize("size", [1e-300, 0.3, -7.0, 1e300])
    def test_a_range_of_rounding_is_none(self, size):
        rng = np.random.default_rng(0)
        noise = size * (1 + np.finfo(float).eps * rng.integers(-3, 4, 50))
        variation = size * (1 + 1e-12 * rng.integers(-3, 4, 50))
        assert list(varies(np.stack([noise, variation], axis=1))) == [False, True]

    def test_the_range_may_overflow(self):
        assert varies(np.array([[-1.7e308], [1.7e308]]))[0]

    def test_such_a_column_is_left_out(self, write):
        cells = ["0.3", "0.30000000000000004"]
        lines = ["a,b,y", *(f"{cells[i % 2]},{i},{i * i}" for i in range(10))]
        data = prepare(read_table(write(lines)), "y", Kind.RIDGE)
        assert data.names == ["b"] and data.dropped == ["a"]
        rows = as_rows(data, standardise(data), Kind.RIDGE)
        assert np.abs(rows.design).max() < 3

    def test_such_a_target_is_refused(self, refuse, write):
        cells = ["0.3", "0.30000000000000004"]
        lines = ["a,y", *(f"{i},{cells[i % 2]}" for i in range(10))]
        refuse("is 0.3 in all rows", write(lines), "--target", "y", "--model", "ridge")


def test_wrong_data_wait_for_nothing_but_pandas(write, tmp_path):
    """The package itself imports JAX, so its own modules are imported without it here."""
    model = write([json.dumps({"format": "none"})], "model.json")
    script = (
        "import sys, types\n"
        "package = types.ModuleType('bilevax')\n"
        f"package.__path__ = [{str(Path(bilevax.__file__).parent)!r}]\n"
        "sys.modules['bilevax'] = package\n"
        "import bilevax.cli\n"
        f"data, model = {str(write(['a,y', '1,2']))!r}, {str(model)!r}\n"
        "codes = [bilevax.cli.main(['tune', data, '--target', 'x', '--model', 'ridge']),\n"
        "         bilevax.cli.main(['predict', model, data])]\n"
        "heavy = {'jax', 'matplotlib', 'orbax', 'optax', 'sklearn'}\n"
        "print(codes, heavy & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "[2, 2] set()\n", run.stderr
