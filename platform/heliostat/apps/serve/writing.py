"""Defines the sampling parameters, complete answers, and streams that all routes of a language model share."""

from __future__ import annotations

import json
import logging
import secrets
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, ClassVar, TypeVar

from pydantic import Field
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from heliostat.apps.serve.asks import AnswerPiece, Ask, Item
from heliostat.apps.serve.gateway import FAILED, FrontSettings, Gateway
from heliostat.apps.serve.replica import Replica
from heliostat.apps.serve.requests import Body, Listed, Text
from heliostat.apps.serve.route import Answer, Route, seed
from heliostat.schema import Strict
from heliostat.web.refusals import Refusal

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
MOST_STOPS = 4
COMMON: dict[str, object] = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}}


class StreamOptions(Strict):
    """Holds the options of a stream. `include_usage`: whether the stream ends with the numbers of tokens."""

    include_usage: bool = False


class Sampled(Body):
    """Holds the parameters that completions and chats share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Text], Listed, Field(max_length=MOST_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def counts(self) -> bool:
        """Returns whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def ask(self, settings: FrontSettings, most: int | None, where: str = "max_tokens", prompts: int = 1) -> Ask:
        """Builds a request to the model. The request has no prompts yet, but a seed for each prompt.

        `most`: maximum new tokens; None means as many as fit. Raises Refusal if `most` is above the endpoint's limit. `where`:
        the parameter that sets `most`, for the error message.
        """
        if most is not None and most > settings.max_tokens:
            raise Refusal(
                400, f"{where}: {most} is above the limit. Set it to {settings.max_tokens} or less", where, "invalid_value"
            )
        first = seed(self.seed)
        seeds = [(first + i) % 2**63 for i in range(prompts)]
        adapter = self.model if self.model in settings.adapters else None
        return Ask(None, None, most, settings.max_tokens, self.temperature, self.top_p, seeds, self.stop, adapter=adapter)


S = TypeVar("S", bound=Sampled)


def usage(pieces: Sequence[AnswerPiece]) -> dict[str, int]:
    """Returns the sums of the pieces' prompt tokens and completion tokens."""
    prompt = sum(piece.get("prompt_tokens", 0) for piece in pieces)
    written = sum(piece.get("completion_tokens", 0) for piece in pieces)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class WritingRoute(Route[S, Ask]):
    """Answers requests with a language model. The response is a complete answer or a stream.

    `prefix`: prefix of the answers' ids. `kind`, `chunk`: the `object` field of a complete answer, and of a stream's chunk.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk: ClassVar[str]

    @abstractmethod
    def text(self, piece: AnswerPiece, streamed: bool) -> Answer:
        """Formats an answer's text and log probabilities. `streamed`: the piece is a chunk of a stream."""

    def pieces(self, replica: Replica, request: Ask) -> AsyncGenerator[Item]:
        """Yields pieces of the answers as the model generates them. Runs in the replica."""
        assert replica.writer
        return replica.writer.stream(request)

    async def answer(self, replica: Replica, request: Ask) -> Item:
        """Returns complete answers to all prompts as `answers`. If a question to the index was answered, returns the passages as
        `sources` too."""
        whole: list[AnswerPiece] = [{"text": "", "logprobs": None} for _ in request.seeds]
        sources: Item = {}
        async with aclosing(self.pieces(replica, request)) as items:
            async for item in items:
                _add(whole[item["index"]], item["piece"])
                sources |= {"sources": item["sources"]} if "sources" in item else {}
        return {"answers": whole, **sources}

    def shape(self, settings: FrontSettings, body: S, version: str, item: Item) -> Answer:
        pieces, sources = item["answers"], {"sources": item["sources"]} if "sources" in item else {}
        choices = [self._choice(index, piece, False) for index, piece in enumerate(pieces)]
        return {**self._head(body, version, self.kind), "choices": choices, "usage": usage(pieces), **sources}

    def _head(self, body: S, version: str, kind: str) -> Answer:
        """Returns the head of an answer: the fields before `choices`. All chunks of a stream have the same head. `version`: the
        model version that answered."""
        new = f"{self.prefix}-{secrets.token_hex(12)}"
        return {"id": new, "created": int(time.time()), "model": body.model, "system_fingerprint": version, "object": kind}

    def _choice(self, index: int, piece: AnswerPiece, streamed: bool) -> Answer:
        return {"index": index, "finish_reason": piece.get("finish"), **self.text(piece, streamed)}

    async def respond(self, gateway: Gateway, raw: bytes, key: str) -> Response:
        body = self.read(gateway.settings, raw)
        return await (self._stream if body.stream else self.whole)(gateway, body, key)

    async def _stream(self, gateway: Gateway, body: S, key: str) -> Response:
        """Streams the answer as server-sent events.

        The stream starts only after the first piece has arrived: until then, the HTTP status can still report an error.
        """
        request, began = self.request(gateway.settings, body), time.monotonic()
        items = gateway.stream(self.pieces, request)
        try:
            version, first = await anext(items)
        except BaseException:
            await items.aclose()
            raise
        head, last = self._head(body, version, self.chunk), list[AnswerPiece]()

        async def events() -> AsyncIterator[bytes]:
            try:
                item: Item | None = first
                while item is not None:
                    piece, sources = item["piece"], {"sources": item["sources"]} if "sources" in item else {}
                    yield event({**head, "choices": [self._choice(item["index"], piece, True)], **sources})
                    last.extend([piece] if "finish" in piece else [])
                    following = await anext(items, None)
                    item = following[1] if following else None
                if body.counts:
                    yield event({**head, "choices": [], "usage": usage(last)})
                yield DONE
            except Refusal as e:
                gateway.measures.broken.inc()
                yield event(e.body())
            except Exception:  # so that a failed stream never looks complete
                log.exception("a streamed answer ended before it was complete, because the endpoint failed")
                gateway.measures.broken.inc()
                yield event(FAILED.body())

        async def ended() -> None:
            gateway.limits.leave(key)
            gateway.measures.counted(key, usage(last))
            gateway.measures.seconds.labels(self.path).observe(time.monotonic() - began)
            await items.aclose()

        return Stream(events(), ended)


def event(data: Mapping[str, object]) -> bytes:
    """Formats an object as one server-sent event. The JSON is in one line, because a line break would end the event."""
    return b"data: " + json.dumps(data, ensure_ascii=True, separators=(",", ":")).encode() + b"\n\n"


class Stream(StreamingResponse):
    """Sends events as a response. Calls `ended` once after the last event, even if the client leaves before the first event."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.ended()


def _add(whole: AnswerPiece, piece: AnswerPiece) -> None:
    """Appends a piece to the answer so far, in place."""
    text, before, new = whole["text"] + piece["text"], whole["logprobs"], piece["logprobs"]
    if before and new:
        tops = None if before["top_logprobs"] is None else before["top_logprobs"] + (new["top_logprobs"] or [])
        new = {"tokens": before["tokens"] + new["tokens"], "token_logprobs": before["token_logprobs"] + new["token_logprobs"],
               "top_logprobs": tops, "text_offset": before["text_offset"] + new["text_offset"]}  # fmt: skip
    whole.update({**piece, "text": text, "logprobs": new or before})
