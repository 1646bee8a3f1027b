"""Runs `heliostat train` as a process, and observes it from outside, through its output and its child processes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from heliostat.cluster import processes
from heliostat.config import workspace

log = logging.getLogger(__name__)

STEP = re.compile(r" step (\d+)/\d+  loss ")
WORKER = "ray::TrainWorke"  # the first 15 characters of a worker's process name, because Linux keeps no more
ENDING_S = 30.0  # seconds to read the rest of the output


class ChaosError(Exception):
    """Reports that a fault couldn't be injected, or that the run didn't finish. The fault's row is then invalid."""


class Command:
    """Runs a command while its context lasts: `with Command(arguments, log) as command:`. Leaving the context ends its processes.

    `lines`: the lines that all starts of the command wrote to standard error, each with its wall-clock time.
    """

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.arguments, self.log = arguments, log
        self.lines: list[tuple[float, str]] = []
        self.said = ""  # the last line of standard output: the result
        keep = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        path = os.pathsep.join(filter(None, [str(workspace.root()), keep.get("PYTHONPATH")]))
        self._environment = {**keep, "PYTHONPATH": path, **(environment or {})}

    def __enter__(self) -> Command:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGCONT)
        processes.end_tree(self.process)
        for reader in self._readers:
            reader.join(ENDING_S)

    def start(self) -> None:
        """Starts the command, or starts it again, with the current `arguments`."""
        command = [sys.executable, "-c", "from heliostat.cli.main import main; main()", "train", *self.arguments, "--json"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment, cwd=workspace.root()
        )
        self._readers = [threading.Thread(target=read, args=(self.process,), daemon=True) for read in (self._listen, self._take)]
        for reader in self._readers:
            reader.start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr
        with self.log.open("a") as copy:
            for line in process.stderr:
                self.lines.append((time.time(), line.rstrip("\n")))
                copy.write(line)
                copy.flush()

    def _take(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            self.said = line

    @property
    def step(self) -> int:
        """Returns the highest step in the output so far; 0 if there is none."""
        return max((int(match[1]) for _, line in list(self.lines) if (match := STEP.search(line))), default=0)

    def result(self) -> dict[str, Any]:
        try:
            return json.loads(self.said)
        except ValueError as e:
            raise ChaosError(f"the last line of the run's output isn't a result: {self.said!r}. Read {self.log}") from e

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits until the condition holds. Raises ChaosError if the command ends first, or if the wait takes longer than
        `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise ChaosError(f"the run ended before {what}. Read {self.log}")
            if time.monotonic() > deadline:
                raise ChaosError(f"no {what} within {seconds:.0f} s. Read {self.log}")
            time.sleep(0.02)

    def until_ended(self, seconds: float) -> None:
        """Waits for the end of a command that has lost its cluster. If the command is still running after `seconds` seconds,
        kills the command."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning("killed the command, which was still running %.0f s after it had lost its cluster", seconds)
            processes.end_tree(self.process)

    def heard(self, words: str, since: float) -> float | None:
        """Returns the first time, at or after `since`, at which the words appeared in the output (ignoring case). Returns None if
        the words didn't appear."""
        return next((at for at, line in list(self.lines) if at >= since and words.lower() in line.lower()), None)

    def last_words(self) -> str:
        """Returns the last line on standard error. If the command failed, this line is the error."""
        return next((line for _, line in reversed(self.lines) if line.strip()), "no output")

    def wait(self, seconds: float) -> int:
        """Waits until the command ends, and returns its exit code. Raises ChaosError after `seconds` seconds."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired as e:
            raise ChaosError(f"the run didn't end within {seconds:.0f} s. Read {self.log}") from e
        for reader in self._readers:
            reader.join(ENDING_S)
        return code


def workers(root: int) -> list[psutil.Process]:
    """Finds the training workers among a process's descendants."""
    named = []
    for process in processes.descendants(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(WORKER):
                named.append(process)
    return sorted(named, key=lambda p: p.pid)
