"""Answers `/v1/completions`: continues prompts, or fills in the text between each prompt and a suffix."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import BeforeValidator, Field

from heliostat.apps.serve.asks import TEXT, AnswerPiece, Ask
from heliostat.apps.serve.gateway import FrontSettings
from heliostat.apps.serve.requests import MOST_INPUTS, Whole, whole
from heliostat.apps.serve.route import Answer
from heliostat.apps.serve.writing import COMMON, Sampled, WritingRoute

PROMPTS = "isn't a text, a list of tokens, or a list of texts or token lists"
DEFAULT_TOKENS = 16  # OpenAI's default


def _prompts(prompt: object) -> list[object]:
    """Returns a list of prompts. A single text, or a single list of token ids, becomes a list with one item. Raises ValueError
    for any other form."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_token(prompt[0])):
        prompt = [prompt]
    if not isinstance(prompt, list):
        raise ValueError(PROMPTS)
    for one in prompt:
        if not (isinstance(one, str) or (isinstance(one, list) and one and all(_is_token(token) for token in one))):
            raise ValueError(PROMPTS)
        if isinstance(one, str):
            whole(one)
    return prompt


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class Completion(Sampled):
    """Holds a request to continue prompts, or to fill in the text between each prompt and a suffix."""

    neutral = {**COMMON, "best_of": 1, "echo": False}
    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts), Field(min_length=1, max_length=MOST_INPUTS)]
    """Texts, or lists of token ids."""
    suffix: Whole = ""
    logprobs: int | None = Field(None, ge=0, le=5)


class CompletionsRoute(WritingRoute[Completion]):
    """Answers requests for completions: choices with text, one per prompt."""

    path, body = "/v1/completions", Completion
    prefix, kind, chunk = "cmpl", "text_completion", "text_completion"

    def request(self, settings: FrontSettings, body: Completion) -> Ask:
        settings.require_model(body.model, TEXT)
        most = min(DEFAULT_TOKENS, settings.max_tokens) if body.max_tokens is None else body.max_tokens
        ask = body.ask(settings, most, prompts=len(body.prompt))
        return dataclasses.replace(ask, prompts=body.prompt, logprobs=body.logprobs, suffix=body.suffix)

    def text(self, piece: AnswerPiece, streamed: bool) -> Answer:
        return {"text": piece["text"], "logprobs": piece.get("logprobs")}
