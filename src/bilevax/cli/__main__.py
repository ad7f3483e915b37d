"""Run the command line: `python -m bilevax.cli`."""

import sys

from bilevax.cli import main

if __name__ == "__main__":
    sys.exit(main())
