"""Answers `/v1/embeddings`: embeds texts."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from heliostat.apps.serve.asks import EMBEDDINGS, TEXT, Item
from heliostat.apps.serve.gateway import FrontSettings
from heliostat.apps.serve.replica import Replica
from heliostat.apps.serve.requests import MOST_INPUTS, Body, Listed, Text
from heliostat.apps.serve.route import Answer, Route


class Embeddings(Body):
    """Holds a request to embed texts."""

    neutral = {"dimensions": None}
    model: str
    input: Annotated[list[Text], Listed, Field(min_length=1, max_length=MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"


class EmbeddingsRoute(Route[Embeddings, list[str]]):
    """Answers requests for embeddings: as numbers, or as little-endian float32 in base64."""

    path, body = "/v1/embeddings", Embeddings

    def request(self, settings: FrontSettings, body: Embeddings) -> list[str]:
        settings.require_model(body.model, TEXT, EMBEDDINGS)
        return body.input

    async def answer(self, replica: Replica, request: list[str]) -> Item:
        assert replica.writer
        return {"answers": await replica.writer.embed(request)}

    def shape(self, settings: FrontSettings, body: Embeddings, version: str, item: Item) -> Answer:
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(one["embedding"], body.encoding_format)}
            for index, one in enumerate(item["answers"])
        ]
        tokens = sum(one["tokens"] for one in item["answers"])
        return {"object": "list", "model": body.model, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _encoded(vector: Sequence[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
