"""The command `bilevax predict`."""

import argparse
import os
import sys

from bilevax._frontend.words import DataError
from bilevax.cli.data import select
from bilevax.cli.files import read_table
from bilevax.cli.fitted import read_model


def predict(options: argparse.Namespace) -> int:
    """Write predictions; return the exit code.

    Raises:
      DataError: if the model or the data cannot be used, or the file cannot be written.
    """
    for name in ("model", "data"):
        if options.out is not None and options.out.resolve() == getattr(options, name).resolve():
            raise DataError(f"--out {options.out} is the {name}; choose another file")
    model = read_model(options.model)
    features = select(read_table(options.data), model.features, model.dropped)
    predictions = model.predict(features)
    try:
        predictions.to_csv(sys.stdout if options.out is None else options.out, index=False)
    except BrokenPipeError:  # whoever read the output has seen enough
        # Python flushes what is left at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise DataError(f"cannot write {options.out}: {error.strerror or error}") from None
    return 0
