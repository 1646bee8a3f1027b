"""Calls commands in the tests' own process, and lists all commands."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from heliostat.cli import common, main

BUILT = functools.cache(typer.main.get_command)
ROOT = Path(__file__).parents[2]
FILES = {"job": "jobs/quickstart.yaml", "pipeline": "pipelines/quickstart.yaml", "sweep": "jobs/sweeps/quickstart.yaml",
         "cluster": "clusters/local.yaml"}  # fmt: skip


def commands(command: Any = None, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Maps every command and group to the words that call it."""
    command = command or BUILT(common.app)
    below = getattr(command, "commands", {})
    return [(path, command), *(found for name, one in below.items() for found in commands(one, (*path, name)))]


NAMES = {" ".join(path) or "heliostat": command for path, command in commands()}


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Runs a command in this process; returns (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["heliostat", *arguments])
    monkeypatch.setattr(typer.main, "get_command", BUILT)  # which builds all commands, at each call
    with pytest.raises(SystemExit) as end:
        main.main()
    return end.value.code or 0, *capsys.readouterr()
