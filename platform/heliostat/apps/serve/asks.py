"""Defines the HTTP server's requests to a replica, the contents of a replica, and the kinds of models.

A model generates text, generates images, or embeds texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.recipes.conformance import is_language_model
from heliostat.recipes.images import clip_folder
from heliostat.recipes.protocol import Paints
from heliostat.recipes.text import sentence_folder

TEXT, IMAGES, EMBEDDINGS = "text", "images", "embeddings"
UNFINISHED = "\ufffd"  # a decoder returns this for the bytes of an incomplete character

Messages = list[dict[str, str]]
Item = dict[str, Any]  # part of a replica's answer; its keys: `answers`, `piece` and `index`, `images`, `passages`, or `refused`


@dataclass(frozen=True)
class Holds:
    """Describes the contents of a replica: a model's folder, an index, or both.

    `batch`: number of prompts that are computed together. `adapters`: folders of the model's adapters, by name. `engine`: the
    engine that generates text, transformers or vllm.
    """

    model: str | None
    batch: int = 16
    index: str | None = None
    embedder: str | None = None
    reranker: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    engine: str = "transformers"


@dataclass(frozen=True)
class Search:
    """Holds a question to search for in an index. `top`: maximum number of passages. `mode`: search mode; None means `bm25`."""

    question: str
    top: int
    mode: str | None = None


@dataclass(frozen=True)
class Ask:
    """Holds a request to a language model: prompts (texts, or token ids), a chat's messages, or a question to an index.

    The i-th prompt uses the i-th seed. `most`: maximum new tokens; None means as many as fit, up to `limit`. `adapter`: name of
    the adapter to use; None means the model without an adapter.
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
    """Holds a request for `count` images. The i-th image has seed + i. `options` replace the model's default options."""

    prompt: str
    count: int
    seed: int
    options: dict[str, Any]


class Logprobs(TypedDict):
    """Holds the log probabilities of tokens, in the format of OpenAI's API."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class AnswerPiece(TypedDict):
    """Holds a piece of an answer. Only the last piece has the finish reason and the numbers of tokens."""

    text: str
    logprobs: Logprobs | None
    finish: NotRequired[str]
    prompt_tokens: NotRequired[int]
    completion_tokens: NotRequired[int]


def kind_of(folder: Path) -> str:
    """Returns a model's kind; raises ConfigError if this kind of model can't be served."""
    if sentence_folder.embeds(folder) or clip_folder.is_one(folder):
        return EMBEDDINGS
    recipe = exported.read(folder).recipe
    if is_language_model(recipe):
        return TEXT
    if issubclass(recipe, Paints):
        return IMAGES
    raise ConfigError(
        f"{folder}: a model of {recipe.__name__} can't be served. Pass a model that generates text or images, or embeds texts"
    )
