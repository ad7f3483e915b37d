"""What is said and drawn about a run, on runs that were never made."""

from types import SimpleNamespace

import numpy as np
import pytest

from bilevax._frontend.words import counted
from bilevax.cli import page
from bilevax.cli.choices import HIGHEST, LOWEST, Kind
from bilevax.cli.figures import plot_losses, plot_penalties
from bilevax.cli.honest import Honest
from bilevax.cli.penalties import Penalties
from bilevax.cli.report import Study, conclude, tabulate


def make_study(
    start=2.0,
    single=1.0,
    tuned=1.0,
    penalties=(0.1,),
    norms=(1.0, 0.5),
    features=1,
    rows=2,
    scores=None,
    shrink=0.0,
):
    history = SimpleNamespace(stationarity=np.array(norms), value=np.array([single, tuned]))
    state = SimpleNamespace(first_stationarity=norms[0])
    run = SimpleNamespace(history=history, state=state, steps=len(norms))
    losses = SimpleNamespace(mean=np.array([single, tuned]))
    return Study(
        name="data",
        settings={},
        data=SimpleNamespace(names=["x"] * features),
        training_rows=rows,
        folds=2,
        penalties=Penalties(["x"] * len(penalties), np.zeros(features, int)),
        grid=SimpleNamespace(losses=np.array([start]), best=0.02),
        scores=scores,
        shrink=shrink,
        tuned=SimpleNamespace(
            penalties=np.array(penalties), run=run, losses=losses, is_better=tuned < single
        ),
        is_tuned=tuned < single if scores is None else scores.is_better,
        model=SimpleNamespace(kind=Kind.RIDGE),
        seconds={"total": 3.0},
        unit=1.0,
    )


@pytest.mark.parametrize(
    ("tuned", "words"),
    [
        (0.9, "10 % lower than the best single penalty"),
        (1 - 1e-5, "0.001 % lower than the best single penalty"),
        (1 - 1e-15, "the same as the best single penalty"),
        (1.0, "the same as the best single penalty"),
    ],
)
def test_changes_that_are_rounding_are_none(tuned, words):
    last = tabulate(make_study(tuned=tuned)).splitlines()[-1]
    assert last.endswith(f"  {words}")


def test_the_best_single_penalty_may_be_the_strongest():
    assert "  the same as all penalties 100\n" in tabulate(make_study(start=1.0))
    assert "  50 % lower than all penalties 100\n" in tabulate(make_study())


def test_one_and_many():
    assert [counted(1, "row"), counted(0, "row")] == ["1 row", "0 rows"]
    assert tabulate(make_study()).startswith("data: 2 rows, 1 feature, ridge model, 2 folds\n")
    many = tabulate(make_study(penalties=(1.0, 2.0), features=2, rows=1))
    assert many.startswith("data: 1 row, 2 features, ") and "tuned, 2 penalties" in many


@pytest.mark.parametrize(
    ("norms", "words"),
    [
        ((1.0, 0.5), "fell to 0.5 of its first norm in 2 steps, 3.0 s."),
        ((1.0,), "did not fall in 1 step, 3.0 s."),
        ((1.0, 0.9999), "did not fall in 2 steps, 3.0 s."),
    ],
)
def test_how_the_gradient_fell(norms, words):
    assert conclude(make_study(norms=norms)) == f"The projected gradient {words}"


@pytest.mark.parametrize(
    ("penalties", "words"),
    [
        ([LOWEST, HIGHEST, 1.0], "\n2 penalties ended on a bound, 1e-05 or 1000."),
        ([np.exp(np.log(HIGHEST)), 1.0], "\n1 penalty ended on a bound, 1e-05 or 1000."),
        ([1.01 * LOWEST, 0.99 * HIGHEST], ""),
    ],
)
def test_penalties_on_a_bound_are_counted(penalties, words):
    assert conclude(make_study(penalties=penalties)).partition(" s.")[2] == words


def test_a_loss_that_was_minimised_is_said_to_flatter():
    words = "The tuned loss flatters, for it is what was minimised"
    few, many = (conclude(make_study(tuned=0.9, rows=rows)) for rows in (200, 5))
    assert few.endswith(f"\n{words}: judge the model by rows not in the data.")
    assert f"\n{words}, the more so with 1 penalty and 5 rows: judge" in many
    assert "flatters" not in conclude(make_study())


def test_honest_scores_stand_beside_what_was_minimised():
    scores = Honest(np.array([1.0, 0.1]), 1.1, np.array([1.3, 1.2]), np.array([0.1, 0.2]), 1)
    lines = tabulate(make_study(tuned=0.9, scores=scores, shrink=0.1)).splitlines()
    assert [line.split()[-2:] for line in lines[2:]] == [
        ["minimised", "honest"], ["100", "2"], ["1", "1.1"], ["0.9", "1.2"],
    ]  # fmt: skip
    assert lines[2].startswith("squared error ") and "tuned, 1 penalty, shrink 0.1 " in lines[5]


@pytest.mark.parametrize(
    ("tuned", "words"),
    [
        (0.7, "is 30 % lower than that of the best single one, give or take 20 %: the model with "
         "the tuned penalties is written."),
        (0.9, "is 10 % lower than that of the best single one, give or take 20 %: not surely "
         "better, so the model with the best single penalty is written."),
        (1.9, "is 90 % higher than that of the best single one, give or take 20 %: the model with "
         "the best single penalty is written."),
    ],
)  # fmt: skip
def test_which_model_is_written_and_why(tuned, words):
    scores = Honest(np.array([0.0]), 1.0, np.array([tuned]), np.array([0.2]), 0)
    last = conclude(make_study(tuned=0.9, scores=scores)).splitlines()[-1]
    assert last == (
        f"On rows that had no part in the choice, the loss of the tuned penalties {words}"
    )


@pytest.mark.parametrize(
    ("tuned", "spread", "words"),
    [
        (1 - 2.2e-7, 1.5e-4, ("0.000 % lower", "0.015 %")),
        (1.021, 0.0574, ("2.1 % higher", "5.7 %")),
        (1.0, 0.0, ("0.00 % higher", "0.00 %")),
    ],
)
def test_a_change_has_the_digits_of_its_spread(tuned, spread, words):
    scores = Honest(np.array([0.0]), 1.0, np.array([tuned]), np.array([spread]), 0)
    how, give = words
    words = f"is {how} than that of the best single one, give or take {give}"
    assert words in conclude(make_study(scores=scores))


def test_the_axis_of_losses_has_no_offset():
    figure = plot_losses(make_study(single=2973.54, tuned=2973.50))
    figure.canvas.draw()
    axis = figure.axes[0].yaxis
    assert axis.get_offset_text().get_text() == ""
    labels = [float(label.get_text()) for label in axis.get_ticklabels()]
    assert min(labels) > 2973 and len(set(labels)) == len(labels)


def test_penalties_that_are_all_the_best_single_one_can_be_drawn():
    figure = plot_penalties(make_study(penalties=(0.02, 0.02), features=2))
    figure.canvas.draw()
    assert np.diff(figure.axes[0].get_xlim()) > 0


def test_letters_that_no_font_has_are_no_noise(monkeypatch, capsys):
    study = make_study(penalties=(0.1, 0.2), features=2)
    study = study._replace(
        penalties=study.penalties._replace(names=["身長", "体重"]),
        model=SimpleNamespace(
            kind=Kind.RIDGE, coefficients=np.eye(1, 2), features=["身長", "体重"]
        ),
    )
    assert "data:image/png" in page.write_page(study)  # with warnings as errors
    assert capsys.readouterr().err == ""
