"""Runs a process that imports modules once, and functions in forks of it, each as in a separate process.

    SERVER = ForkServer(("torch", ...), {"OMP_NUM_THREADS": "1"})
    process = SERVER.call("module:function", "argument", log=folder / "log")   # then like subprocess.Popen
    done = SERVER.run("module:function", ["argument"])                         # waits, and reads the output

The function gets the list of arguments, and returns the exit code. Its process leads its own session.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.cluster.fork_server import server as worker_forks

from tests.waiting import until

ROOT = Path(__file__).parents[1]
DEADLINE_S = 300.0


@dataclass
class Done:
    """Holds how a function ended in its fork, and its output."""

    code: int
    out: str
    err: str


class Process:
    """Represents a process that a server has forked, with the used part of subprocess.Popen's interface."""

    def __init__(self, server: ForkServer, pid: int, log: Path) -> None:
        self.pid, self.log, self._server = pid, log, server
        self.returncode: int | None = None
        self._ended = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.log), timeout or 0.0)
            self.returncode = self._server.ask({"reap": self.pid})
            os.close(self._ended)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Waits until the condition holds; fails if the process ends first, or after the timeout."""
        until(condition, what, seconds, lambda: self.poll() is None, lambda: self.err)

    @property
    def out(self) -> str:
        """Returns the standard output so far."""
        return self.log.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self.log.read_text()


class ForkServer:
    """Starts with the first call, in an environment with these additional variables, and ends with this process.

    With RAY_JOB_ID among them, its forks may be drivers and fork servers, because Ray's random numbers are unused.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self.modules, self.environment = modules, environment
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # tests strike from threads

    def call(self, function: str, *arguments: str, log: Path, cwd: Path = ROOT, **environment: str) -> Process:
        """Calls `module:name` in this process's current environment. Standard error goes to the log, and standard output to a
        file next to it."""
        asked = {"function": function, "arguments": arguments, "log": str(log), "cwd": str(cwd)}
        return Process(self, self.ask({**asked, "environment": {**os.environ, **environment}}), log)

    def run(self, function: str, arguments: Sequence[str], deadline_s: float = DEADLINE_S) -> Done:
        """Calls the function with the server's own variables, too, and waits for its end; at the deadline, kills it with all its
        child processes."""
        with tempfile.TemporaryDirectory() as folder:
            process = self.call(function, *arguments, log=Path(folder, "err.log"), **self.environment)
            try:
                return Done(process.wait(deadline_s), process.out, process.err)
            except subprocess.TimeoutExpired:
                said = process.err[-5000:]
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(DEADLINE_S)
                raise TimeoutError(f"{function}{tuple(arguments)} has not ended in {deadline_s:g} s\n{said}") from None

    def ask(self, what: dict[str, Any]) -> int:
        with self._lock:
            process = self._process = self._process or self._start()
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], DEADLINE_S)[0]:
                process.kill()
                raise TimeoutError(f"no answer to {what} in {DEADLINE_S:g} s")
            return int(process.stdout.readline())

    def at_start(self) -> dict[str, str]:
        """Returns the server's own environment."""
        return {**os.environ, **self.environment}

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", __name__, *self.modules]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=self.at_start(), **pipes)
        assert process.stdin
        atexit.register(process.stdin.close)
        return process


def _forked(asked: dict[str, Any]) -> int:
    os.setsid()
    log = Path(asked["log"])
    for number, path in enumerate((Path(os.devnull), log.with_suffix(".out"), log)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    module, _, name = asked["function"].partition(":")
    return getattr(importlib.import_module(module), name)(asked["arguments"])


def main() -> int:
    """Serves the requests on standard input until it ends: forks, or reaps its forks."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    os.environ[worker_forks.RAYLET] = str(os.getpid())  # whose end Ray's workers look for, beside that of their connection
    with worker_forks.own_ids() if worker_forks.JOB in os.environ else contextlib.nullcontext():
        for module in sys.argv[1:]:
            importlib.import_module(module)
    assert threading.active_count() == 1, "a fork would lose the other threads"
    gc.freeze()  # what was imported is not looked through, and copied, in every process
    while line := sys.stdin.readline():
        asked = json.loads(line)
        if "reap" in asked:
            told = os.waitstatus_to_exitcode(os.waitpid(asked["reap"], 0)[1])
        elif not (told := os.fork()):
            os.close(answers)
            return _forked(asked)
        os.write(answers, f"{told}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
