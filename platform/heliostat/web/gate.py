"""Requires an API key from each client of an application without a login, such as MLflow's server.

A program sends `Authorization: Bearer KEY`. A browser gets a page that reads the key from the URL, after the `#`, or asks the
user for the key. The page sends the key to the server once, and gets a cookie. The server accepts this cookie only from pages of
the same origin.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from heliostat.web import keys
from heliostat.web.refusals import Refusal

ENTER = "/heliostat-key"  # path to which a browser sends the key
HEALTH = "/health"  # this path needs no key, and shows only that a server runs
KEY_BYTES = 1024
PAGE = (Path(__file__).parent / "enter.html").read_text(encoding="utf-8")
WILDCARDS = ("0.0.0.0", "::", "")


class Gate:
    """Wraps an ASGI application, and checks the API key of each request. `known`: digests of keys by name. `host`: the address on
    which the server listens."""

    def __init__(self, app: ASGIApp, known: Mapping[str, str], host: str) -> None:
        self.app, self.known = app, dict(known)
        self.names = {"localhost", host.lower()}
        if host in WILDCARDS:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.session = secrets.token_urlsafe(32)  # the cookie's value isn't a key, because other servers of this host can read it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._asked(Request(scope, receive), send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    async def _asked(self, request: Request, send: Send) -> None:
        try:
            self._require_host(request)
            if request.scope["path"] == ENTER and request.method == "POST":
                response = await self._enter(request)
            else:
                if not (request.scope["path"] == HEALTH and request.method == "GET") and not self._has_cookie(request):
                    keys.owner(request.headers.get("authorization"), self.known)
                await self.app(request.scope, request.receive, send)
                return
        except Refusal as e:
            response = _refused(request, e)
        except ClientDisconnect:
            return
        await response(request.scope, request.receive, send)

    def _require_host(self, request: Request) -> None:
        """Raises Refusal if the Host header has a name that isn't this server's. An attacker could make the name of another site
        resolve to this server (DNS rebinding)."""
        name = _host(request.headers.get("host", ""))
        try:
            ipaddress.ip_address(name)  # unlike a name, an address can't be rebound
        except ValueError:
            if name not in self.names:
                said = f"host: {name[:100]!r} isn't a name of this server. Use an IP address, or {', '.join(sorted(self.names))}"
                raise Refusal(403, said, code="unknown_host") from None

    async def _enter(self, request: Request) -> Response:
        """Reads the key that a browser has sent. Returns a response with the cookie; raises Refusal if the key isn't valid."""
        if not _same_origin(request):
            raise Refusal(
                403,
                "the key comes from a page of another origin. Open this server's address, and enter the key there",
                code="other_origin",
            )
        raw = bytearray()
        async for piece in request.stream():
            raw += piece
            if len(raw) > KEY_BYTES:
                raise Refusal(413, f"the key has more than {KEY_BYTES} bytes. Enter only the key", code="body_too_large")
        keys.owner(f"Bearer {raw.decode('utf-8', 'replace')}", self.known)
        response = Response(status_code=204)
        response.set_cookie(
            _cookie(request), self.session, httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
        return response

    def _has_cookie(self, request: Request) -> bool:
        """Checks whether the request has the cookie of an earlier valid key, and comes from a page of this server."""
        cookie = request.cookies.get(_cookie(request))  # cookies of the host's other servers can have any form
        return cookie is not None and hmac.compare_digest(cookie.encode(), self.session.encode()) and _same_origin(request)


def _host(header: str) -> str:
    """Returns the name or address in a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.rpartition(":")[0].lower() if header.count(":") == 1 else header.lower()


def _cookie(request: Request) -> str:
    """Returns the name of the cookie. The name contains the server's port, because browsers send a host's cookies to all ports of
    this host."""
    server = request.scope.get("server") or ("", 0)
    return f"heliostat-{server[1]}"


def _same_origin(request: Request) -> bool:
    """Checks whether the request comes from a page of this server, or from the browser's address bar."""
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    return origin is None or origin.partition("://")[2] == request.headers.get("host", "")


def _refused(request: Request, error: Refusal) -> Response:
    """Returns the response to a rejected request. If the key is missing or unknown, a browser gets the page that asks for the
    key. Other clients get the error as JSON."""
    if error.status == 401 and request.method == "GET" and "text/html" in request.headers.get("accept", ""):
        nonce = secrets.token_urlsafe(16)
        policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
                  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        return Response(PAGE.replace("NONCE", nonce), 401, headers, "text/html")
    if error.status == 401:
        error = Refusal(401, f"{error.message}. For MLflow's clients, set MLFLOW_TRACKING_TOKEN to the key", code=error.code)
    return JSONResponse(error.body(), error.status, error.headers())
