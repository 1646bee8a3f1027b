"""Answers `/v1/search`: finds passages in the index."""

from __future__ import annotations

from pydantic import Field

from heliostat.apps.serve.asks import Item, Search
from heliostat.apps.serve.gateway import FrontSettings
from heliostat.apps.serve.replica import Replica
from heliostat.apps.serve.requests import MOST_PASSAGES, Body, Mode, Text
from heliostat.apps.serve.route import Answer, Route
from heliostat.web.refusals import Refusal


class SearchRequest(Body):
    """Holds a request for passages. `top`: maximum number of passages."""

    model: str | None = None
    query: Text
    top: int = Field(5, ge=1, le=MOST_PASSAGES)
    mode: Mode | None = None


class SearchRoute(Route[SearchRequest, Search]):
    """Answers searches with passages, best first."""

    path, body = "/v1/search", SearchRequest

    def request(self, settings: FrontSettings, body: SearchRequest) -> Search:
        if settings.index is None:
            raise Refusal(400, "this endpoint serves no index. Restart the endpoint with --index INDEX", code="no_index")
        if body.model not in (None, settings.index):
            said = f"model: {str(body.model)[:100]!r} isn't the served index. Set model to {settings.index!r}"
            raise Refusal(400, said, "model", "unsupported_by_model")
        return Search(body.query, body.top, body.mode)

    async def answer(self, replica: Replica, request: Search) -> Item:
        assert replica.shelf
        return {"passages": await replica.shelf.search(request)}

    def shape(self, settings: FrontSettings, body: SearchRequest, version: str, item: Item) -> Answer:
        return {"object": "list", "model": settings.index, "system_fingerprint": version, "data": item["passages"]}
