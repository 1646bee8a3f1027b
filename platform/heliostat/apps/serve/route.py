"""Defines a route: a path that accepts POST requests. A replica answers these requests. Each module of `routes` defines one
route.

In the HTTP server, `respond` reads a body, checks it (`request`), asks a replica, and formats its answer (`shape`). `answer`
runs in the replica, with the model and the index that it has loaded.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from starlette.responses import JSONResponse, Response

from heliostat.apps.serve import requests
from heliostat.apps.serve.asks import Item
from heliostat.apps.serve.gateway import FrontSettings, Gateway, Measures
from heliostat.apps.serve.replica import Replica

Answer = dict[str, object]
B = TypeVar("B", bound=requests.Body)
A = TypeVar("A")


class Route(ABC, Generic[B, A]):
    """Answers the requests to one path. `B`: type of the requests' body. `A`: type of the request to a replica; this type must be
    picklable."""

    path: ClassVar[str]
    body: type[B]

    def read(self, settings: FrontSettings, raw: bytes) -> B:
        """Reads the body of a request; raises Refusal, which names the wrong parameter."""
        return requests.read(self.body, raw)

    @abstractmethod
    def request(self, settings: FrontSettings, body: B) -> A:
        """Builds the request that is sent to a replica; raises Refusal if this endpoint can't answer the body."""

    @abstractmethod
    async def answer(self, replica: Replica, request: A) -> Item:
        """Answers a request in the replica; raises Refusal if the replica can't answer."""

    @abstractmethod
    def shape(self, settings: FrontSettings, body: B, version: str, item: Item) -> Answer:
        """Formats a replica's answer for the client. `version`: the model version that answered."""

    def count(self, measures: Measures, key: str, body: B, answer: Answer) -> None:
        """Adds an answer's usage to the key's metrics: by default the numbers of tokens, if the answer has them."""
        if isinstance(usage := answer.get("usage"), dict):
            measures.counted(key, usage)

    async def respond(self, gateway: Gateway, raw: bytes, key: str) -> Response:
        """Answers an HTTP request. `raw`: the request's body. `key`: name of the client's API key."""
        return await self.whole(gateway, self.read(gateway.settings, raw), key)

    async def whole(self, gateway: Gateway, body: B, key: str) -> Response:
        """Returns a complete answer as one JSON response."""
        version, item = await gateway.ask(self.answer, self.request(gateway.settings, body))
        answer = self.shape(gateway.settings, body, version, item)
        self.count(gateway.measures, key, body, answer)
        return JSONResponse(answer)


def seed(number: int | None) -> int:
    """Returns a request's seed. If the request has no seed, draws a seed here, so that a retry on another replica uses the same
    seed and gives the same answer."""
    return secrets.randbits(63) if number is None else number
