"""Disables the paths that Ray Serve's proxy answers by itself, without a key. Ray calls `middlewares` in the proxy's process."""

from __future__ import annotations

import os

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from heliostat.web import deadlines

SETTING = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "heliostat.apps.serve.proxied.middlewares"}
OWN = "/-"  # prefix of the proxy's own paths: /-/routes lists the applications, /-/healthz reports the cluster's health


def set_ahead() -> None:
    """Sets the environment variable by which Ray finds `middlewares`. Call this function before this process starts a private
    Ray."""
    os.environ.update(SETTING)


def controller() -> dict[str, object]:
    """Returns options for Serve's controller on a cluster that is already running; empty for a private Ray.

    The proxy inherits the controller's environment.
    """
    return {"runtime_env": {"env_vars": SETTING}} if os.environ.get("RAY_ADDRESS") else {}


def middlewares() -> list[Middleware]:
    """Returns the middlewares of Serve's proxy, and sets the deadlines of the proxy's connections."""
    deadlines.apply()
    return [Middleware(Closed)]


class Closed:
    """Answers HTTP status 404 for the paths that Ray Serve's proxy would otherwise answer itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and (path == OWN or path.startswith(f"{OWN}/")):
            await Response(status_code=404)(scope, receive, send)
        else:
            await self.app(scope, receive, send)
