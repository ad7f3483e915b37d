"""Print the oldest versions that pyproject.toml allows, as constraints of pip."""

import itertools
import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = itertools.chain(*project["optional-dependencies"].values())
requirements = [*project["dependencies"], *extras]
bounds = (re.match(r"([\w-]+)(?:\[.*\])?>=([\w.]+)", requirement) for requirement in requirements)
print(*sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound}), sep="\n")
