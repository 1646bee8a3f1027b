"""Runs commands of heliostat as processes, each forked from one with a driver's modules imported, which saves seconds per test.

    driver = commands.start("train", "job.yaml", log=folder / "log")  # then like subprocess.Popen
    driver = commands.call("module:function", "argument", log=...)    # the function gets the arguments, and returns the exit code

A process leads its own session, and has this process's current environment. It starts its own Ray as usual, whose fork server is
a fork, too, made before the command does anything.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.fork_server import Process
from tests.integration import forked_server
from tests.integration.forks import SERVER

call = SERVER.call


def start(*arguments: str, log: Path, **options: Any) -> Process:
    """Starts a command of heliostat in the repository's root, unless another folder is given."""
    return call(f"{__name__}:command", *arguments, log=log, **options)


def run(*arguments: str, log: Path, timeout: float = 300, **options: Any) -> Process:
    """Starts a command, and waits until it has ended."""
    process = start(*arguments, log=log, **options)
    process.wait(timeout)
    return process


def command(arguments: list[str]) -> int:
    """Runs the command line in the forked process."""
    forked_server.wait()
    sys.argv = ["heliostat", *arguments]
    from heliostat.cli.main import main

    main()
    return 0
