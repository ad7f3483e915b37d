"""The demo from its command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from bilevax.demo import cli
from bilevax.demo.cli import main

PARTS = {"train", "validation", "test"}


@pytest.fixture
def csv_file(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = generator.normal(size=(60, 2)) + labels[:, None]
    rows = [f"{a},{b},{'yes' if y else 'no'}" for (a, b), y in zip(features, labels, strict=True)]
    path = tmp_path / "my data.csv"
    path.write_text("\n".join(["first,price in $,answer", *rows]))
    return path


def test_end_to_end(csv_file, tmp_path, capsys):
    output = tmp_path / "new" / "output"
    arguments = ["--data", str(csv_file), "--target", "answer", "--steps", "2"]
    assert main([*arguments, "--output", str(output)]) == 0

    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar where there is no terminal
    for expected in (
        "my data: 2 features, 2 classes, 2 penalties",
        "rows: 20 train, 20 validation, 20 test",
        "start, every penalty 0.01",
        "best single penalty, ",
        "tuned, one penalty each",
        "Newton step",
        str(output),
    ):
        assert expected in printed.out
    assert "Warning" not in printed.out

    files = {path.name for path in output.iterdir()}
    pictures = {f"my-data-{name}.png" for name in ("losses", "penalties", "errors")}
    assert files == pictures | {"results.json"}
    for picture in pictures:
        assert np.ptp(imread(output / picture)) > 0

    results = json.loads((output / "results.json").read_text())
    assert results.keys() == {"seed", "steps", "precision", "data"}
    (data,) = results["data"]
    check_schema(data, features=["first", "price in $"], steps=2)
    assert data["classes"] == ["no", "yes"]
    assert data["rows"] == {"train": 20, "validation": 20, "test": 20}
    assert data["tuned"]["loss"]["validation"] < data["start"]["loss"]["validation"]
    errors = data["study"]["error"]
    assert list(errors) == [
        "implicit", "Jacobi step", "Newton step", "diagonal change", "exponential change"
    ]  # fmt: skip
    assert errors["Newton step"][-1] < 1e-3 * errors["implicit"][-1]


def check_schema(data, features, steps):
    assert data.keys() == {
        "name", "rows", "features", "classes", "start", "best_single", "tuned", "grid", "tuning",
        "study",
    }  # fmt: skip
    assert data["features"] == features
    assert np.shape(data["tuned"]["penalties"]) == (len(features), 1)
    for entry in ("start", "best_single", "tuned"):
        assert data[entry]["loss"].keys() == data[entry]["accuracy"].keys() == PARTS
    for history, solves in {"grid": 50, "tuning": steps}.items():
        assert data[history]["inner_solves"] == solves
        assert data[history]["status"] == ["CONVERGED"] * solves
        assert data[history]["run_seconds"] > 0
        assert data[history]["compile_seconds"] > 0
        for part in PARTS:
            assert np.isfinite(data[history]["loss"][part]).all()
            assert len(data[history]["accuracy"][part]) == solves
    best = np.argmin(data["grid"]["loss"]["validation"])
    assert data["best_single"]["penalty"] == data["grid"]["penalties"][best]
    assert data["best_single"]["loss"]["test"] == data["grid"]["loss"]["test"][best]
    step = data["tuned"]["step"]
    assert data["tuned"]["loss"]["test"] == data["tuning"]["loss"]["test"][step]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none.csv"], "there is no file none.csv"),
        (["--target", "answer"], "--target names a column of a CSV file: give the file with"),
        (["--data", "CSV"], "say with --target which column of"),
        (["--data", "CSV", "--target", "x"], "its columns are 'first', 'price in $', 'answer'"),
        (["--data", "CSV", "--target", "first"], "columns that are not numbers: 'answer'"),
        (["--data", "CSV", "--target", "answer", "--output", "CSV"], "cannot write to the folder"),
    ],
)
def test_wrong_data_ends_with_one_line_and_code_2(arguments, message, csv_file, capsys):
    arguments = [str(csv_file) if argument == "CSV" else argument for argument in arguments]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("bilevax.demo: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["7"] * 60, "no column of data varies in the training rows"),
        ([*["1e200"] * 3, *range(57)], "column 'size' of data has a cell 1e+200, "),
        (["1e308"] * 60, "column 'size' of data has a cell 1e+308, "),
    ],
)
def test_wrong_cells_end_with_one_line_and_code_2(values, message, tmp_path, capsys):
    path, output = tmp_path / "data.csv", tmp_path / "output"
    rows = [f"{value},{i % 2}" for i, value in enumerate(values)]
    path.write_text("\n".join(["size,answer", *rows]))
    assert main(["--data", str(path), "--target", "answer", "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"bilevax.demo: {message}")
    assert printed.err.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("before", [None, "", "{}"])
def test_a_failed_run_leaves_no_empty_results(before, csv_file, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    results = tmp_path / "results.json"
    if before is not None:
        results.write_text(before)
    monkeypatch.setattr(cli, "search_grid", lambda task: None)  # which takes a second
    monkeypatch.setattr(cli, "tune", fail)
    with pytest.raises(KeyboardInterrupt):
        main(["--data", str(csv_file), "--target", "answer", "--output", str(tmp_path)])
    # The numbers of an earlier run stay.
    assert (results.read_text() if results.exists() else None) == (before or None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "argument --steps: must be 2 or more, got 1"),
        (["--steps", "many"], "argument --steps: must be a whole number, got 'many'"),
        (["--seed", "1.5"], "argument --seed: must be a whole number, got '1.5'"),
        (["--output", ""], "argument --output: must name a folder, got ''"),
        (["--seed", "-1"], "argument --seed: must be 0 or more, got -1"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_options_end_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--data", "--target", "--steps", "--seed", "--output"):
        assert option in printed


def test_a_missing_package_is_named():
    program = (
        "import runpy, sys; sys.modules['sklearn'] = None; "
        "runpy.run_module('bilevax.demo', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    message = "The demo needs scikit-learn, which is not installed: pip install 'bilevax[demo]'\n"
    assert done.returncode == 1
    assert done.stderr.endswith(message)
    assert "Traceback" not in done.stderr
