"""The command line."""

import sys
from collections.abc import Sequence

from bilevax._frontend.words import DataError
from bilevax.cli.options import make_parser
from bilevax.cli.predict import predict
from bilevax.cli.tune import tune


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: of the command line; None for those of the process.

    Returns:
      The exit code.
    """
    options = make_parser().parse_args(arguments)
    try:
        return tune(options) if options.command == "tune" else predict(options)
    except DataError as error:
        print(f"bilevax {options.command}: {error}", file=sys.stderr)
        return 2
