"""The command line `bilevax`: tune the penalties of a linear model, and predict with it.

It needs the extra `bilevax[cli]`. The modules, in the order in which to read them:

    choices        what a user can choose
    options        the options and their help
    files          CSV, Parquet and LIBSVM files
    data           checks and classes
    rows           standardised rows
    penalties      which features share a penalty
    folds          which rows train and which are held out
    task           all of this, read and checked before JAX is imported
    model          the losses, and the inner objective with its penalties
    preconditioner what makes fits take few products
    search         the bilevel problem of all folds, and the loss of given penalties
    tuning         a grid over one penalty, then steps on hypergradients
    honest         scores by rows that had no part in the choice of the penalties
    schema         what the entries of model.json must be
    fitted         the fitted model: model.json, and its predictions
    report         report.json and the table on the terminal
    figures        the figures of the report
    page           report.html
    identity       what must be the same when a run goes on
    output         the folder of the results and checkpoints
    tune           the command `bilevax tune`
    predict        the command `bilevax predict`
    app            the command line
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

_EXTRA = {
    "matplotlib": "matplotlib",
    "orbax": "orbax-checkpoint",
    "pandas": "pandas",
    "pyarrow": "pyarrow",
    "tqdm": "tqdm",
}
_missing = [package for module, package in _EXTRA.items() if find_spec(module) is None]

if _missing:

    def main(arguments: Sequence[str] | None = None) -> int:
        """Say what is missing, only when it is run: to import the package is no error."""
        packages = " and ".join(_missing)
        sys.exit(f"bilevax needs {packages}, not installed here: pip install 'bilevax[cli]'")
else:
    from bilevax.cli.app import main as main
