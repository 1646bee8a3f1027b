"""Tests that every command, option, and argument has help, and that none of it is truncated."""

import os
import re
import shlex
import subprocess
import sys

import heliostat
import pytest
from heliostat.cli import groups

from tests.unit.command_line import NAMES, run


@pytest.mark.parametrize("name", NAMES)
def test_every_command_option_and_argument_has_help(name):
    """A command has a sentence, and each parameter has words, without brackets, which help pages drop as markup."""
    command = NAMES[name]
    assert command.help and len(command.help.split()) >= 3
    bare = [p.name for p in command.params if not getattr(p, "help", None)]
    assert not bare, f"{name}: no help for {bare}"
    assert not [p.name for p in command.params if "[" in p.help]


@pytest.mark.parametrize("name", NAMES)
def test_no_help_is_cut_at_80_columns(name, monkeypatch, capsys):
    """Every option's whole name and every word of its help is shown, in lines of at most 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    code, text, _ = run(monkeypatch, capsys, *([] if name == "heliostat" else name.split()), "--help")
    assert code == 0 and "…" not in text and max(map(len, text.splitlines())) <= 80
    words = re.sub(r"[│\s]+", "", text)
    for parameter in (p for p in NAMES[name].params if not getattr(p, "hidden", False)):
        for option in parameter.opts:
            assert not option.startswith("-") or option in text, option
        assert re.sub(r"\s+", "", parameter.help)[:30] in words or parameter.help.split()[0] in text, parameter.name


def test_the_first_page_lists_commands_and_groups_in_the_order_of_their_use_on_one_screen():
    command = [sys.executable, "-m", "heliostat", "--help"]  # in a new process: groups list commands in the order of their import
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"}).stdout
    places = [text.index(f"│ {name} ") for name in (*groups.FIRST, *groups.GROUPS)]
    assert places == sorted(places) and 24 <= len(text.splitlines()) <= 30
    assert not re.search(r"│ (prepare|runs|tune|curate) ", text)


@pytest.mark.parametrize("name", [name for name, command in NAMES.items() if not hasattr(command, "commands")])
def test_every_command_has_an_example_that_it_takes(name):
    """The example is parsed as typed: every option exists, and every value has its type."""
    example = shlex.split(NAMES[name].epilog.removeprefix("Example: "))
    words = name.split()
    assert example[: len(words) + 1] == ["heliostat", *words]
    with NAMES[name].make_context(name, example[len(words) + 1 :], resilient_parsing=False):
        pass


def test_the_version_is_printed(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, f"heliostat {heliostat.__version__}\n", "")
