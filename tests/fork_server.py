"""A process that imports modules once, and runs functions in forks of it, each as if in a process of its own."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEADLINE_S = 300.0


@dataclass
class Done:
    """Holds how a function ended in its fork, and what it wrote."""

    code: int
    out: str
    err: str


class ForkServer:
    """Starts with the first run, and ends with this process."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self.modules, self.environment = modules, environment
        self._process: subprocess.Popen[str] | None = None

    def run(self, function: str, arguments: Sequence[str], deadline_s: float = DEADLINE_S) -> Done:
        """Calls `module:name` with the list of arguments in a new fork, with this process's environment as it is now."""
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            asked = {"function": function, "arguments": list(arguments), "out": str(out), "err": str(err)}
            process.stdin.write(json.dumps({**asked, "environment": {**os.environ, **self.environment}}) + "\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], deadline_s)[0]:
                process.kill()
                self._process = None
                raise TimeoutError(f"{function}{tuple(arguments)} has not ended in {deadline_s:g} s\n{err.read_text()[-5000:]}")
            return Done(json.loads(process.stdout.readline()), out.read_text(), err.read_text())

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", __name__, *self.modules]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **self.environment}, **pipes)
        assert process.stdin
        atexit.register(process.stdin.close)
        return process


def _forked(asked: dict[str, Any]) -> int:
    for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(asked["environment"])
    module, _, name = asked["function"].partition(":")
    return getattr(importlib.import_module(module), name)(asked["arguments"])


def main() -> int:
    """Serves the requests of standard input until it ends; the exit code of a fork is that of its function."""
    for module in sys.argv[1:]:
        importlib.import_module(module)
    assert threading.active_count() == 1, "a fork would lose the other threads"
    gc.freeze()  # what was imported is not looked through, and copied, in every process
    while line := sys.stdin.readline():
        if not (child := os.fork()):
            return _forked(json.loads(line))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
