"""The demo's table, conclusions and figures."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from bilevax.demo import figures, report
from bilevax.demo.data import Table, digits, prepare
from bilevax.demo.study import RTOLS, RULES, Study
from bilevax.demo.tuning import Run
from tests.everyday import slow

PARTS = {"train", "validation", "test"}


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


@pytest.mark.parametrize("loss", [0.1234, 98.99999, 150.0, 89999.99, 1e9, 1e200, np.inf, np.nan])
def test_no_loss_breaks_the_table(loss):
    task, grid, tuned = a_task(classes=2), a_run((3, 1), 0.4, 0.4), a_run((3, 1), 0.3, loss)
    lines = report.compare(task, grid, tuned).splitlines()
    assert max(map(len, lines)) <= 100
    _, heads, start, single, best = lines[:5]
    ends = [heads.index(word) + len(word) for word in ("train", "valid.", "test")]
    for row in (start, single, best):
        assert all(row[end - 1] != " " and row[end] == " " for end in ends)
    assert float(best[ends[1] : ends[2]]) == pytest.approx(loss, rel=0.4, nan_ok=True)


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """Keep the figures that are written, for their axes to be looked at."""
    kept = []

    def save(figure, path):
        figure.draw_without_rendering()
        kept.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return kept


def labels(axis):
    """Return the numbers that can be read within the limits of an axis."""
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [float(text.get_text()) for place, text in ticks if low <= place <= high]


@pytest.mark.parametrize("entries", [2, 3, 40])
def test_steps_are_whole_numbers(entries, saved, tmp_path):
    run = a_run((3, 1), 0.2, 0.3)
    values = np.linspace(0.3, 0.2, entries)
    run = run._replace(loss=dict.fromkeys(PARTS, values), status=np.zeros(entries, int))
    figures.plot_losses(a_task(2), a_run((3, 1), 0.2, 0.3), run, tmp_path / "x.png")
    steps = labels(saved[0].axes[0].xaxis)
    assert len(steps) >= 2
    assert all(step.is_integer() for step in steps)


# No range, less than a decade, and many decades; the others are in between.
@pytest.mark.parametrize(
    "ratio",
    [1.0, 1.2, 1e12, *map(slow, (1.0001, 2.0, 9.0, 1e3))],
)
def test_every_range_has_labels(ratio, saved, tmp_path):
    task, run = a_task(3), a_run((3, 3), 0.2, 0.3)
    penalties = 0.013 * np.geomspace(1, ratio, 18).reshape(2, 3, 3)
    losses = 0.7 * np.array([1, max(ratio, 1.0001)])
    run = run._replace(penalties=penalties, loss=dict.fromkeys(PARTS, losses))
    figures.plot_losses(task, run, run, tmp_path / "x.png")
    figures.plot_penalties(task, run, tmp_path / "x.png")
    bars = run._replace(penalties=penalties[:, :, :1])
    figures.plot_penalties(a_task(2), bars, tmp_path / "x.png")
    curves, color_map, bar_figure = saved
    axes = curves.axes[0].yaxis, color_map.axes[1].yaxis, bar_figure.axes[0].xaxis
    for axis in axes:
        assert 3 <= len(set(labels(axis))) <= 10


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_errors_without_an_end_have_no_guides(value, saved, tmp_path):
    error = {name: np.array([*RTOLS[:-1], value]) for name in RULES}
    study = Study(RTOLS, np.arange(len(RTOLS)), RTOLS, error)
    figures.plot_errors(a_task(2), study, tmp_path / "x.png")
    assert not saved[0].axes[0].texts


def test_errors_have_guides_and_say_where_small_is(saved, tmp_path):
    distance = np.geomspace(0.5, 0.07, len(RTOLS))
    error = {name: distance ** (2 if name == "Newton step" else 1) for name in RULES}
    study = Study(RTOLS, np.arange(len(RTOLS)), distance, error)
    figures.plot_errors(a_task(2), study, tmp_path / "x.png")
    (axes,) = saved[0].axes
    assert axes.get_xlabel().endswith("smaller to the right")
    assert axes.xaxis_inverted()
    assert len(labels(axes.xaxis)) >= 3
    guides = axes.lines[len(RULES) :]
    assert [text.get_text() for text in axes.texts] == ["slope 2", "slope 1"]
    for slope, guide in zip((2, 1), guides, strict=True):
        x, y = guide.get_data()
        np.testing.assert_allclose(np.diff(np.log(y)) / np.diff(np.log(x)), slope)
