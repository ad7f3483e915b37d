"""The demo from its command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from bilevax.demo import figures, report
from bilevax.demo.cli import main
from bilevax.demo.data import Table, digits, prepare
from bilevax.demo.tuning import Run

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
    ("arguments", "message"),
    [
        (["--steps", "1"], "argument --steps: must be 2 or more, got 1"),
        (["--steps", "many"], "argument --steps: invalid whole_number value: 'many'"),
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


def a_run(shape, validation, test, status=0):
    """Return a run of two entries, the second of which is the better one."""
    loss = {"train": 0.5, "validation": validation, "test": test}
    return Run(
        penalties=np.geomspace(0.001, 0.1, 2 * np.prod(shape)).reshape(2, *shape),
        loss={part: np.array([value + 0.1, value]) for part, value in loss.items()},
        accuracy={part: np.array([0.8, 0.9]) for part in PARTS},
        iterations=np.array([5, 5]),
        status=np.array([0, status]),
        run_seconds=1.0,
        compile_seconds=2.0,
    )


def a_task(classes, features=3):
    names = [f"feature {i}" for i in range(features)]
    generator = np.random.default_rng(0)
    values = generator.normal(size=(12 * classes, features))
    labels = np.arange(12 * classes) % classes
    return prepare(Table("some", values, labels, names, [f"${i}" for i in range(classes)]), seed=0)


@pytest.mark.parametrize(
    ("validation", "test", "status", "expected"),
    [
        (0.2, 0.3, 0, ["validation loss is 50 % lower", "test loss 25 % lower", "flatters"]),
        (0.2, 0.5, 0, ["test loss 25 % higher", "has overfitted: 3 penalties", "8 validation"]),
        (0.5, 0.4, 0, ["validation loss is 25 % higher", "test loss the same", "more --steps"]),
        (0.2, 0.3, 2, ["1 of 2 solves of the tuning ended with MAXITER:\nraise `maxiter`"]),
    ],
)
def test_conclusions(validation, test, status, expected):
    task = a_task(classes=2)
    grid, tuned = a_run((3, 1), 0.4, 0.4), a_run((3, 1), validation, test, status)
    text = report.compare(task, grid, tuned)
    for words in expected:
        assert words in text
    assert "accuracy the same" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    "task",
    [a_task(2), a_task(2, features=50), a_task(3), a_task(3, features=50), prepare(digits(), 0)],
    ids=["bars", "many bars", "map", "large map", "images"],
)
def test_every_kind_of_figure_is_drawn(task, tmp_path):
    run = a_run(task.penalty_shape, 0.2, 0.3)
    figures.plot_penalties(task, run, tmp_path / "penalties.png")
    figures.plot_losses(task, run, run, tmp_path / "losses.png")
    for name in ("penalties", "losses"):
        assert np.ptp(imread(tmp_path / f"{name}.png")) > 0
