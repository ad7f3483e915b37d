"""The Python code of the documents runs as it stands, from top to bottom, without a warning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>.*)$")


def python_lines(text):
    """Return a document with everything but the code in its ```python fences blanked out.

    The code keeps its line numbers, so that a traceback points into the document.
    """
    lines, language, indent = [], None, ""
    for line in text.splitlines():
        fence = FENCE.match(line)
        if fence and language is None:
            language, indent = fence["language"].strip(), fence["indent"]
            lines.append("")
        elif fence and not fence["language"].strip():
            language = None
            lines.append("")
        else:
            lines.append(line.removeprefix(indent) if language == "python" else "")
    assert language is None, "a fence is left open"
    return lines


@pytest.mark.parametrize(
    "name", [pytest.param("README.md", marks=pytest.mark.slow), "CONTRIBUTING.md"]
)
def test_code_of_a_document(name, tmp_path):
    lines = python_lines((ROOT / name).read_text())
    assert any(lines), "no ```python fence was found"
    # An interpreter of its own, with the defaults of JAX and of a user.
    program = (
        "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'), {'__name__': 'doc'})"
    )
    environment = {key: value for key, value in os.environ.items() if key != "JAX_ENABLE_X64"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, name],
        input="\n".join(lines),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def test_the_code_is_taken_from_python_fences_only():
    text = "a\n```python\nx = 1\n```\nb\n```bash\nrm\n```\n- c\n  ```python\n  y = 2\n  ```\n"
    assert python_lines(text) == ["", "", "x = 1", "", "", "", "", "", "", "", "y = 2", ""]
