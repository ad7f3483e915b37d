"""Runs that go on, runs that are interrupted, and what is left in the folder of the results."""

import json
import shutil
import signal

import numpy as np
import pandas as pd
import pytest

from bilevax.cli import honest, main, task, tuning
from bilevax.cli import predict as prediction

RESULTS = {"model.json", "report.json", "report.html"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with data, groups, and a run that is not finished."""
    folder = tmp_path_factory.mktemp("run")
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 3)), columns=["a", "b", "c"])
    frame["y"] = (frame["a"] + 0.5 * frame["b"] > 0).astype(int)
    frame.to_csv(folder / "data.csv", index=False)
    frame[:8].to_csv(folder / "valid.csv", index=False)
    frame.iloc[::-1].to_csv(folder / "other.csv", index=False)
    for name, groups in {"groups": [1, 1, 2], "same": [1, 1, 2], "others": [1, 2, 2]}.items():
        groups = pd.DataFrame({"feature": ["a", "b", "c"], "group": groups})
        groups.to_csv(folder / f"{name}.csv", index=False)
    assert main([*arguments(folder), "--steps", "1"]) == 3
    return folder


def arguments(folder, data="data.csv", penalty="groups.csv", model="ridge"):
    return [
        "tune", str(folder / data), "--target", "y", "--model", model,
        "--penalty", str(folder / penalty), "--rule", "newton", "--out", str(folder / "out"),
    ]  # fmt: skip


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "jacobi"], "--rule was newton, is jacobi"),
        (["--shrink", "2"], "--shrink was not given, is 2.0"),
        (["--no-honest-score"], "--no-honest-score was not given, is given"),
        (["--seed", "4", "--cv", "3"], "--cv was 5, is 3; --seed was 0, is 4"),
        (["--model", "logistic"], "--model was ridge, is logistic"),
        (
            ["--target", "c", "--penalty", "single"],
            "--target was y, is c; --penalty was FILE.csv",
        ),
        (["--penalty", "per-feature"], "--penalty was FILE.csv, is per-feature"),
        (["--penalty", "others.csv"], "the groups in others.csv are others"),
        (["--validation", "valid.csv"], "--validation was not given, is FILE; --cv was 5, is not"),
    ],
)
def test_other_options_are_refused(folder, capsys, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    before = contents(folder)
    assert main([*arguments(folder), "--resume", *options]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"bilevax tune: cannot --resume: {message}")
    assert "Only --steps and --accuracy may change; to start again, choose another" in printed
    assert printed.count("\n") == 1
    assert contents(folder) == before


def test_other_data_are_refused(folder, capsys):
    assert main([*arguments(folder, data="other.csv"), "--resume"]) == 2
    message = f"cannot --resume: the data in {folder / 'other.csv'} have changed since. Only"
    assert message in capsys.readouterr().err


def test_a_record_that_cannot_be_read_is_refused(folder, capsys):
    record = folder / "out" / "checkpoints" / "run.json"
    before = record.read_text()
    record.write_text("{}")
    try:
        assert main([*arguments(folder), "--resume"]) == 2
    finally:
        record.write_text(before)
    assert f"cannot --resume: {record} cannot be read; choose another" in capsys.readouterr().err


def test_honest_scores_are_written_down(folder, tmp_path, monkeypatch):
    def again(*arguments, **options):
        raise AssertionError("scored again")

    shutil.copytree(folder / "out", tmp_path / "out")
    monkeypatch.setattr(honest, "score", again)
    command = [*arguments(folder)[:-1], str(tmp_path / "out"), "--resume", "--steps", "2"]
    assert main(command) in (0, 3)
    reports = [
        json.loads((out / "report.json").read_text()) for out in (folder / "out", tmp_path / "out")
    ]
    assert reports[0]["honest"] == reports[1]["honest"] is not None
    (tmp_path / "out" / "checkpoints" / "honest.json").write_text("{}")
    with pytest.raises(AssertionError, match="scored again"):
        main([*command[:-1], "3"])


def test_without_an_honest_score_the_tuned_penalties_are_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(honest, "score", None)
    command = [*arguments(folder)[:-1], str(tmp_path), "--no-honest-score", "--shrink", "0.3"]
    assert main([*command, "--steps", "3"]) in (0, 3)
    report, model = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("report", "model")
    )
    assert report["honest"] is None and report["shrink"] == 0.3
    assert report["outcome"]["written"] == "tuned"
    tuned = report["penalties"]
    assert model["penalties"] == [tuned["1"], tuned["1"], tuned["2"]] and tuned["1"] != tuned["2"]
    assert "honest_score" not in report["seconds"]


def test_files_of_another_name_steps_and_accuracy_may_change(folder, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "search_grid", interrupt)
    shutil.copy(folder / "data.csv", folder / "copy.csv")
    before = contents(folder / "out")
    again = arguments(folder, data="copy.csv", penalty="same.csv")
    assert main([*again, "--resume", "--steps", "7", "--accuracy", "0.5"]) == 130
    expected = f"interrupted; go on with the same command and --resume, the state is in {folder}"
    assert expected in capsys.readouterr().err
    assert contents(folder / "out") == before


def test_a_changed_validation_file_is_refused(folder, tmp_path, capsys, monkeypatch):
    valid, command = tmp_path / "valid.csv", [*arguments(folder)[:-1], str(tmp_path / "out")]
    command += ["--validation", str(valid), "--no-honest-score"]
    shutil.copy(folder / "valid.csv", valid)

    def save(*arguments):
        (tmp_path / "out" / "checkpoints" / "save_0").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "search_grid", lambda *arguments: None)
    monkeypatch.setattr(tuning, "tune", save)
    assert main(command) == 130
    shutil.copy(folder / "other.csv", valid)
    assert main([*command, "--resume"]) == 2
    message = f"cannot --resume: the data in {valid} have changed since."
    assert message in capsys.readouterr().err


class TestWhatIsLeft:
    @pytest.fixture
    def out(self, tmp_path):
        """Return a folder with the results of an earlier run."""
        out = tmp_path / "out"
        out.mkdir()
        for name in (*RESULTS, "notes.txt"):
            (out / name).write_text("old")
        return out

    def tune(self, folder, out, *more):
        command = arguments(folder)
        return main([*command[:-1], str(out), *more])

    def test_a_new_run_removes_old_results_before_its_first_step(self, folder, out, monkeypatch):
        def start(*arguments):
            assert {path.name for path in out.iterdir()} == {"notes.txt", "checkpoints"}
            record = json.loads((out / "checkpoints" / "run.json").read_text())
            assert record["options"]["--rule"] == "newton"
            raise KeyboardInterrupt

        monkeypatch.setattr(tuning, "search_grid", lambda *arguments: None)
        monkeypatch.setattr(tuning, "tune", start)
        assert self.tune(folder, out, "--no-honest-score") == 130
        assert {path.name for path in out.iterdir()} == {"notes.txt"}

    def test_a_run_that_is_refused_leaves_them(self, folder, out):
        assert self.tune(folder, out, "--cv", "50") == 2
        assert {path.name for path in out.iterdir()} == {*RESULTS, "notes.txt"}

    def test_no_empty_folder(self, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(tuning, "search_grid", interrupt)
        assert self.tune(folder, tmp_path / "new") == 130
        message = "bilevax tune: interrupted; no step had been taken, nothing is saved\n"
        assert capsys.readouterr().err == message
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("module", "command"), [(task, "tune"), (prediction, "predict")])
def test_interrupted_while_reading(folder, capsys, monkeypatch, module, command, number):
    monkeypatch.setattr(module, "read_table", lambda *arguments: signal.raise_signal(number))
    monkeypatch.setattr(prediction, "read_model", lambda path: None)
    words = arguments(folder) if command == "tune" else ["predict", "model.json", "data.csv"]
    assert main(words) == 130
    assert capsys.readouterr().err == f"bilevax {command}: interrupted\n"
