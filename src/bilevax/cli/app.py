"""The command line."""

import contextlib
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence

from bilevax._frontend.words import DataError
from bilevax.cli.options import make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: of the command line; None for those of the process.

    Returns:
      The exit code.
    """
    options = make_parser().parse_args(arguments)
    try:
        with _terminated_like_interrupted():
            return _run(options)
    except DataError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt as interrupt:
        code, message = 130, "; ".join(["interrupted", *interrupt.args])
    print(f"bilevax {options.command}: {message}", file=sys.stderr)
    return code


def _run(options: Namespace) -> int:
    # Imported only here: pandas, JAX, Matplotlib and Orbax take seconds. Neither --help nor a wrong
    # option should wait for them, nor wrong data for more than pandas; and Ctrl-C meanwhile should
    # be no traceback.
    if options.command == "tune":
        from bilevax.cli.task import read_task

        task = read_task(options)

        from bilevax.cli.tune import tune

        return tune(options, task)
    from bilevax.cli.predict import predict

    return predict(options)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as SIGINT does, where no run is watching for it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
