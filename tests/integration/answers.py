"""Returns the JSON that commands print with --json, called in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from heliostat.cli.main import app


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Calls a command; returns its last line."""
    capsys.readouterr()
    app([*arguments, "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out.splitlines()[-1])
