"""Shares what the routes of a language model have in common: sampling, answers all at once, and streams."""

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
    """Says what a stream carries in addition to the text."""

    include_usage: bool = False


class Sampled(Body):
    """Holds what completions and chat have in common."""

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
        """Tells whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def ask(self, settings: FrontSettings, most: int | None, where: str = "max_tokens", prompts: int = 1) -> Ask:
        """Returns what every request asks of the model, with a seed for each prompt; Refusal of more tokens than are given.

        `most`: new tokens, None for as many as there is room for; `where`: the parameter that they are from.
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
    """Adds up the tokens of prompts and answers."""
    prompt = sum(piece.get("prompt_tokens", 0) for piece in pieces)
    written = sum(piece.get("completion_tokens", 0) for piece in pieces)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class WritingRoute(Route[S, Ask]):
    """Answers with a language model, all at once or as a stream.

    `prefix`: of the answers' ids; `kind`, `chunk`: how an answer, and a piece of a stream, is called.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk: ClassVar[str]

    @abstractmethod
    def text(self, piece: AnswerPiece, streamed: bool) -> Answer:
        """Writes the text of an answer, or of its next piece, and the logprobs."""

    def pieces(self, replica: Replica, request: Ask) -> AsyncGenerator[Item]:
        """Yields pieces of the answers as they come, in the replica."""
        assert replica.writer
        return replica.writer.stream(request)

    async def answer(self, replica: Replica, request: Ask) -> Item:
        """Answers all prompts: `answers`, and `sources` if it is from the index."""
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
        """Writes what an answer begins with; all chunks of a stream have one. `version`: of the model that answered."""
        new = f"{self.prefix}-{secrets.token_hex(12)}"
        return {"id": new, "created": int(time.time()), "model": body.model, "system_fingerprint": version, "object": kind}

    def _choice(self, index: int, piece: AnswerPiece, streamed: bool) -> Answer:
        return {"index": index, "finish_reason": piece.get("finish"), **self.text(piece, streamed)}

    async def respond(self, gateway: Gateway, raw: bytes, key: str) -> Response:
        body = self.read(gateway.settings, raw)
        return await (self._stream if body.stream else self.whole)(gateway, body, key)

    async def _stream(self, gateway: Gateway, body: S, key: str) -> Response:
        """Waits for the first piece, since until then the status can still show an error."""
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
            except Exception:  # never an end that looks like one
                log.exception("a stream ended early")
                gateway.measures.broken.inc()
                yield event(FAILED.body())

        async def ended() -> None:
            gateway.limits.leave(key)
            gateway.measures.counted(key, usage(last))
            gateway.measures.seconds.labels(self.path).observe(time.monotonic() - began)
            await items.aclose()

        return Stream(events(), ended)


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


def _add(whole: AnswerPiece, piece: AnswerPiece) -> None:
    """Adds a piece to what came before it."""
    text, before, new = whole["text"] + piece["text"], whole["logprobs"], piece["logprobs"]
    if before and new:
        tops = None if before["top_logprobs"] is None else before["top_logprobs"] + (new["top_logprobs"] or [])
        new = {"tokens": before["tokens"] + new["tokens"], "token_logprobs": before["token_logprobs"] + new["token_logprobs"],
               "top_logprobs": tops, "text_offset": before["text_offset"] + new["text_offset"]}  # fmt: skip
    whole.update({**piece, "text": text, "logprobs": new or before})
