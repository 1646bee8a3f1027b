"""MLflow's own UI on a store, in the foreground until Ctrl-C."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys

from heliostat.errors import ConfigError
from heliostat.redact import redact

log = logging.getLogger(__name__)


def serve(store: str, host: str, port: int) -> None:
    """Runs `mlflow server` on the store; if the store is a server already, says where it is."""
    if store.startswith(("http://", "https://")):
        log.info("MLflow's UI is at %s", redact(store))
        return
    with socket.socket() as probe:
        if probe.connect_ex((host, port)) == 0:
            raise ConfigError(f"--port: {port} on {host} is taken; give another")
    log.info("MLflow's UI: http://%s:%d (starting takes a few seconds; Ctrl-C ends it)", host, port)
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    subprocess.run(command, env={**os.environ, **environment(store)}, check=False)


def environment(store: str) -> dict[str, str]:
    """What tells the server its store: a command line would show a database's password to everybody."""
    return {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
