"""Answers HTTP: who asks, whether they may, what they ask for; the replicas answer, and this writes what they say.

One process, so that each key's limits hold over all replicas. The driver tells it every second or two which version is served:
after a death it starts without one, and requests wait until it is told.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from heliostat.serving import answers, keys, measures, requests, sse
from heliostat.serving.answers import Shape
from heliostat.serving.backend import Backend
from heliostat.serving.confined import confine
from heliostat.serving.handles import LOST, Handles
from heliostat.serving.limits import Limits
from heliostat.serving.refusals import Refusal
from heliostat.serving.replica import Ask

log = logging.getLogger(__name__)

PATHS = {"/health": "GET", "/metrics": "GET", "/v1/models": "GET", "/v1/completions": "POST",
         "/v1/chat/completions": "POST", "/v1/embeddings": "POST"}  # fmt: skip
FAILED = Refusal(500, "the endpoint failed; its log says why")
DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it


@dataclass(frozen=True)
class Settings:
    """Holds what the front goes by. `keys`: digests by name; None lets everybody in."""

    model: str
    since: int
    keys: dict[str, str] | None
    body_bytes: int
    max_tokens: int
    at_once: int
    a_minute: int
    deadline_s: float


class Front:
    """Answers requests; `use` says which version's replicas do the work."""

    def __init__(self, settings: Settings) -> None:
        confine()
        self.settings = settings
        self.limits = Limits(settings.at_once, settings.a_minute)
        self.backend = Backend(LOST, settings.deadline_s)
        self.handles = Handles()
        self.measures = measures.Measures()

    async def use(self, version: str) -> dict[str, int]:
        """Sends what comes from now on to a version; returns how many requests each has under way."""
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
        except Exception:
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
        name = (
            keys.owner(request.headers.get("authorization"), self.settings.keys) if self.settings.keys is not None else "anybody"
        )
        if path.startswith("/v1/models/") and request.method == "GET":
            self._require_model(path.removeprefix("/v1/models/"))
            return JSONResponse(answers.model(self.settings.model, self.settings.since))
        if path not in PATHS:
            raise Refusal(404, f"{path[:100]}: there is no such path; there are {', '.join(PATHS)}", code="unknown_path")
        if request.method != PATHS[path]:
            raise Refusal(405, f"{path}: takes {PATHS[path]}, not {request.method}", code="method_not_allowed")
        if path == "/metrics":
            return Response(self.measures.text(self.backend.open, self.backend.retried), media_type=measures.CONTENT_TYPE)
        if path == "/v1/models":
            return JSONResponse(answers.models(self.settings.model, self.settings.since))
        return await self._work(request, path, name)

    async def _work(self, request: Request, path: str, name: str) -> Response:
        """Answers what is for the model, within the key's limits until its last byte."""
        self.limits.enter(name)
        response: Response | None = None
        try:
            raw = await self._body(request)
            if path == "/v1/embeddings":
                response = await self._embeddings(requests.embeddings(raw), name)
            else:
                asked = requests.chat(raw) if path == "/v1/chat/completions" else requests.completion(raw)
                response = await self._text(asked, name, path)
            return response
        finally:
            if not isinstance(response, Stream):  # a stream leaves at its own end
                self.limits.leave(name)

    async def _body(self, request: Request) -> bytes:
        """Reads the body, and no more of it than is allowed."""
        most, held = self.settings.body_bytes, bytearray()
        told = request.headers.get("content-length", "")
        if told.isdigit() and int(told) > most:
            raise Refusal(413, f"the body has {told} bytes, and at most {most} are taken", code="body_too_large")
        async for piece in request.stream():
            held += piece
            if len(held) > most:
                raise Refusal(413, f"the body has more than {most} bytes, which is the limit", code="body_too_large")
        return bytes(held)

    def _require_model(self, asked: str) -> None:
        if asked != self.settings.model:
            said = f"model: {asked[:100]!r} is not served; {self.settings.model!r} is"
            raise Refusal(404, said, "model", "model_not_found")

    async def _embeddings(self, asked: requests.Embeddings, name: str) -> Response:
        self._require_model(asked.model)
        _, made = await self.backend.ask(lambda version: self.handles.embed(version, asked.input))
        body = answers.embeddings(asked.model, made["answers"], asked.encoding_format)
        self.measures.counted(name, body["usage"])
        return JSONResponse(body)

    async def _text(self, asked: requests.Sampled, name: str, path: str) -> Response:
        self._require_model(asked.model)
        ask, chat = self._ask(asked), isinstance(asked, requests.Chat)
        if asked.stream:
            return await self._stream(asked, ask, name, path)
        version, made = await self.backend.ask(lambda version: self.handles.answer(version, ask))
        body = Shape(asked.model, version, chat).whole(made["answers"])
        self.measures.counted(name, body["usage"])
        return JSONResponse(body)

    def _ask(self, asked: requests.Sampled) -> Ask:
        """Translates a request; without a seed it gets one, so that a second try gives the same answer."""
        chat = asked if isinstance(asked, requests.Chat) else None
        most, where = asked.max_tokens, "max_tokens"
        if chat and chat.max_completion_tokens is not None:
            most, where = chat.max_completion_tokens, "max_completion_tokens"
        if most is None and not chat:
            most = min(DEFAULT_TOKENS, self.settings.max_tokens)
        if most is not None and most > self.settings.max_tokens:
            raise Refusal(400, f"{where}: {most}: at most {self.settings.max_tokens} are given", where, "invalid_value")
        prompts = asked.prompt if isinstance(asked, requests.Completion) else None
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        return Ask(
            prompts, [m.plain() for m in chat.messages] if chat else None, most, self.settings.max_tokens, asked.temperature,
            asked.top_p, [(seed + i) % 2**63 for i in range(len(prompts or [""]))], asked.stop,
            asked.logprobs if isinstance(asked, requests.Completion) else None,
            asked.suffix if isinstance(asked, requests.Completion) else "",
        )  # fmt: skip

    async def _stream(self, asked: requests.Sampled, ask: Ask, name: str, path: str) -> Response:
        """Waits for the first piece, for until then the status can still tell what is wrong."""
        began = time.monotonic()
        items = self.backend.stream(lambda version: self.handles.stream(version, ask))
        try:
            version, first = await anext(items)
        except BaseException:
            await items.aclose()
            raise
        shape, last = Shape(asked.model, version, isinstance(asked, requests.Chat)), list[dict[str, Any]]()

        async def events() -> AsyncIterator[bytes]:
            try:
                item: dict[str, Any] | None = first
                while item is not None:
                    yield sse.event(shape.chunk(item["index"], item["piece"]))
                    last.extend([item["piece"]] if "finish" in item["piece"] else [])
                    following = await anext(items, None)
                    item = following[1] if following else None
                if asked.counts:
                    yield sse.event(shape.counts(last))
                yield sse.DONE
            except Refusal as e:
                self.measures.broken.inc()
                yield sse.event(e.body())
            except Exception:  # never an end that looks like one
                log.exception("a stream broke")
                self.measures.broken.inc()
                yield sse.event(FAILED.body())

        async def ended() -> None:
            self.limits.leave(name)
            self.measures.counted(name, answers.usage(last))
            self.measures.seconds.labels(path).observe(time.monotonic() - began)
            await items.aclose()

        return Stream(events(), ended)


class Stream(StreamingResponse):
    """Sends events, and calls `ended` once behind them, also if the client is gone before the first."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=sse.HEADERS)
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.ended()
