"""Answers `/v1/chat/completions`: continues a chat, or answers a question from the index."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from heliostat.apps.serve import requests
from heliostat.apps.serve.asks import TEXT, UNFINISHED, AnswerPiece, Ask, Item, Logprobs, Search
from heliostat.apps.serve.gateway import FrontSettings
from heliostat.apps.serve.replica import Replica
from heliostat.apps.serve.requests import MOST_PASSAGES, Mode, whole
from heliostat.apps.serve.route import Answer
from heliostat.apps.serve.writing import COMMON, Sampled, WritingRoute
from heliostat.inference.sampling import MOST_LOGPROBS
from heliostat.recipes.text.chat import Message
from heliostat.web.refusals import Refusal

ANSWER_TOKENS = 128  # default maximum tokens of an answer from the index


class ChatRequest(Sampled):
    """Holds a request to answer a chat."""

    neutral = {
        **COMMON, "tools": [], "tool_choice": "none", "functions": [], "function_call": "none",
        "parallel_tool_calls": True, "response_format": {"type": "text"}, "modalities": ["text"], "audio": {}, "prediction": {},
        "reasoning_effort": "none", "store": False, "metadata": {}, "service_tier": "auto", "web_search_options": {},
    }  # fmt: skip
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true. Set logprobs to true")
        return self

    @property
    def top_count(self) -> int | None:
        """Returns the number of likeliest tokens to list for each token of the answer; None means no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _plain(messages: list[Message]) -> list[Message]:
    for message in messages:
        whole(message.plain()["content"])
    return messages


class Question(ChatRequest):
    """Holds a question to answer from an index. The default temperature is 0."""

    messages: Annotated[list[Message], AfterValidator(_plain)] = Field(min_length=1, max_length=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top: int = Field(5, ge=1, le=MOST_PASSAGES)
    mode: Mode | None = None


def of_chat(columns: Logprobs | None) -> Answer | None:
    """Converts log probabilities to the chat format: a list of tokens, each with its likeliest alternatives, best first."""
    if columns is None:
        return None
    tops = columns["top_logprobs"] or [{} for _ in columns["tokens"]]
    content = [
        {**_of_token(token, value), "top_logprobs": [_of_token(*one) for one in sorted(best.items(), key=lambda pair: -pair[1])]}
        for token, value, best in zip(columns["tokens"], columns["token_logprobs"], tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def _of_token(token: str, value: float) -> Answer:
    """Describes a token. `bytes` is None if the token is only a part of a character, because then the token's bytes can't be
    derived from the text."""
    return {"token": token, "logprob": value, "bytes": None if UNFINISHED in token else list(token.encode())}


class ChatRoute(WritingRoute[ChatRequest]):
    """Answers chats. If `model` names the index, the request is a `Question`."""

    path, body = "/v1/chat/completions", ChatRequest
    prefix, kind, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def read(self, settings: FrontSettings, raw: bytes) -> ChatRequest:
        of_index = settings.index is not None and requests.parse(raw).get("model") == settings.index
        return requests.read(Question if of_index else ChatRequest, raw)

    def request(self, settings: FrontSettings, body: ChatRequest) -> Ask:
        if not isinstance(body, Question):
            settings.require_model(body.model, TEXT)
        elif settings.kind != TEXT:
            raise Refusal(
                400,
                f"model: {body.model!r} is an index, and the endpoint has no model that answers from this "
                "index. Send the request to /v1/search",
                "model",
                "unsupported_by_model",
            )
        elif body.messages[0].role != "user":
            raise Refusal(
                400, "messages.0.role: expected exactly one message, a question from the user", "messages", "invalid_value"
            )
        most, where = body.max_tokens, "max_tokens"
        if body.max_completion_tokens is not None:
            most, where = body.max_completion_tokens, "max_completion_tokens"
        messages = [message.plain() for message in body.messages]
        if not isinstance(body, Question):
            return dataclasses.replace(body.ask(settings, most, where), messages=messages, logprobs=body.top_count)
        ask = body.ask(settings, min(ANSWER_TOKENS, settings.max_tokens) if most is None else most, where)
        return dataclasses.replace(ask, logprobs=body.top_count, search=Search(messages[0]["content"], body.top, body.mode))

    async def pieces(self, replica: Replica, request: Ask) -> AsyncGenerator[Item]:
        first: Item = {}
        if request.search is not None:
            assert replica.shelf
            assert replica.writer
            prompt, sources = await replica.shelf.prompt(request.search, replica.writer.room(request), replica.writer.count)
            request, first = dataclasses.replace(request, prompts=[prompt], search=None), {"sources": sources}
        async with aclosing(super().pieces(replica, request)) as items:
            async for item in items:
                yield {**item, **first}
                first = {}

    def text(self, piece: AnswerPiece, streamed: bool) -> Answer:
        message = {"role": "assistant", "content": piece["text"]}
        return {"delta" if streamed else "message": message, "logprobs": of_chat(piece.get("logprobs"))}
