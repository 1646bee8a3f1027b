"""Commands of heliostat as processes, each forked from one that has imported what drivers need: seconds that no test is about.

    driver = commands.start("train", "job.yaml", log=folder / "log")  # then as subprocess.Popen
    driver = commands.call("module:function", "argument", log=...)    # which gets the list of arguments, and returns the code

A process leads a session of its own, and has this process's environment as it is then. It starts a Ray of its own as any does.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTED = (
    "heliostat.cli.main", "heliostat.train.run", "heliostat.train.driver.attempt", "heliostat.train.driver.memory",
    "heliostat.train.driver.progress", "heliostat.train.driver.pool", "heliostat.cluster.connect", "heliostat.cluster.nodes",
    "heliostat.cpu_kernels", "heliostat.recipes.text.causal_lm", "heliostat.inference.export", "heliostat.inference.batch.run",
    "heliostat.track.logger", "heliostat.track.models", "heliostat.track.report.page", "heliostat.track.report.curation",
    "heliostat.tune.driver", "heliostat.tune.trial", "heliostat.curation.flow", "heliostat.pipelines.text", "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "ray.data", "transformers.models.llama.modeling_llama", "transformers.generation",
    "transformers.models.auto.modeling_auto",
)  # fmt: skip


class Process:
    """A process that the server has forked, with what tests use of subprocess.Popen."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self.returncode: int | None = None
        self._ended = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.log), timeout or 0.0)
            self.returncode = SERVER.ask({"reap": self.pid})
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
        """Waits until the condition holds; fails if the process ends first, or it takes longer."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.poll() is None and time.monotonic() < deadline, f"no {what}: {self.err[-3000:]}"
            time.sleep(0.02)

    @property
    def out(self) -> str:
        """Standard output so far."""
        return self.log.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self.log.read_text()


class Server:
    """Starts with the first command, and ends with this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # tests strike from threads

    def ask(self, what: dict[str, Any]) -> int:
        with self._lock:
            process = self._process = self._process or self._start()
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

    def _start(self) -> subprocess.Popen[str]:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-m", __name__], cwd=ROOT, env=env, **pipes)
        assert process.stdin
        atexit.register(process.stdin.close)
        return process


SERVER = Server()


def call(function: str, *arguments: str, log: Path, cwd: Path = ROOT, **environment: str) -> Process:
    """Calls `module:name` with the list of arguments; standard error goes to the log, standard output to a file beside it."""
    asked = {"function": function, "arguments": arguments, "log": str(log), "cwd": str(cwd)}
    return Process(SERVER.ask({**asked, "environment": {**os.environ, **environment}}), log)


def start(*arguments: str, log: Path, **options: Any) -> Process:
    """Starts a command of heliostat, in the repository's root unless another folder is given."""
    return call(f"{__name__}:command", *arguments, log=log, **options)


def run(*arguments: str, log: Path, timeout: float = 300, **options: Any) -> Process:
    """Starts a command, and waits until it has ended."""
    process = start(*arguments, log=log, **options)
    process.wait(timeout)
    return process


def command(arguments: list[str]) -> int:
    """Runs the command line, in its process."""
    sys.argv = ["heliostat", *arguments]
    from heliostat.cli.main import main

    main()
    return 0


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
    """Serves the requests of standard input until it ends: forks, or reaps what it has forked."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for module in IMPORTED:
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
