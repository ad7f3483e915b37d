"""Run the demo: `python -m bilevax.demo`."""

import sys

_EXTRA = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}

try:
    from bilevax.demo.cli import main
except ModuleNotFoundError as error:
    package = _EXTRA.get((error.name or "").partition(".")[0])
    if package is None:
        raise
    sys.exit(f"The demo needs {package}, which is not installed: pip install 'bilevax[demo]'")

if __name__ == "__main__":
    sys.exit(main())
