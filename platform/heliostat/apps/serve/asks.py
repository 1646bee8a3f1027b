"""Defines what the front asks of a replica, what a replica holds, and the kinds of models: that write, draw, or embed texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.recipes.images import clip_folder
from heliostat.recipes.protocol import Paints
from heliostat.recipes.text import sentence_folder

TEXT, IMAGES, EMBEDDINGS = "text", "images", "embeddings"
UNFINISHED = "\ufffd"  # what a decoder puts for the first bytes of a character

Messages = list[dict[str, str]]
Item = dict[str, Any]  # of a replica's answer: `answers`, `piece` with its `index`, `images`, `passages`, or `refused`


@dataclass(frozen=True)
class Holds:
    """Says what a replica loads: a model's folder, an index, or both. `batch`: prompts that are stepped together; `adapters`: the
    folders of the model's adapters, by name; `engine`: what writes, transformers or vllm."""

    model: str | None
    batch: int = 16
    index: str | None = None
    embedder: str | None = None
    reranker: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    engine: str = "transformers"


@dataclass(frozen=True)
class Search:
    """Holds a question to an index. `mode`: how it is searched, None for words."""

    question: str
    top: int
    mode: str | None = None


@dataclass(frozen=True)
class Ask:
    """Holds what a language model is asked: prompts (texts, or tokens), a chat's messages, or a question to an index.

    The i-th prompt has the i-th seed. `most`: new tokens, None for as many as there is room for up to `limit`; `adapter`: which
    answers, None for the model as it is.
    """

    prompts: list[str | list[int]] | None
    messages: Messages | None
    most: int | None
    limit: int
    temperature: float
    top_p: float
    seeds: list[int]
    stops: list[str]
    logprobs: int | None = None
    suffix: str = ""
    search: Search | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class PictureRequest:
    """Holds what a model is asked to draw: `count` pictures, the i-th with seed + i; `options` stand for the model's own."""

    prompt: str
    count: int
    seed: int
    options: dict[str, Any]


class Logprobs(TypedDict):
    """Holds the log probabilities of tokens, in OpenAI's columns."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class AnswerPiece(TypedDict):
    """Holds a piece of an answer; the last one has how it ended, and the numbers of tokens."""

    text: str
    logprobs: Logprobs | None
    finish: NotRequired[str]
    prompt_tokens: NotRequired[int]
    completion_tokens: NotRequired[int]


def kind_of(folder: Path) -> str:
    """Returns a model's kind; ConfigError if it is of none that is served."""
    if sentence_folder.embeds(folder) or clip_folder.is_one(folder):
        return EMBEDDINGS
    recipe = exported.read(folder).recipe
    if getattr(recipe, "kind", None) == "tokens":
        return TEXT
    if issubclass(recipe, Paints):
        return IMAGES
    raise ConfigError(
        f"{folder}: a model of {recipe.__name__} can't be served: it generates no text or images, and embeds no texts"
    )
