"""Serves the page, and hands all else to the endpoint's front: the page asks it as any client does.

The page holds no secret and loads nothing but its own files: what it shows comes with the key, through the endpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from heliostat.apps.serve.front import Front
from heliostat.web.refusals import Refusal

FILES = {one.name: one for one in (Path(__file__).parent / "page").iterdir()}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HOSTS = ["127.0.0.1", "localhost"]  # another name that leads here is another site's, which a browser would let ask
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def app(front: Front, abilities: dict[str, Any]) -> Starlette:
    """Makes the application of a front; `abilities`: what the page is told when it has the key."""

    async def told(request: Request) -> Response:
        try:
            front.owner(request)
        except Refusal as e:
            return JSONResponse(e.body(), e.status, e.headers())
        return JSONResponse(abilities)

    async def asked(request: Request) -> Response:
        return await front(request)

    routes = [
        Route("/", page),
        Route("/page/{name}", page),
        Route("/abilities", told),
        Route("/{path:path}", asked, methods=["GET", "POST", "PUT", "DELETE", "PATCH"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])


async def page(request: Request) -> Response:
    """Answers with a file of the page."""
    file = FILES.get(request.path_params.get("name", "index.html"))
    if file is None:
        return Response("there is no such file", 404, media_type="text/plain")
    return Response(file.read_bytes(), media_type=TYPES[file.suffix], headers=HEADERS)
