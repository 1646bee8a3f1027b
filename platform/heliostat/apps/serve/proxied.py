"""Closes what Ray Serve's proxy answers by itself, without a key: Ray calls `middlewares` in the proxy's process."""

from __future__ import annotations

import os

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from heliostat.web import deadlines

SETTING = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "heliostat.apps.serve.proxied.middlewares"}
OWN = "/-"  # before the paths of the proxy: /-/routes names the applications, /-/healthz says how the cluster is


def set_ahead() -> None:
    """Sets the environment of a private Ray that this process starts."""
    os.environ.update(SETTING)


def controller() -> dict[str, object]:
    """Returns options of Serve's controller, whose proxy inherits its environment, on a cluster that is there already."""
    return {"runtime_env": {"env_vars": SETTING}} if os.environ.get("RAY_ADDRESS") else {}


def middlewares() -> list[Middleware]:
    """Returns what the proxy puts before its own application, and watches its connections."""
    deadlines.apply()
    return [Middleware(Closed)]


class Closed:
    """Answers that there is nothing at the proxy's own paths."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and (path == OWN or path.startswith(f"{OWN}/")):
            await Response(status_code=404)(scope, receive, send)
        else:
            await self.app(scope, receive, send)
