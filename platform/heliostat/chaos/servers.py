"""Runs an MLflow server and an S3 store as processes on this machine, so that a fault can stop them during a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from heliostat.chaos.process import ChaosError
from heliostat.cluster import processes

START_S = 180.0  # maximum seconds for a server to start: MLflow creates its tables first


class ServerProcess:
    """Runs a server process. An instance is also a context manager. `stop` kills the process, as a crash would do. A later
    `start` uses the same port."""

    def __init__(self, command: list[str], health: str, log: Path, environment: dict[str, str] | None = None) -> None:
        self.port = processes.free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        self._command = [word.replace("PORT", str(self.port)) for word in command]
        self._health, self._log, self._environment = health, log, {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server, and waits until it answers. Raises ChaosError if the server ends, or doesn't answer within START_S
        seconds."""
        self._process = self._launch()
        deadline = time.monotonic() + START_S
        while not self._well():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ChaosError(f"{self._command[2]} didn't start. Read {self._log}")
            time.sleep(0.1)

    def _launch(self) -> subprocess.Popen[bytes]:
        with self._log.open("a") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)

    def _well(self) -> bool:
        try:
            urllib.request.urlopen(f"http://{self.endpoint}{self._health}", timeout=5).close()
        except (urllib.error.URLError, OSError):
            return False
        return True

    def stop(self) -> None:
        if self._process:
            processes.end_tree(self._process)
            self._process.wait()
            self._process = None


def mlflow_server(store: str, folder: Path) -> ServerProcess:
    """Creates an MLflow server on a store such as sqlite:///FILE."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", "PORT",
               "--workers", "1", "--artifacts-destination", str(folder / "artifacts")]  # fmt: skip
    return ServerProcess(command, "/health", folder / "mlflow-server.log", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})


def s3_server(folder: Path) -> ServerProcess:
    """Creates an S3 server that keeps everything in memory and accepts any key."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "PORT"]
    return ServerProcess(command, "/moto-api/", folder / "s3-server.log")
