"""Help is there for every command, option and argument, and none of it is cut."""

import os
import re
import subprocess
import sys

import heliostat
import pytest
from heliostat.cli import common

from tests.unit.command_line import NAMES, run


@pytest.mark.parametrize("name", NAMES)
def test_every_command_option_and_argument_has_help(name):
    """A sentence for the command, words for each parameter."""
    command = NAMES[name]
    assert command.help and len(command.help.split()) >= 3
    bare = [p.name for p in command.params if not getattr(p, "help", None)]
    assert not bare, f"{name}: no help for {bare}"


@pytest.mark.parametrize("name", NAMES)
def test_no_help_is_cut_at_80_columns(name, monkeypatch, capsys):
    """Every option's whole name and every word of its help is there, in lines of at most 80."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    code, text, _ = run(monkeypatch, capsys, *([] if name == "heliostat" else name.split()), "--help")
    assert code == 0 and "…" not in text and max(map(len, text.splitlines())) <= 80
    words = re.sub(r"[│\s]+", "", text)
    for parameter in NAMES[name].params:
        for option in parameter.opts:
            assert not option.startswith("-") or option in text, option
        assert re.sub(r"\s+", "", parameter.help)[:30] in words or parameter.help.split()[0] in text, parameter.name


def test_commands_are_listed_under_headings_in_the_order_of_their_use():
    command = [sys.executable, "-m", "heliostat", "--help"]  # of its own: commands are in the order of their import
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"}).stdout
    places = [text.index(f"─ {panel} ─") for panel in common.PANELS]
    assert places == sorted(places) and text.index(" check ") < text.index(" train ") < text.index(" chaos ")


def test_the_version_is_printed(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, f"heliostat {heliostat.__version__}\n", "")
