"""Runs a submitted job's supervisor around replacements for `heliostat train`, in forks of a process that has imported it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heliostat.submit import entrypoint

from tests.fork_server import Done, ForkServer, Process

MODULE = "tests.unit.supervisor"
SERVER = ForkServer((MODULE,), {})


def start(
    folder: Path, program: str, *arguments: str, flags: Sequence[str] = (), out: str = "", jobs_url: str = "", **job: Any
) -> Process:
    """Starts the driver of a job whose command is a Python program with arguments. `out`: another file for its output."""
    (folder / "job.json").write_text(json.dumps({"name": "r", "storage": str(folder / "runs")} | job))
    asked = {"program": program, "arguments": arguments, "flags": flags, "out": out, "jobs_url": jobs_url}
    return SERVER.call(f"{MODULE}:supervisor", json.dumps(asked), log=folder / "err.log", cwd=folder)


def supervisor(arguments: list[str]) -> int:
    """Does the work of `start` in this process."""
    asked = json.loads(arguments[0])
    if asked["out"]:
        os.dup2(os.open(asked["out"], os.O_WRONLY), 1)
    entrypoint.POLL_S = 0.1
    driver = entrypoint.Driver(Path("job.json"), None, "attempt-1", asked["flags"])
    driver.command = [sys.executable, "-c", asked["program"], *asked["arguments"]]
    driver.jobs_url = lambda: asked["jobs_url"]
    return driver.run(None)


def command(*arguments: str) -> Done:
    """Runs the supervisor's command line, and waits until it ends."""
    return SERVER.run(f"{MODULE}:forked", arguments)


def forked(arguments: list[str]) -> int:
    """Does the work of `command` in this process."""
    sys.argv = ["entrypoint", *arguments]
    return entrypoint.main()
