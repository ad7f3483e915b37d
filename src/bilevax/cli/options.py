"""The options and their help."""

import argparse
import textwrap
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from bilevax._frontend.options import at_least, folder
from bilevax._frontend.words import clip, one_line
from bilevax.cli.choices import HIGHEST, LOWEST, MISSING, RULES, SHRINKS, Kind

_CSV = textwrap.fill(
    "a first line with the names of the columns, commas between the columns, numbers in every "
    "column but the target; no missing values, which are empty cells and, in the target too, the "
    f"texts {', '.join(MISSING)}",
    width=98,
    initial_indent="  .csv".ljust(30),
    subsequent_indent=30 * " ",
)
_SHRINKS = ", ".join(f"{part:g}" for part in SHRINKS)
_FILES = f"""\
data files, told apart by their extension:
{_CSV}
  .parquet, .pq               columns of numbers, and the target
  .svm, .svmlight, .libsvm    'target index:value ...' on each line, indices from 1; the features
                              are named 'feature 1', 'feature 2', ..."""

_TOP = f"""\
Tune the L2 penalties of a linear model, one of them or one per feature, by minimising its
cross-validated loss with hypergradients; predict with the model.

  bilevax tune DATA --target COLUMN --model MODEL    find the penalties, fit, write a report
  bilevax predict MODEL DATA                         predict with the model.json of a tune

'bilevax tune --help' and 'bilevax predict --help' say everything about each.

{_FILES}"""

_TUNE = f"""\
Find the penalties with the lowest cross-validated loss, and fit a model with them.

A model is linear in the features, which are standardised: mean zero and deviation one in its
training rows. Its weights w minimise

  mean over rows of loss + 1/2 sum over features j of penalty_j * w_j^2

  --model ridge        the target is a number     loss = (prediction - target)^2 / 2, where the
                                                  target is standardised too
  --model logistic     two classes                loss = cross entropy
  --model multinomial  two classes or more        loss = cross entropy; w_j^2 is a sum over
                                                  classes, which share the penalty of a feature

The intercept has no penalty. scikit-learn's Ridge(alpha) has alpha = rows * penalty, and its
LogisticRegression(C) has C = 1 / (rows * penalty).

  --penalty single       one penalty for all features
  --penalty per-feature  one for each feature
  --penalty FILE.csv     one for each group: a file with the columns 'feature' and 'group' that
                         names every feature once

What is minimised is the mean over folds of the mean loss of the rows that a fold holds out:
squared error for ridge, in the unit of the target squared, and cross entropy in nats for
classes. Folds are drawn with --seed, with each class in equal shares; each one standardises by its
own training rows. Best single penalty first, by a grid; from there on all penalties, between
{LOWEST:g} and {HIGHEST:g}, by steps on hypergradients. Last, a fit to all rows of DATA.

That loss flatters, for it is what was minimised. The honest score does not: the whole search is
made again without the rows of each fold (with --validation, of each fifth of its rows), which then
judge what it has found. The honest loss of the tuned penalties is higher or lower than that of the
best single one, with a spread: two standard errors of the mean difference over rows. The tuned
penalties are written only if they are better by more than the spread, else the best single one.

Many penalties on few rows run away. --shrink PART adds to what is minimised

  PART * (loss of the best single penalty) * 1/2 mean over penalties of (log ratio to it)^2

and where it is not given, {_SHRINKS} are tried in the nested searches, and the strongest is
taken that is not worse than the best of them by more than the spread.

{_FILES}

A column that is constant is left out, with a note."""

_TUNE_END = """\
in the folder OUT:
  model.json    coefficients and intercepts, of standardised features and in the units of the
                data; penalties, means, scales, names of features and classes: those of the tuned
                penalties, or of the best single one
  report.json   everything: settings; losses in each fold; honest scores; history of the steps,
                whose losses are those of fits that end early, with the pull of --shrink;
                seconds of this command, whose parts sum up to the total
  report.html   the same to look at, in one file
  checkpoints/  states of a run that is not finished, saved each minute

A new run replaces the results of an earlier one in OUT. While OUT/checkpoints has a run that is
not finished, a new one is refused: go on with --resume, or remove OUT/checkpoints. With --resume
only --steps and --accuracy may change; other options and other data are refused. Honest scores are
not made again.

exit codes:
  0    done
  2    a wrong option, or data that cannot be used; nothing was written
  3    done, but --steps ended before the --accuracy was reached; everything is written
  130  interrupted (Ctrl-C or SIGTERM); --resume goes on, if a step had been taken

examples:
  bilevax tune cancer.csv --target diagnosis --model logistic --penalty per-feature
  bilevax tune prices.parquet --target price --model ridge --penalty groups.csv --cv 10
  bilevax tune digits.svm --model multinomial --penalty single --out digits
  bilevax tune train.csv --target y --model ridge --penalty per-feature --validation valid.csv"""

_PREDICT = f"""\
Predict with a model.json that 'bilevax tune' wrote. DATA needs the features of the model by
their names, in any order; other columns are ignored.

{_FILES}"""

_PREDICT_END = """\
The result is CSV, one line per row of DATA, with the column 'prediction' and, for classes, a
column 'probability CLASS' for each.

exit codes: 0 done; 2 a wrong option, or data that does not fit the model

examples:
  bilevax predict bilevax-output/model.json new.csv
  bilevax predict bilevax-output/model.json new.csv --out predictions.csv"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _make(argparse.ArgumentParser, prog="bilevax", description=_TOP)
    version = f"bilevax {metadata.version('bilevax')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="tune | predict")
    _add_tune(_make(commands.add_parser, "tune", description=_TUNE, epilog=_TUNE_END))
    _add_predict(_make(commands.add_parser, "predict", description=_PREDICT, epilog=_PREDICT_END))
    return parser


def _make(make: Callable[..., argparse.ArgumentParser], *name: str, **texts: str) -> Any:
    return make(
        *name,
        **texts,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_tune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="the rows to train on")
    add(
        "--target",
        type=one_line,
        metavar="COLUMN",
        help="what to predict; a LIBSVM file has its own",
    )
    add("--model", required=True, choices=[kind.value for kind in Kind], help="see above")
    add(
        "--penalty",
        default="per-feature",
        metavar="{single,per-feature,FILE.csv}",
        help="see above (default: %(default)s)",
    )
    validation = parser.add_mutually_exclusive_group()
    validation.add_argument(
        "--cv",
        type=at_least(2),
        default=5,
        metavar="K",
        help="number of folds (default: %(default)s)",
    )
    validation.add_argument(
        "--validation",
        type=Path,
        metavar="FILE",
        help="a file with the same columns: choose the penalties by the loss of its rows instead; "
        "they are never trained on",
    )
    add(
        "--shrink",
        type=_strength,
        metavar="PART",
        help="how strongly log penalties are pulled towards the best single one, see above "
        "(default: of some, what the honest score finds surely best; with --no-honest-score, 0)",
    )
    add(
        "--no-honest-score",
        dest="honest_score",
        action="store_false",
        help="skip the honest score, which takes most of the time; what is tuned is written then",
    )
    add(
        "--rule",
        choices=RULES,
        default=RULES[0],
        help="how hypergradients are formed at an inexact solution: by the implicit function "
        "theorem there, or after a step of Newton's or Jacobi's method (default: %(default)s)",
    )
    add(
        "--accuracy",
        type=_part,
        default=5e-2,
        metavar="PART",
        help="stop when the norm of the projected gradient has fallen to this part of its first "
        "value (default: %(default)s)",
    )
    add(
        "--steps",
        type=at_least(1),
        default=500,
        metavar="N",
        help="steps at most, with those before a --resume (default: %(default)s)",
    )
    add(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of the folds (default: %(default)s)",
    )
    add(
        "--out",
        type=folder,
        default=Path("bilevax-output"),
        metavar="OUT",
        help="the folder for the results (default: %(default)s)",
    )
    add("--resume", action="store_true", help="go on with the interrupted run in OUT")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a model.json")
    add("data", type=Path, metavar="DATA", help="the rows to predict")
    add("--out", type=Path, metavar="FILE", help="a CSV file (default: standard output)")


def _part(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {clip(text)!r}") from None
    if not 0 < number < 1:  # NaN too
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {clip(text)}")
    return number


def _strength(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {clip(text)!r}") from None
    if not 0 <= number < float("inf"):  # NaN too
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {clip(text)}")
    return number
