"""Serves a web page for a model, an index, or both, until you stop the command: `heliostat model play`.

One process runs the endpoint's HTTP server and a replica, without Ray. The page sends requests like any other client. The page's
files contain no secret, and the page loads only these files. The page gets all other data from the endpoint, with the API key.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from heliostat.apps.serve.asks import EMBEDDINGS
from heliostat.apps.serve.front import Front
from heliostat.apps.serve.gateway import A, Pieces, Work
from heliostat.apps.serve.replica import MOST_AREA, Replica
from heliostat.apps.serve.requests import MOST_PASSAGES
from heliostat.apps.serve.routes import images
from heliostat.apps.serve.run import require_free
from heliostat.apps.serve.served import Options, ServedModels
from heliostat.cluster.private_ray import LOOPBACK
from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.training.driver.signals import Signals
from heliostat.web import deadlines
from heliostat.web.refusals import Refusal

END_S = 3  # seconds for open requests to finish when the page is stopped
FILES = {one.name: one for one in (Path(__file__).parent / "page").iterdir()}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HOSTS = ["127.0.0.1", "localhost"]  # blocks DNS rebinding: another site's name that resolves to this machine
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def app(front: Front, offered: dict[str, object]) -> Starlette:
    """Builds the web application of an HTTP server. `offered`: the abilities of the model and the index, which the page requests
    with its API key."""

    async def shown(request: Request) -> Response:
        try:
            front.owner(request)
        except Refusal as e:
            return JSONResponse(e.body(), e.status, e.headers())
        return JSONResponse(offered)

    async def answered(request: Request) -> Response:
        return await front(request)

    routes = [
        Route("/", page),
        Route("/page/{name}", page),
        Route("/abilities", shown),
        Route("/{path:path}", answered, methods=["GET", "POST", "PUT", "DELETE", "PATCH"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])


async def page(request: Request) -> Response:
    """Returns a file of the web page, or HTTP status 404 if the page has no file with this name."""
    file = FILES.get(request.path_params.get("name", "index.html"))
    if file is None:
        return Response("the page has no file with this name. Open / to see the page", 404, media_type="text/plain")
    return Response(file.read_bytes(), media_type=TYPES[file.suffix], headers=HEADERS)


class Local:
    """Connects the HTTP server to the replica in this process. All versions use this replica, because there is no other."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    async def call(self, version: str, answer: Work[A], request: A) -> dict[str, object]:
        """Calls `answer` in the replica, and returns the complete answer."""
        return await self.replica.ask(answer, request)

    def stream(self, version: str, pieces: Pieces[A], request: A) -> AsyncGenerator[dict[str, object]]:
        """Yields the answer piece by piece, as the replica generates it."""
        return self.replica.stream(pieces, request)


def abilities(
    served: ServedModels, replica: Replica, version: str, options: Options, prompt: str | None = None
) -> dict[str, object]:
    """Describes for the page what the model and the index can do. `prompt`: the text that the page shows at first."""
    return {
        "model": served.name,
        "index": served.index_name,
        "version": version,
        "tabs": tabs(replica),
        "prompt": prompt,
        "text": _text(replica, options),
        "images": _images(replica),
        "passages": _passages(replica),
    }


def tabs(replica: Replica) -> list[str]:
    """Lists the page's tabs that the model and the index support, in the order in which the page shows them."""
    engine = replica.writer.engine if replica.writer else None
    able = {
        "write": engine,
        "complete": engine and engine.infilling,
        "chat": engine and engine.loaded.tokenizer.chat_template,
        "draw": replica.painter,
        "ask": replica.shelf,
    }
    return [name for name, can in able.items() if can]


def example(folder: Path) -> str | None:
    """Returns an example prompt for the model; None if no example is known.

    The prompt is the model's input example in MLflow. Without an input example, the function returns the first prompt of the
    samples in the model's job.
    """
    logged = folder.parent.parent / "input_example.json"  # MLflow keeps it next to the model's artifacts
    try:
        kept = json.loads(logged.read_text(encoding="utf-8"))
        (prompt, *_) = kept if isinstance(kept, list) else []  # an example in another form belongs to the recipe, without prompt
    except (OSError, ValueError):
        trained = exported.record(folder)["job"] if (folder / exported.RECORD).is_file() else None
        samples = trained["model"].get("samples") if trained else None
        prompts = samples.get("prompts") if isinstance(samples, dict) else None
        first = prompts[0] if isinstance(prompts, list) and prompts else None
        prompt = first.get("text") if isinstance(first, dict) else first
    return prompt if isinstance(prompt, str) and prompt.strip() else None


def _text(replica: Replica, options: Options) -> dict[str, object] | None:
    if replica.writer is None:
        return None
    longest = replica.writer.engine.loaded.longest
    return {"longest": longest, "max_tokens": min(options.max_tokens, longest or options.max_tokens)}


def _images(replica: Replica) -> dict[str, object] | None:
    if replica.painter is None:
        return None
    painter = replica.painter
    bounds = {"most_images": images.MOST_IMAGES, "most_steps": images.MOST_STEPS, "most_area": MOST_AREA}
    return {"size": list(painter.size), **painter.canvas.defaults, **bounds}


def _passages(replica: Replica) -> dict[str, object] | None:
    if replica.shelf is None:
        return None
    index = replica.shelf.index
    return {"modes": list(index.modes), "documents": index.record["documents"], "passages": index.record["passages"],
            "most": MOST_PASSAGES, "answers": replica.writer is not None}  # fmt: skip


class Server(uvicorn.Server):
    """Runs uvicorn, and calls `ready` once the server answers."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready
        deadlines.apply()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()


def play(served: ServedModels, keys: Callable[[], dict[str, str] | None], options: Options, ready: Callable[[str], None]) -> None:
    """Serves the page until a signal, such as SIGINT, stops the server. Calls `ready` with the page's URL.

    Raises ConfigError, before `keys` is called, if the model or the index can't be served.
    """
    if served.kind() == EMBEDDINGS:
        raise ConfigError(
            f"MODEL: {served.name!r} is an embedder, and the page doesn't support embedders. Use `heliostat model serve`"
        )
    require_free(options.port)
    asgi = application(served, keys, options)
    config = uvicorn.Config(
        asgi, host=LOOPBACK, port=options.port, log_config=None, access_log=False, lifespan="off", server_header=False,
        timeout_graceful_shutdown=END_S,
    )  # fmt: skip
    with Signals():  # when uvicorn ends, it raises again the signal that it received
        Server(config, lambda: ready(f"http://{LOOPBACK}:{options.port}/")).run()


def application(served: ServedModels, keys: Callable[[], dict[str, str] | None], options: Options) -> Any:
    """Loads the model and the index, reads the API keys with `keys`, and returns the web application."""
    version = served.source.wanted()
    folder = served.source.folder(version)
    replica = Replica(served.holds(folder, options.batch))
    front = Front(served.settings(served.kind(), keys(), options), Local(replica), ())
    front.backend.use(version)
    return app(front, abilities(served, replica, version, options, example(folder) if folder else None))
