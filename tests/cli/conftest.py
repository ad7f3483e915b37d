"""What tests of bad input share."""

import pytest

from bilevax.cli import main


@pytest.fixture
def refuse(tmp_path, capsys):
    """Expect exit code 2, one line that says why, and an output folder that is as it was."""

    def refuse(message, *arguments, command="tune"):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (out / "model.json").write_text("mine")
        extra = ["--out", str(out)] if command == "tune" and "--out" not in arguments else []
        assert main([command, *map(str, arguments), *extra]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"bilevax {command}: ")
        assert printed.err.count("\n") == 1
        assert message in printed.err
        assert [path.name for path in out.iterdir()] == ["model.json"]
        assert (out / "model.json").read_text() == "mine"

    return refuse
