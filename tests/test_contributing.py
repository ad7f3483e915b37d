"""Whoever follows CONTRIBUTING.md to the letter gets a green run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = re.compile(r"`(?P<path>src/\S+\.py)`:\n\n```python\n(?P<code>.*?)```", re.DOTALL)
LINES = re.compile(r"^(?P<path>\S+\.py)(?: (?P<rows>[A-Z]+))? {2,}(?P<line>\S.*)$", re.MULTILINE)


def follow(text, folder):
    """Write the files and add the lines that the document names, in a copy of the project."""
    files = list(PYTHON.finditer(text))
    for match in files:
        (folder / match["path"]).write_text(match["code"])
    lines = list(LINES.finditer(text))
    for match in lines:
        path = folder / match["path"]
        content = path.read_text()
        if match["rows"]:
            head, rows = content.split(f"\n{match['rows']} = [", maxsplit=1)
            content = f"{head}\n{match['rows']} = [\n    {match['line']}{rows}"
        else:
            content += match["line"] + "\n"
        path.write_text(content)
    return len(files), len(lines)


@pytest.mark.slow
def test_the_additions_pass_the_tests(tmp_path):
    for name in ("src", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    assert follow((ROOT / "CONTRIBUTING.md").read_text(), tmp_path) == (2, 6)
    # Examples in the new files, what the rows buy, and the laws that new names must keep.
    chosen = ["tests/test_table.py", "tests/test_public_api.py", "src/bilevax/solvers/_signed.py"]
    words = "signed or scaled or Signed or Scaled or design or cycle or homes or exports"
    options = ["-n", "0", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", words]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *chosen, "src/bilevax/rules/_scaled.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},  # in place of the installed one
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 20, result.stdout
