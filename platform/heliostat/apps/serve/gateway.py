"""Connects the routes to the replicas. Holds the endpoint's settings, the limits of each key, and the metrics."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from heliostat.apps.serve.asks import EMBEDDINGS, IMAGES, TEXT, Item
from heliostat.apps.serve.backend import Backend
from heliostat.apps.serve.replica import Replica
from heliostat.web.refusals import Refusal

MINUTE = 60.0
FAILED = Refusal(500, "the endpoint failed. Read the endpoint's log")
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
A = TypeVar("A")
Work = Callable[[Replica, A], Awaitable[Item]]
Pieces = Callable[[Replica, A], AsyncGenerator[Item]]
DOES = {
    TEXT: "generates text. Send the request to /v1/completions",
    IMAGES: "generates images. Send the request to /v1/images/generations",
    EMBEDDINGS: "embeds texts. Send the request to /v1/embeddings",
}


class Replicas(Protocol):
    """Connects to the replicas of each version. Both methods call a route's function in a replica, with the replica and the
    request as arguments."""

    async def call(self, version: str, answer: Work[A], request: A) -> Item: ...

    def stream(self, version: str, pieces: Pieces[A], request: A) -> AsyncGenerator[Item]: ...


@dataclass(frozen=True)
class FrontSettings:
    """Holds the settings of the HTTP server.

    `model`, `index`, `adapters`: the names that clients use; None if there is no model or no index. `kind`: the model's kind.
    `keys`: digests of API keys, by the key's name; None means that clients need no key. `since`: start of the endpoint, in Unix
    seconds. `at_once`: maximum open requests per key. `a_minute`: maximum requests per key and minute. For both, 0 means no
    limit.
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

    @property
    def names(self) -> list[str]:
        """Lists the names of the served model, the model's adapters, and the index."""
        return [name for name in (self.model, *self.adapters, self.index) if name is not None]

    def require_served(self, model: str) -> None:
        """Raises Refusal with status 404 unless a model, an adapter, or an index with this name is served."""
        if model not in self.names:
            served = f"{', '.join(map(repr, self.names))}"
            raise Refusal(404, f"model: {model[:100]!r} isn't served. Served: {served}", "model", "model_not_found")

    def require_model(self, model: str, *fit: str) -> None:
        """Raises Refusal unless a model or an adapter with this name is served, and the model's kind is in `fit`."""
        self.require_served(model)
        if model in self.adapters:
            if EMBEDDINGS not in fit and TEXT in fit:
                return
            raise Refusal(
                400,
                f"model: {model!r} is an adapter, which only generates text. Send the request to /v1/completions",
                "model",
                "unsupported_by_model",
            )
        if model != self.model:
            said = (
                f"model: {model!r} is an index. Send the request to /v1/search, or to /v1/chat/completions if a model "
                "answers from the index"
            )
            raise Refusal(400, said, "model", "unsupported_by_model")
        if self.kind not in fit:
            raise Refusal(400, f"model: {model!r} {DOES[str(self.kind)]}", "model", "unsupported_by_model")


class RequestLimits:
    """Counts each key's open requests and its requests within the last minute. 0 means no limit."""

    def __init__(self, at_once: int, a_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.at_once, self.a_minute, self.clock = at_once, a_minute, clock
        self.open: defaultdict[str, int] = defaultdict(int)
        self.began: defaultdict[str, deque[float]] = defaultdict(deque)

    def enter(self, name: str) -> None:
        """Counts a request that begins; raises Refusal with status 429 if the request exceeds a limit."""
        now, began = self.clock(), self.began[name]
        while began and began[0] <= now - MINUTE:
            began.popleft()
        if self.at_once and self.open[name] >= self.at_once:
            raise self._refusal(f"this key has {self.at_once} open requests", 1)
        if self.a_minute and len(began) >= self.a_minute:
            raise self._refusal(f"this key sent {self.a_minute} requests within a minute", began[0] + MINUTE - now)
        self.open[name] += 1
        if self.a_minute:
            began.append(now)

    def leave(self, name: str) -> None:
        """Counts a request that ends."""
        self.open[name] -= 1

    def _refusal(self, why: str, seconds: float) -> Refusal:
        after = max(1, math.ceil(seconds))
        return Refusal(429, f"{why}, which is the limit. Try again in {after} s", None, "rate_limit_exceeded", after)


class Measures:
    """Holds the Prometheus metrics of one HTTP server, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ours: dict[str, Any] = {"registry": self.registry, "namespace": "heliostat"}
        self.requests = Counter("requests", "Requests that were answered", ["path", "status"], **ours)
        self.seconds = Histogram(
            "request_seconds", "Seconds from a request to the end of its answer", ["path"], buckets=SECONDS, **ours
        )
        self.tokens = Counter("tokens", "Tokens of prompts and of answers", ["key", "kind"], **ours)
        self.images = Counter("images", "Images that were generated", ["key"], **ours)
        self.open = Gauge("open_requests", "Requests under way, by the version that answers them", ["version"], **ours)
        self.retries = Gauge("retried_requests", "Requests that were sent again because a replica died", **ours)
        self.broken = Counter("broken_streams", "Streams that ended in an error event", **ours)

    def counted(self, key: str, usage: dict[str, int]) -> None:
        """Adds the tokens of a prompt and its answer to the key's counters."""
        for kind in ("prompt", "completion"):
            self.tokens.labels(key, kind).inc(usage.get(f"{kind}_tokens", 0))

    def text(self, open_: dict[str, int], retried: int) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        self.open.clear()
        for version, count in open_.items():
            self.open.labels(version).set(count)
        self.retries.set(retried)
        return generate_latest(self.registry)


class Gateway:
    """Holds the state that all requests of one HTTP server share, and sends requests to the replicas of the current version."""

    def __init__(self, settings: FrontSettings, replicas: Replicas, lost: tuple[type[BaseException], ...]) -> None:
        self.settings, self.replicas = settings, replicas
        self.limits = RequestLimits(settings.at_once, settings.a_minute)
        self.backend = Backend(lost, settings.deadline_s)
        self.measures = Measures()

    async def ask(self, answer: Work[A], request: A) -> tuple[str, Item]:
        """Returns the model version that answered, and the answer; raises Refusal as in `Backend.ask`."""
        return await self.backend.ask(lambda version: self.replicas.call(version, answer, request))

    def stream(self, pieces: Pieces[A], request: A) -> AsyncGenerator[tuple[str, Item]]:
        """Yields the model version that answers, and each item of the answer; raises Refusal as in `Backend.stream`."""
        return self.backend.stream(lambda version: self.replicas.stream(version, pieces, request))
