"""Runs MLflow's own UI on a store, behind a key, in the foreground until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

from heliostat.errors import ConfigError, HeliostatError
from heliostat.redact import redact

log = logging.getLogger(__name__)

END_S = 5.0
KEYS, HOST = "HELIOSTAT_UI_KEYS", "HELIOSTAT_UI_HOST"  # of the server's environment: the file of its keys, and its address


def serve(store: str, host: str, port: int, keys: Path, ready: Callable[[str], None]) -> None:
    """Runs `mlflow server` on the store for those who have a key, and calls `ready` with its URL.

    If the store is a server already, logs its address. ConfigError for a taken port.
    """
    if store.startswith(("http://", "https://")):
        log.info("MLflow's UI is at %s", redact(store))
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        if probe.connect_ex((host, port)) == 0:
            raise ConfigError(f"--port: {port} on {host} is taken; give another")
    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    # in a session of its own: Ctrl-C is ours to pass on, or the server would answer it with a traceback
    variables = {**os.environ, **environment(store, host, keys)}
    server = subprocess.Popen(command(host, port), env=variables, start_new_session=True)
    try:
        code = server.wait()
    finally:
        _end_tree(server.pid)
    if code:
        raise HeliostatError(f"`mlflow server` ended with exit code {code}; what it said is above")


def command(host: str, port: int) -> list[str]:
    """Builds the command line of `mlflow server`, whose UI opens as model training (`ui_app`)."""
    server = [sys.executable, "-m", "mlflow", "server", "--app-name", "heliostat", "--workers", "1"]
    return [*server, "--host", host, "--port", str(port)]


def environment(store: str, host: str, keys: Path) -> dict[str, str]:
    """Returns the environment variables that give the server its store, its address and the file of its keys.

    On a command line a database's password would be visible to everybody.
    """
    variables = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return {**variables, KEYS: str(keys.absolute()), HOST: host}


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end_tree(root: int) -> None:
    """Ends the server and its workers: SIGTERM first, and SIGKILL for those that are left after END_S."""
    try:
        all_of_it = [*psutil.Process(root).children(recursive=True), psutil.Process(root)]
    except psutil.NoSuchProcess:
        return
    for process in all_of_it:
        _signal(process, signal.SIGTERM)
    for process in psutil.wait_procs(all_of_it, timeout=END_S)[1]:
        _signal(process, signal.SIGKILL)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
