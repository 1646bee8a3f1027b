"""Answers HTTP: who asks, whether they may, what they ask for; the replicas answer, and this writes what they say.

One process, so that each key's limits hold over all replicas. The driver tells it every second or two which version is served:
after a death it starts without one, and requests wait until it is told.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from heliostat.apps.serve import answers, requests
from heliostat.apps.serve.answers import AnswerShape
from heliostat.apps.serve.asks import EMBEDDINGS, IMAGES, TEXT, AnswerPiece, Ask, Item, PictureRequest, Search
from heliostat.apps.serve.backend import Backend
from heliostat.config.fields import Json
from heliostat.web import keys
from heliostat.web.refusals import Refusal

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
MINUTE = 60.0
FAILED = Refusal(500, "the endpoint failed; its log says why")
DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it
ANSWER_TOKENS = 128  # of an answer from the index


class Replicas(Protocol):
    """Reaches the replicas of a version: `call` asks for a method of theirs by its name."""

    async def call(self, version: str, what: str, asked: object) -> Item: ...

    def stream(self, version: str, ask: Ask) -> AsyncGenerator[Item]: ...


@dataclass(frozen=True)
class FrontSettings:
    """Holds what the front goes by. `keys`: digests by name; None lets everybody in.

    `model`: what clients call it, None if there is an index only; `kind`: what it does; `index`: what clients call that;
    `adapters`: what they call the model's adapters.
    """

    model: str | None
    kind: str | None
    index: str | None
    since: int
    keys: dict[str, str] | None
    body_bytes: int
    max_tokens: int
    at_once: int
    a_minute: int
    deadline_s: float
    adapters: tuple[str, ...] = ()


class RequestLimits:
    """Counts the requests of each key, those of the last minute and those that are open; 0 is no limit."""

    def __init__(self, at_once: int, a_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.at_once, self.a_minute, self.clock = at_once, a_minute, clock
        self.open: defaultdict[str, int] = defaultdict(int)
        self.began: defaultdict[str, deque[float]] = defaultdict(deque)

    def enter(self, name: str) -> None:
        """Begins a request; Refusal with 429 beyond a limit."""
        now, began = self.clock(), self.began[name]
        while began and began[0] <= now - MINUTE:
            began.popleft()
        if self.at_once and self.open[name] >= self.at_once:
            raise self._refusal(f"{self.at_once} requests of this key are open", 1)
        if self.a_minute and len(began) >= self.a_minute:
            raise self._refusal(f"{self.a_minute} requests of this key came within a minute", began[0] + MINUTE - now)
        self.open[name] += 1
        if self.a_minute:
            began.append(now)

    def leave(self, name: str) -> None:
        """Ends a request."""
        self.open[name] -= 1

    def _refusal(self, why: str, seconds: float) -> Refusal:
        after = max(1, math.ceil(seconds))
        return Refusal(429, f"{why}, which is the limit; try again in {after} s", None, "rate_limit_exceeded", after)


class Front:
    """Answers requests; `use` says which version's replicas do the work."""

    def __init__(self, settings: FrontSettings, handles: Replicas, lost: tuple[type[BaseException], ...]) -> None:
        self.settings, self.handles = settings, handles
        self.names = [name for name in (settings.model, *settings.adapters, settings.index) if name is not None]
        self.limits = RequestLimits(settings.at_once, settings.a_minute)
        self.backend = Backend(lost, settings.deadline_s)
        self.measures = Measures()

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
        except Exception:  # whatever a handler raises: the client gets a 500, and the log the traceback
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
            asked = path.removeprefix("/v1/models/")
            self._require_served(asked)
            return JSONResponse(answers.model(asked, self.settings.since))
        if path not in PATHS:
            raise Refusal(404, f"{path[:100]}: there is no such path; there are {', '.join(PATHS)}", code="unknown_path")
        if request.method != PATHS[path]:
            raise Refusal(405, f"{path}: takes {PATHS[path]}, not {request.method}", code="method_not_allowed")
        if path == "/metrics":
            return Response(self.measures.text(self.backend.open, self.backend.retried), media_type=CONTENT_TYPE)
        if path == "/v1/models":
            return JSONResponse(answers.models(self.names, self.settings.since))
        return await self._work(request, path, name)

    def owner(self, request: Request) -> str:
        """Finds the name of a request's key; Refusal with 401 if it has none that is known."""
        known = self.settings.keys
        return "anybody" if known is None else keys.owner(request.headers.get("authorization"), known)

    async def _work(self, request: Request, path: str, name: str) -> Response:
        """Answers what is for the model, within the key's limits until its last byte."""
        self.limits.enter(name)
        response: Response | None = None
        try:
            try:
                async with asyncio.timeout(self.settings.deadline_s):
                    raw = await self._body(request)
            except TimeoutError as e:
                raise Refusal(408, f"the body did not come within {self.settings.deadline_s:g} s", code="timeout") from e
            response = await POSTS[path](self, raw, name)
            return response
        finally:
            if not isinstance(response, Stream):  # a stream leaves at its own end
                self.limits.leave(name)

    async def _body(self, request: Request) -> bytes:
        """Reads the body, and no more of it than is allowed."""
        most, body = self.settings.body_bytes, bytearray()
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise Refusal(413, f"the body has {length} bytes, and at most {most} are taken", code="body_too_large")
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise Refusal(413, f"the body has more than {most} bytes, which is the limit", code="body_too_large")
        return bytes(body)

    def _require_served(self, asked: str) -> None:
        if asked not in self.names:
            served = f"{' and '.join(map(repr, self.names))} {'are' if self.names[1:] else 'is'}"
            raise Refusal(404, f"model: {asked[:100]!r} is not served; {served}", "model", "model_not_found")

    def _require_model(self, asked: str, *fit: str) -> None:
        """Raises Refusal unless a model of a kind that fits is asked, and is served."""
        self._require_served(asked)
        if asked in self.settings.adapters:
            if EMBEDDINGS not in fit and TEXT in fit:
                return
            raise Refusal(400, f"model: {asked!r} is an adapter, and writes alone", "model", "unsupported_by_model")
        if asked != self.settings.model:
            said = f"model: {asked!r} is an index; ask it at /v1/search, or at /v1/chat/completions where a model answers from it"
            raise Refusal(400, said, "model", "unsupported_by_model")
        if self.settings.kind not in fit:
            does = {
                TEXT: "writes, and draws nothing; ask it at /v1/completions",
                IMAGES: "draws, and writes nothing; ask it at /v1/images/generations",
                EMBEDDINGS: "embeds texts, and writes nothing; ask it at /v1/embeddings",
            }
            raise Refusal(400, f"model: {asked!r} {does[str(self.settings.kind)]}", "model", "unsupported_by_model")

    async def _completions(self, raw: bytes, name: str) -> Response:
        return await self._text(requests.read(requests.Completion, raw), name, "/v1/completions")

    async def _chat(self, raw: bytes, name: str) -> Response:
        return await self._text(requests.chat(raw, self.settings.index), name, "/v1/chat/completions")

    async def _embeddings(self, raw: bytes, name: str) -> Response:
        asked = requests.read(requests.Embeddings, raw)
        self._require_model(asked.model, TEXT, EMBEDDINGS)
        _, item = await self._call("embed", asked.input)
        body = answers.embeddings(asked.model, item["answers"], asked.encoding_format)
        self.measures.counted(name, body["usage"])
        return JSONResponse(body)

    async def _images(self, raw: bytes, name: str) -> Response:
        asked = requests.read(requests.Images, raw)
        self._require_model(asked.model, IMAGES)
        picture = PictureRequest(asked.prompt, asked.n, _seed(asked.seed), asked.options)
        version, item = await self._call("draw", picture)
        self.measures.images.labels(name).inc(asked.n)
        return JSONResponse(answers.images(asked.model, version, item["images"]))

    async def _search(self, raw: bytes, name: str) -> Response:
        asked, index = requests.read(requests.SearchRequest, raw), self.settings.index
        if index is None:
            raise Refusal(400, "no index is served here; start with --index INDEX", code="no_index")
        if asked.model not in (None, index):
            said = f"model: {str(asked.model)[:100]!r} is not the index; {index!r} is"
            raise Refusal(400, said, "model", "unsupported_by_model")
        version, item = await self._call("search", Search(asked.query, asked.top, asked.mode))
        return JSONResponse(answers.passages(index, version, item["passages"]))

    async def _call(self, what: str, asked: object) -> tuple[str, Item]:
        return await self.backend.ask(lambda version: self.handles.call(version, what, asked))

    async def _text(self, asked: requests.Sampled, name: str, path: str) -> Response:
        self._require_writer(asked)
        ask, chat = self._ask(asked), isinstance(asked, requests.ChatRequest)
        if asked.stream:
            return await self._stream(asked, ask, name, path)
        version, item = await self._call("answer", ask)
        body = AnswerShape(asked.model, version, chat).whole(item["answers"], item.get("sources"))
        self.measures.counted(name, body["usage"])
        return JSONResponse(body)

    def _require_writer(self, asked: requests.Sampled) -> None:
        if not isinstance(asked, requests.Question):
            self._require_model(asked.model, TEXT)
        elif self.settings.kind != TEXT:
            raise Refusal(400, f"model: no model answers from {asked.model!r}; ask /v1/search", "model", "unsupported_by_model")
        elif asked.messages[0].role != "user":
            raise Refusal(400, "messages.0.role: an index takes one question, a message of the user", "messages", "invalid_value")

    def _ask(self, asked: requests.Sampled) -> Ask:
        """Translates a request; without a seed it gets one, so that a second try gives the same answer."""
        chat = asked if isinstance(asked, requests.ChatRequest) else None
        question = asked if isinstance(asked, requests.Question) else None
        most, where = asked.max_tokens, "max_tokens"
        if chat and chat.max_completion_tokens is not None:
            most, where = chat.max_completion_tokens, "max_completion_tokens"
        if most is None and (question or not chat):
            most = min(ANSWER_TOKENS if question else DEFAULT_TOKENS, self.settings.max_tokens)
        if most is not None and most > self.settings.max_tokens:
            raise Refusal(400, f"{where}: {most}: at most {self.settings.max_tokens} are given", where, "invalid_value")
        prompts = asked.prompt if isinstance(asked, requests.Completion) else None
        seed, messages = _seed(asked.seed), [m.plain() for m in chat.messages] if chat else None
        return Ask(
            prompts, None if question else messages, most, self.settings.max_tokens, asked.temperature,
            asked.top_p, [(seed + i) % 2**63 for i in range(len(prompts or [""]))], asked.stop,
            chat.told if chat else asked.logprobs if isinstance(asked, requests.Completion) else None,
            asked.suffix if isinstance(asked, requests.Completion) else "",
            Search(question.messages[0].plain()["content"], question.top, question.mode) if question else None,
            asked.model if asked.model in self.settings.adapters else None,
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
        shape, last = AnswerShape(asked.model, version, isinstance(asked, requests.ChatRequest)), list[AnswerPiece]()

        async def events() -> AsyncIterator[bytes]:
            try:
                item: Item | None = first
                while item is not None:
                    yield event(shape.chunk(item["index"], item["piece"], item.get("sources")))
                    last.extend([item["piece"]] if "finish" in item["piece"] else [])
                    following = await anext(items, None)
                    item = following[1] if following else None
                if asked.counts:
                    yield event(shape.counts(last))
                yield DONE
            except Refusal as e:
                self.measures.broken.inc()
                yield event(e.body())
            except Exception:  # never an end that looks like one
                log.exception("a stream broke")
                self.measures.broken.inc()
                yield event(FAILED.body())

        async def ended() -> None:
            self.limits.leave(name)
            self.measures.counted(name, answers.usage(last))
            self.measures.seconds.labels(path).observe(time.monotonic() - began)
            await items.aclose()

        return Stream(events(), ended)


POSTS: dict[str, Callable[[Front, bytes, str], Awaitable[Response]]] = {  # a route gets the body, and the name of the key
    "/v1/completions": Front._completions,
    "/v1/chat/completions": Front._chat,
    "/v1/embeddings": Front._embeddings,
    "/v1/images/generations": Front._images,
    "/v1/search": Front._search,
}
PATHS = {**dict.fromkeys(("/health", "/metrics", "/v1/models"), "GET"), **dict.fromkeys(POSTS, "POST")}


def _seed(given: int | None) -> int:
    return secrets.randbits(63) if given is None else given


def event(data: Mapping[str, object]) -> bytes:
    """Frames an object as one server-sent event: JSON of one line, since a line break would end it."""
    return b"data: " + json.dumps(data, ensure_ascii=True, separators=(",", ":")).encode() + b"\n\n"


class Stream(StreamingResponse):
    """Sends events, and calls `ended` once behind them, also if the client is gone before the first."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.ended()


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Measures:
    """Holds the measures of one front, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ours: dict[str, Json] = {"registry": self.registry, "namespace": "heliostat"}
        self.requests = Counter("requests", "Requests that were answered", ["path", "status"], **ours)
        self.seconds = Histogram("request_seconds", "From a request to the end of its answer", ["path"], buckets=SECONDS, **ours)
        self.tokens = Counter("tokens", "Tokens of prompts and of answers", ["key", "kind"], **ours)
        self.images = Counter("images", "Pictures that were drawn", ["key"], **ours)
        self.open = Gauge("open_requests", "Requests under way, by the version that answers them", ["version"], **ours)
        self.retries = Gauge("retried_requests", "Requests that were sent again because a replica died", **ours)
        self.broken = Counter("broken_streams", "Streams that ended in an error event", **ours)

    def counted(self, key: str, usage: dict[str, int]) -> None:
        """Adds the tokens of an answer."""
        for kind in ("prompt", "completion"):
            self.tokens.labels(key, kind).inc(usage.get(f"{kind}_tokens", 0))

    def text(self, open_: dict[str, int], retried: int) -> bytes:
        """Writes all measures in Prometheus' format of text."""
        self.open.clear()
        for version, count in open_.items():
            self.open.labels(version).set(count)
        self.retries.set(retried)
        return generate_latest(self.registry)
