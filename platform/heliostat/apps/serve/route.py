"""Defines a route: a path that takes a POST, and that a replica answers. One route is one module of `routes`.

In the front, `respond` reads a body, checks it (`request`), asks a replica, and shapes what that answers. `answer` runs in the
replica, with the models and the index that it has loaded.
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
    """Answers one path. `B`: the body of its requests; `A`: what it asks of a replica, which must pickle."""

    path: ClassVar[str]
    body: type[B]

    def read(self, settings: FrontSettings, raw: bytes) -> B:
        """Reads the body of a request; Refusal that names what is at fault."""
        return requests.read(self.body, raw)

    @abstractmethod
    def request(self, settings: FrontSettings, body: B) -> A:
        """Returns what a request asks of a replica; Refusal if it cannot be answered here."""

    @abstractmethod
    async def answer(self, replica: Replica, request: A) -> Item:
        """Answers in the replica; Refusal if it cannot."""

    @abstractmethod
    def shape(self, settings: FrontSettings, body: B, version: str, item: Item) -> Answer:
        """Returns a replica's answer as clients read it. `version`: of the model that answered."""

    def count(self, measures: Measures, key: str, body: B, answer: Answer) -> None:
        """Counts what was done for a key: the tokens, of an answer that has their numbers."""
        if isinstance(usage := answer.get("usage"), dict):
            measures.counted(key, usage)

    async def respond(self, gateway: Gateway, raw: bytes, key: str) -> Response:
        """Answers a request's body, for the key of this name."""
        return await self.whole(gateway, self.read(gateway.settings, raw), key)

    async def whole(self, gateway: Gateway, body: B, key: str) -> Response:
        """Answers a request all at once."""
        version, item = await gateway.ask(self.answer, self.request(gateway.settings, body))
        answer = self.shape(gateway.settings, body, version, item)
        self.count(gateway.measures, key, body, answer)
        return JSONResponse(answer)


def seed(number: int | None) -> int:
    """Returns a request's seed, a new one if it has none: so a second try gives the same answer."""
    return secrets.randbits(63) if number is None else number
