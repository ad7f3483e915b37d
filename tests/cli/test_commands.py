"""The commands from the command line: what they write and print, and how they end."""

import base64
import io
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from sklearn.datasets import dump_svmlight_file

import bilevax.cli
from bilevax.checkpoints import Checkpoints
from bilevax.cli import main, tuning
from bilevax.outer import OpenCheckpoints

FILES = {"model.json", "report.json", "report.html"}


@pytest.fixture(scope="module")
def table():
    generator = np.random.default_rng(0)
    names = ["first", "price in $", "third <b>", "noise"]
    frame = pd.DataFrame(generator.normal(size=(60, 4)), columns=names)
    frame["constant"] = 3.0
    score = frame["first"] - 2 * frame["price in $"] + 0.3 * generator.normal(size=60)
    frame["amount"] = 50 + 10 * score
    frame["answer"] = np.where(score > 0, "yes", "no")
    return frame


@pytest.fixture(scope="module")
def ridge(table, tmp_path_factory):
    """Return the data file and the output folder of a finished run."""
    folder = tmp_path_factory.mktemp("ridge")
    data, out = folder / "prices.csv", folder / "new" / "out"
    table.drop(columns="answer").to_csv(data, index=False)
    arguments = ["tune", str(data), "--target", "amount", "--model", "ridge", "--cv", "3"]
    assert main([*arguments, "--steps", "400", "--out", str(out)]) == 0
    return data, out


def read(path):
    return json.loads(path.read_text())


def test_the_model(ridge, table):
    model = read(ridge[1] / "model.json")
    assert model["model"] == "ridge" and model["target"] == "amount" and model["classes"] is None
    assert model["features"] == ["first", "price in $", "third <b>", "noise"]
    kept = table[model["features"]]
    np.testing.assert_allclose(model["preprocessing"]["means"], kept.mean())
    np.testing.assert_allclose(model["preprocessing"]["scales"], kept.std(ddof=0))
    first, price, *rest = model["original"]["coefficients"][0]
    assert abs(first - 10) < 1 and abs(price + 20) < 1 and np.max(np.abs(rest)) < 1
    assert model["penalties"][1] < model["penalties"][3]
    # The fit solves the normal equations with these penalties.
    features = (kept - kept.mean()) / kept.std(ddof=0)
    target = (table["amount"] - table["amount"].mean()) / table["amount"].std(ddof=0)
    matrix = features.T.to_numpy() @ features.to_numpy() / 60 + np.diag(model["penalties"])
    expected = np.linalg.solve(matrix, features.T.to_numpy() @ target / 60)
    np.testing.assert_allclose(model["standardised"]["coefficients"][0], expected, rtol=1e-7)


def test_the_report(ridge):
    report = read(ridge[1] / "report.json")
    assert report["settings"]["cv"] == 3 and report["settings"]["steps"] == 400
    assert report["data"]["rows"] == 60 and report["data"]["constant_features"] == ["constant"]
    losses = report["losses"]
    assert losses["loss"] == "squared error"
    assert losses["tuned"]["mean"] <= losses["best_single"]["mean"] < losses["start"]["mean"]
    np.testing.assert_allclose(
        losses["best_single"]["mean"], min(report["grid"]["losses"]), rtol=1e-4
    )
    for entry in ("tuned", "best_single"):
        np.testing.assert_allclose(np.mean(losses[entry]["folds"]), losses[entry]["mean"])
    assert len(report["penalties"]) == 4
    honest = report["honest"]
    assert honest["shrinks"][0] == 1 and report["shrink"] in honest["shrinks"]
    place = honest["shrinks"].index(report["shrink"])
    assert honest["tuned"] == honest["tuned_by_shrink"][place]
    assert honest["spread"] == honest["spread_by_shrink"][place] > 0
    surely = honest["best_single"] - honest["tuned"] > honest["spread"]
    assert report["outcome"]["written"] == ("tuned" if surely else "best_single")
    history = report["history"]
    assert {len(values) for values in history.values()} == {report["outcome"]["steps"]}
    assert history["projected_gradient"][-1] <= 0.05
    assert set(history["status"]) == {"CONVERGED"}
    assert report["outcome"]["name"] == "CONVERGED" and report["outcome"]["accuracy_reached"]
    seconds = report["seconds"]
    assert all(part > 0 for part in seconds.values())
    np.testing.assert_allclose(sum(seconds.values()), 2 * seconds["total"])


def test_the_page_has_its_figures_inside_and_nothing_from_elsewhere(ridge):
    page = (ridge[1] / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3
    for picture in pictures:
        assert np.ptp(imread(io.BytesIO(base64.b64decode(picture)))) > 0
    assert not re.search(r"https?:|<script|<link|@import|src=\"(?!data:)", page)
    assert "prices: 60 rows" in page and "third <b>" not in page
    assert (
        "The losses of the steps are those of fits that end early, with the pull of --shrink."
        in page
    )


def test_a_finished_run_leaves_no_checkpoints(ridge):
    assert {path.name for path in ridge[1].iterdir()} == FILES


def test_predictions_are_those_of_the_coefficients(ridge, table, capsys):
    data, out = ridge
    assert main(["predict", str(out / "model.json"), str(data)]) == 0
    model = read(out / "model.json")["original"]
    predictions = pd.read_csv(io.StringIO(capsys.readouterr().out))["prediction"]
    expected = table.iloc[:, :4].to_numpy() @ model["coefficients"][0] + model["intercepts"][0]
    np.testing.assert_allclose(predictions, expected, rtol=1e-9)
    assert np.corrcoef(predictions, table["amount"])[0, 1] > 0.98


@pytest.fixture
def grouped(table, tmp_path):
    """Return the arguments of a run of two steps with groups and a validation file; its folder."""
    columns = table.drop(columns=["amount", "constant"])
    columns[:40].to_parquet(tmp_path / "train.parquet")
    columns[40:].to_csv(tmp_path / "valid.csv", index=False)
    words = ["good", "good", "bad", "bad"]
    groups = pd.DataFrame({"feature": columns.columns[:4], "group": words})
    groups.to_csv(tmp_path / "groups.csv", index=False)
    out = tmp_path / "out"
    arguments = [
        "tune", str(tmp_path / "train.parquet"), "--target", "answer", "--model", "logistic",
        "--penalty", str(tmp_path / "groups.csv"), "--validation", str(tmp_path / "valid.csv"),
        "--out", str(out), "--steps", "2", "--rule", "newton",
    ]  # fmt: skip
    return arguments, out


def test_groups_a_validation_file_and_too_few_steps(grouped, capsys, monkeypatch):
    arguments, out = grouped
    grids, search = [], tuning.search_grid
    monkeypatch.setattr(tuning, "search_grid", lambda *a: grids.append(search(*a)) or grids[-1])
    assert main(arguments) == 3
    printed = capsys.readouterr()
    assert "train: 40 rows, 4 features, logistic model, validation file" in printed.out
    assert "tuned, 2 penalties" in printed.out
    assert "The accuracy of 0.05 was not reached: go on with --resume and" in printed.err
    report = read(out / "report.json")
    assert report["penalties"].keys() == {"good", "bad"}
    assert report["data"]["validation_rows"] == 20
    assert report["settings"]["cv"] is None
    assert len(report["losses"]["tuned"]["folds"]) == 1

    assert main(arguments) == 2
    assert "has a run that is not finished: go on with --resume" in capsys.readouterr().err
    (out / "checkpoints" / "problem.json").write_text("{}")
    monkeypatch.setattr(tuning, "search_grid", lambda *a: grids[0])  # of the same data
    assert main([*arguments, "--resume"]) == 2
    assert "cannot use" in capsys.readouterr().err


# Every day, runs go on in the next test, and end with the same bits in `tests/outer`.
@pytest.mark.slow
def test_going_on_ends_where_a_run_in_one_go_does(grouped, tmp_path):
    arguments, out = grouped
    assert main(arguments) == 3
    assert main([*arguments, "--resume", "--steps", "5"]) == 3
    whole = [str(tmp_path / "whole") if word == str(out) else word for word in arguments]
    assert main([*whole, "--steps", "5"]) == 3
    models = [(folder / "model.json").read_bytes() for folder in (out, tmp_path / "whole")]
    assert models[0] == models[1]


class _Interrupting(Checkpoints):
    """Checkpoints of a run that gets a signal after its second step."""

    def open(self, identity, like):
        return _OpenInterrupting(super().open(identity, like))


class _OpenInterrupting(OpenCheckpoints):
    def __init__(self, opened):
        self._opened = opened

    def is_due(self, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return self._opened.is_due(step)

    def steps_until_due(self, step):
        return max(1, 2 - step)

    def restore(self):
        return self._opened.restore()

    def save(self, step, state, value):
        self._opened.save(step, state, value)

    def close(self):
        self._opened.close()


def test_multinomial_libsvm_interrupted_and_resumed(tmp_path, capsys, monkeypatch):
    generator = np.random.default_rng(1)
    features = generator.normal(size=(90, 3)) * (generator.random((90, 3)) < 0.7)
    labels = np.argmax(features + 0.5 * generator.normal(size=(90, 3)), axis=1) + 1
    data, out = tmp_path / "data.svm", tmp_path / "out"
    dump_svmlight_file(features, labels, str(data), zero_based=False)
    arguments = ["tune", str(data), "--model", "multinomial", "--cv", "3", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "Checkpoints", _Interrupting)
        assert main(arguments) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "interrupted; go on with the same command and --resume" in printed.err
    assert {path.name for path in out.iterdir()} == {"checkpoints"}

    code = main([*arguments, "--resume", "--steps", "300"])
    assert code == 0
    printed = capsys.readouterr()
    assert "multinomial model, 3 folds" in printed.out
    assert printed.err == ""  # no progress bar where there is no terminal
    assert read(out / "report.json")["outcome"]["steps"] > 2
    model = read(out / "model.json")
    assert model["classes"] == ["1", "2", "3"] and model["target"] is None
    assert np.shape(model["original"]["coefficients"]) == (3, 3)
    np.testing.assert_allclose(np.sum(model["original"]["coefficients"], axis=0), 0, atol=1e-9)

    # A file whose last features are all zero is as good as any other.
    features[:, 2] = 0
    dump_svmlight_file(features, labels, str(data), zero_based=False)
    assert main(["predict", str(out / "model.json"), str(data)]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out), dtype={"prediction": str})
    assert list(frame) == ["prediction", "probability 1", "probability 2", "probability 3"]
    np.testing.assert_allclose(frame.iloc[:, 1:].sum(axis=1), 1)
    best = frame.iloc[:, 1:].to_numpy().argmax(axis=1)
    assert list(frame["prediction"]) == [str(i + 1) for i in best]


def test_what_a_run_without_a_checkpoint_has_left_is_no_obstacle(ridge, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "problem.json").write_text("{}")
    arguments = ["tune", str(ridge[0]), "--target", "amount", "--model", "ridge", "--cv", "3"]
    assert main([*arguments, "--penalty", "single", "--out", str(tmp_path)]) == 0
    assert "tuned, 1 penalty " in capsys.readouterr().out


def test_interrupted_before_the_first_step(ridge, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(tuning, "search_grid", interrupt)
    arguments = ["tune", str(ridge[0]), "--target", "amount", "--model", "ridge"]
    assert main([*arguments, "--out", str(tmp_path)]) == 130
    assert "interrupted; no step had been taken, nothing is saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["tune", "predict", ".parquet", "--version"]),
        (
            ["tune"],
            [
                "1/2 sum over features",
                "groups.csv",
                "model.json",
                "examples:",
                "--resume",
                "--resume goes on, if a step had been taken",
                "no missing values",
                "-1.#QNAN",
                "That loss flatters, for it is what was minimised.",
                "1, 0.1, 0.01, 0 are tried in the nested searches",
                "--no-honest-score",
                "A new run replaces the results of an earlier one",
                "fits that end early",
                "only --steps and --accuracy may change",
                "parts sum up to the total",
            ],
        ),
        (["predict"], ["probability CLASS", "examples:", "exit codes"]),
    ],
)
def test_help(command, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in words:
        assert word in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_missing_package_is_named(monkeypatch):
    script = (
        "import sys, importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'pandas' else find(name, *rest)\n"
        "sys.argv = ['bilevax', '--help']\n"
        "import bilevax.cli\n"
        "bilevax.cli.main()\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 1
    assert "needs pandas, not installed here: pip install 'bilevax[cli]'" in run.stderr


def test_help_does_not_wait_for_what_only_commands_need():
    script = (
        "import sys, bilevax.cli\n"
        "try:\n    bilevax.cli.main(['tune', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'matplotlib', 'orbax', 'pandas', 'pyarrow', 'sklearn'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.endswith("set()\n"), run.stderr


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "bilevax.cli", "--version"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("bilevax ")
    assert bilevax.cli.__doc__
