"""What a run of `bilevax tune` is to do: read and checked, before JAX is imported."""

import argparse
from collections import Counter
from typing import NamedTuple

import numpy as np

from bilevax._frontend.words import DataError, counted, quote, shorten
from bilevax.cli import folds as splits
from bilevax.cli.choices import Kind
from bilevax.cli.data import Data, feature_names, prepare, prepare_validation
from bilevax.cli.files import read_table
from bilevax.cli.penalties import Penalties, read_penalties
from bilevax.cli.rows import Rows, Scaling, as_rows, standardise


class Task(NamedTuple):
    """What is read and checked.

    Attributes:
      kind: of the model.
      data: all rows, those of a validation file last.
      training: how many of them are in DATA.
      scaling: of the rows in DATA.
      rows: standardised.
      plan: which rows train and which are held out.
      penalties: which are tuned.
    """

    kind: Kind
    data: Data
    training: int
    scaling: Scaling
    rows: Rows
    plan: splits.Plan
    penalties: Penalties


def read_task(options: argparse.Namespace) -> Task:
    """Read the files that the options name.

    Raises:
      DataError: if the data or an option cannot be used.
    """
    kind = Kind(options.model)
    # The labels of classes stay texts: as numbers, 1 and 01 would be one.
    texts = () if kind is Kind.RIDGE or options.target is None else (options.target,)
    table = read_table(options.data, texts)
    names = feature_names(table, options.target)
    data = prepare(table, options.target, kind)
    penalties = read_penalties(options.penalty, names, data.names)
    scaling = standardise(data)
    training = len(data.target)
    if options.validation is None:
        labels = None if data.classes is None else data.target
        _check_folds(options, data)
        plan = splits.cross_validation(labels, training, options.cv, options.seed)
    else:
        extra = prepare_validation(read_table(options.validation, texts), options.target, data)
        if len(extra.target) == 1 and options.honest_score:
            raise DataError(
                f"{options.validation} has 1 row, an honest score needs more: add rows, or give "
                "--no-honest-score"
            )
        data = data._replace(
            features=np.concatenate([data.features, extra.features]),
            target=np.concatenate([data.target, extra.target]),
        )
        plan = splits.validation(training, len(data.target), options.seed)
    return Task(kind, data, training, scaling, as_rows(data, scaling, kind), plan, penalties)


def _check_folds(options: argparse.Namespace, data: Data) -> None:
    """Raise where folds would have no rows, or no rows of a class, to train on."""
    count = options.cv
    if len(data.target) < count:
        rows = counted(len(data.target), "row")
        raise DataError(f"{options.data} has {rows}, fewer than the {count} folds of --cv")
    if data.classes is None:
        sizes = {"the data": len(data.target)}
    else:
        labels = Counter(data.target.tolist())
        sizes = {quote(name): labels[i] for i, name in enumerate(data.classes)}
    few = [f"{name} ({size})" for name, size in sizes.items() if size < count]
    if few:
        raise DataError(
            f"{options.data} has classes with fewer rows than the {count} folds of --cv: "
            f"{shorten(few)}"
        )
    # A nested search leaves out a fold, and each of its own folds a part of what is left.
    few = [f"{name} ({size})" for name, size in sizes.items() if size - -(-size // count) < 2]
    if few and options.honest_score:
        raise DataError(
            f"{options.data} has too few rows for an honest score, which leaves out folds of "
            f"folds: {shorten(few)}; raise --cv, or give --no-honest-score"
        )
