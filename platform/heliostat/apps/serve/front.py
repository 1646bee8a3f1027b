"""Answers HTTP requests: checks the key, the key's limits, and the body; sends the request to a replica; and returns the answer.

The HTTP server is one process, so that the limits of a key apply to all replicas together. Every two seconds the driver sends the
current version to the HTTP server. After a crash, the HTTP server starts without a version, and requests wait until the driver
sends a version.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from heliostat.apps.serve.gateway import FAILED, Gateway
from heliostat.apps.serve.routes import ROUTES
from heliostat.apps.serve.writing import Stream
from heliostat.web import keys
from heliostat.web.refusals import Refusal

log = logging.getLogger(__name__)

PATHS = {**dict.fromkeys(("/health", "/metrics", "/v1/models"), "GET"), **dict.fromkeys(ROUTES, "POST")}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Front(Gateway):
    """Answers requests with the replicas of the current version, which the driver sets with `use`."""

    async def use(self, version: str) -> dict[str, int]:
        """Sends all later requests to this version; returns the number of open requests of each version."""
        return self.backend.use(version)

    async def __call__(self, request: Request) -> Response:
        began, path = time.monotonic(), request.url.path
        shown = path if path in PATHS else "/v1/models/" if path.startswith("/v1/models/") else "other"
        try:
            response = await self._answer(request, path)
        except Refusal as e:
            response = JSONResponse(e.body(), e.status, e.headers())
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:  # a handler can raise anything: the client gets a 500, and the log gets the traceback
            log.exception("a request to %s failed", shown)
            response = JSONResponse(FAILED.body(), FAILED.status)
        self.measures.requests.labels(shown, response.status_code).inc()
        if not isinstance(response, Stream):
            self.measures.seconds.labels(shown).observe(time.monotonic() - began)
        return response

    async def _answer(self, request: Request, path: str) -> Response:
        if path == "/health":
            up = self.backend.ready.is_set()
            return JSONResponse({"status": "ok" if up else "starting"}, 200 if up else 503)
        name = self.owner(request)
        if path.startswith("/v1/models/") and request.method == "GET":
            model = path.removeprefix("/v1/models/")
            self.settings.require_served(model)
            return JSONResponse(self._described(model))
        if path not in PATHS:
            raise Refusal(404, f"{path[:100]}: unknown path. Use one of {', '.join(PATHS)}", code="unknown_path")
        if request.method != PATHS[path]:
            raise Refusal(405, f"{path}: supports only {PATHS[path]}, not {request.method}", code="method_not_allowed")
        if path == "/metrics":
            return Response(self.measures.text(self.backend.open, self.backend.retried), media_type=CONTENT_TYPE)
        if path == "/v1/models":
            return JSONResponse({"object": "list", "data": [self._described(one) for one in self.settings.names]})
        return await self._work(request, path, name)

    def _described(self, name: str) -> dict[str, object]:
        """Describes a served model or index in the format of OpenAI's API."""
        return {"id": name, "object": "model", "created": self.settings.since, "owned_by": "heliostat"}

    def owner(self, request: Request) -> str:
        """Returns the name of the request's key; `anybody` if the endpoint needs no key. Raises Refusal with status 401 if the
        key is unknown."""
        known = self.settings.keys
        return "anybody" if known is None else keys.owner(request.headers.get("authorization"), known)

    async def _work(self, request: Request, path: str, name: str) -> Response:
        """Answers a POST for a model or an index. The request counts toward the key's limits until the answer's last byte."""
        self.limits.enter(name)
        response: Response | None = None
        try:
            try:
                async with asyncio.timeout(self.settings.deadline_s):
                    raw = await self._body(request)
            except TimeoutError as e:
                raise Refusal(
                    408,
                    f"the request's body didn't arrive within {self.settings.deadline_s:g} s. Send the request again",
                    code="timeout",
                ) from e
            response = await ROUTES[path].respond(self, raw, name)
            return response
        finally:
            if not isinstance(response, Stream):  # a stream calls `leave` itself when it ends
                self.limits.leave(name)

    async def _body(self, request: Request) -> bytes:
        """Reads the body; raises Refusal with status 413 if the body is longer than `body_bytes`."""
        most, body = self.settings.body_bytes, bytearray()
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise Refusal(
                413, f"the body has {length} bytes, and the limit is {most}. Send a smaller body", code="body_too_large"
            )
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise Refusal(
                    413, f"the body has more than {most} bytes, which is the limit. Send a smaller body", code="body_too_large"
                )
        return bytes(body)
