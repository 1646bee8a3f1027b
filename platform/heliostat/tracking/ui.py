"""Runs MLflow's own UI on a store, protected by a key, in the foreground until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

from heliostat.cluster import processes
from heliostat.errors import ConfigError, HeliostatError
from heliostat.redact import redact

log = logging.getLogger(__name__)

END_S = 5.0
START_S = 120.0  # maximum time until the server answers
ANSWER_S = 5.0  # maximum time for one answer
POLL_S = 0.1
# metrics in the table of runs, with their widths in pixels; together with the runs' names they fit in 1280 pixels
COLUMNS = {"train/loss": 90, "eval/bits_per_byte": 140, "train/tokens_per_second": 175, "train/time/goodput": 140}
KEYS, HOST = "HELIOSTAT_UI_KEYS", "HELIOSTAT_UI_HOST"  # the server's environment variables: file of keys, address


def serve(
    store: str,
    host: str,
    port: int,
    keys: Path,
    ready: Callable[[str], None],
    before: Callable[[], object] = lambda: None,
    verbose: bool = False,
) -> None:
    """Runs `mlflow server` on the store for clients that have a key. Calls `ready` with the server's URL once the server answers.

    If the store is itself a server, only logs its address. `before` is called before the server starts. The server's output
    goes to `server.log` in the folder of the keys. With `verbose`, the output goes to this process's output. Raises ConfigError
    if the port is in use, HeliostatError if the server doesn't answer or fails.
    """
    if store.startswith(("http://", "https://")):
        log.info("MLflow's UI is at %s", redact(store))
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        if probe.connect_ex((host, port)) == 0:
            raise ConfigError(f"--port: {port} on {host} is in use. Pass another port")
    before()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    # in its own session: if Ctrl-C reached the server, the server would print a traceback
    variables = {**os.environ, **environment(store, host, keys)}
    place = None if verbose else _log(keys.with_name("server.log"))
    with place.open("wb") if place else contextlib.nullcontext() as output:
        server = subprocess.Popen(
            command(host, port), env=variables, stdout=output, stderr=output and subprocess.STDOUT, start_new_session=True
        )
    try:
        bound = _answering(server, host, port, place)
        ready(f"http://{f'[{host}]' if ':' in host else host}:{bound}/")
        code = server.wait()
    finally:
        processes.end_tree(server, END_S)
    if code:
        raise HeliostatError(f"`mlflow server` ended with exit code {code}. {_read(place)}")


def _log(place: Path) -> Path | None:
    """Creates the file for the server's output. Only its owner can read the file. If the file can't be created, logs a warning
    and returns None."""
    try:
        place.touch(mode=0o600)
    except OSError as e:
        log.warning("can't write %s (%s), so MLflow's output appears in this terminal", place, e.strerror)
        return None
    return place


def _read(place: Path | None) -> str:
    """Returns a sentence that says where the server's output is."""
    return f"Read its output in {place}" if place else "Its output is above"


def _answering(server: subprocess.Popen[bytes], host: str, port: int, place: Path | None) -> int:
    """Waits until the server answers, and returns its port. Raises HeliostatError if the server ends, or doesn't answer within
    120 s.

    Checks that the port belongs to the server's process, because another program may have taken the port and answer there.
    """
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if (code := server.poll()) is not None:
            other = "another number" if not port else f"{port + 1}" if port < 65535 else "5000"
            raise HeliostatError(
                f"--port: `mlflow server` ended before it answered on {host}:{port} (exit code {code}). {_read(place)}. If "
                f"another program has taken the port, pass --port {other}"
            )
        if (listening := _listening(server.pid)) and _answers(host, listening):
            return listening
        time.sleep(POLL_S)
    raise HeliostatError(f"--port: `mlflow server` didn't answer on {host}:{port} within {START_S:.0f} s. {_read(place)}")


def _listening(root: int) -> int | None:
    """Returns the port on which a process or one of its descendants listens; None if none of these processes listens."""
    for process in processes.family(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN:
                    return one.laddr.port
    return None


def _answers(host: str, port: int) -> bool:
    """Checks whether an HTTP server answers, with any status."""
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/health")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def command(host: str, port: int | str) -> list[str]:
    """Builds the command line of `mlflow server`, whose UI opens in model-training mode (`ui_app`)."""
    server = [sys.executable, "-m", "mlflow", "server", "--app-name", "heliostat", "--workers", "1"]
    return [*server, "--host", host, "--port", str(port)]


def environment(store: str, host: str, keys: Path) -> dict[str, str]:
    """Returns the environment variables that give the server its store, its address, and the file of its keys.

    These values aren't on the command line, because all users of the machine could read a database's password there.
    """
    variables = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return {**variables, KEYS: str(keys.absolute()), HOST: host}


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
