"""Running the `nrc` command in tests, in the folder of the moment."""

from __future__ import annotations

import json
from pathlib import Path

from nrc import cli


def run(capsys, *arguments: object, code: int = 0) -> dict:
    """Run the command with --json; the last line of standard output."""
    capsys.readouterr()
    assert cli.main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *arguments: object) -> str:
    """Run a command that must end with exit code 2, one line of explanation and nothing written."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith(("compil", "nrc: warning"))]
    assert printed.out == "" and len(lines) == 1 and lines[0].startswith("nrc: ")
    assert sorted(Path().rglob("*")) == before
    return lines[0]
