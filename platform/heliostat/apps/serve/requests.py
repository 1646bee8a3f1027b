"""Reads the bodies of requests: what OpenAI's API defines and this endpoint does, and a refusal by name for everything else.

A parameter that is not supported is accepted with the value that changes nothing (`n: 1`), and refused with any other.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from heliostat.inference.sampling import MOST_LOGPROBS
from heliostat.recipes.text.chat import Message
from heliostat.schema import Float, Strict
from heliostat.text import brief
from heliostat.web.refusals import Refusal

MOST_INPUTS = 64  # prompts or texts of one request
MOST_STOPS = 4
COMMON: dict[str, object] = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}}
MOST_IMAGES = 10  # of one request, as OpenAI has it
MOST_STEPS = 1000
MOST_PASSAGES = 50

PROMPTS = "is no text, no list of tokens, and no list of these"


def _whole(text: str) -> str:
    """Returns a text; ValueError if it has half a character (a lone surrogate), which no tokenizer takes."""
    text.encode()
    return text


Whole = Annotated[str, AfterValidator(_whole)]
Text = Annotated[str, Field(min_length=1)]
Listed = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)  # one text stands for a list of it


class Body(Strict):
    """Holds the parameters of a request. `neutral`: parameters that are not supported, with the value that changes nothing."""

    neutral: ClassVar[dict[str, object]] = {}
    user: str = ""


B = TypeVar("B", bound=Body)


class StreamOptions(Strict):
    """Says what a stream carries beside the text."""

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


def _prompts(given: object) -> list[str | list[int]]:
    """Lists prompts: a text or a list of tokens stands for a list of it."""
    if isinstance(given, str) or (isinstance(given, list) and given and _is_token(given[0])):
        given = [given]
    if not isinstance(given, list):
        raise ValueError(PROMPTS)
    for one in given:
        if not (isinstance(one, str) or (isinstance(one, list) and one and all(_is_token(token) for token in one))):
            raise ValueError(PROMPTS)
        if isinstance(one, str):
            _whole(one)
    return given


def _is_token(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0


class Completion(Sampled):
    """Describes a request to continue prompts, or to fill in what stands between each of them and a suffix."""

    neutral = {**COMMON, "best_of": 1, "echo": False}
    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts), Field(min_length=1, max_length=MOST_INPUTS)]
    """Texts, or lists of tokens."""
    suffix: Whole = ""
    logprobs: int | None = Field(None, ge=0, le=5)


class ChatRequest(Sampled):
    """Describes a request to answer a chat."""

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
            raise ValueError("top_logprobs: goes with logprobs: true")
        return self

    @property
    def told(self) -> int | None:
        """Returns how many tokens' logprobs are told beside each that is chosen; None: none of any."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Embeddings(Body):
    """Describes a request to embed texts."""

    neutral = {"dimensions": None}
    model: str
    input: Annotated[list[Text], Listed, Field(min_length=1, max_length=MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"


def _asked(messages: list[Message]) -> list[Message]:
    for message in messages:
        _whole(message.plain()["content"])
    return messages


class Question(ChatRequest):
    """Describes a question that is answered from an index, with the likeliest words unless a temperature is given."""

    messages: Annotated[list[Message], AfterValidator(_asked)] = Field(min_length=1, max_length=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top: int = Field(5, ge=1, le=MOST_PASSAGES)
    mode: Literal["bm25", "dense", "hybrid"] | None = None


class SearchRequest(Body):
    """Describes a search for passages."""

    model: str | None = None
    query: Text
    top: int = Field(5, ge=1, le=MOST_PASSAGES)
    mode: Literal["bm25", "dense", "hybrid"] | None = None


class Images(Body):
    """Describes pictures to draw; what is left out is the model's own. `steps`, `guidance`, `sampler` and `seed` are ours."""

    neutral = {
        "quality": "auto", "style": "natural", "background": "auto", "moderation": "auto", "output_format": "png",
        "stream": False, "output_compression": 100, "partial_images": 0,
    }  # fmt: skip
    model: str
    prompt: Whole
    n: int = Field(1, ge=1, le=MOST_IMAGES)
    size: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    response_format: Literal["b64_json"] = "b64_json"
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    guidance: Float | None = Field(None, ge=0)
    sampler: Literal["ddpm", "ddim", "dpm++", "euler"] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Returns those options of the drawing that are given."""
        given = {name: getattr(self, name) for name in ("steps", "guidance", "sampler")}
        if self.size != "auto":
            given["width"], given["height"] = map(int, self.size.split("x"))
        return {name: value for name, value in given.items() if value is not None}


def _object(raw: bytes) -> dict[str, object]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise Refusal(400, f"the body is no JSON: {brief(e)}", code="invalid_json") from e
    if not isinstance(body, dict):
        raise Refusal(400, "the body is no JSON object", code="invalid_json")
    return body


def chat(raw: bytes, index: str | None) -> ChatRequest:
    """Reads a request of /v1/chat/completions, a Question if its model is the index; Refusal that names what is at fault."""
    asked = _object(raw).get("model")
    return read(Question if index is not None and asked == index else ChatRequest, raw)


def read(kind: type[B], raw: bytes) -> B:
    """Reads a request; Refusal that names the parameter at fault."""
    given = {name: value for name, value in _object(raw).items() if value is not None}
    for name in [n for n in given if n not in kind.model_fields]:
        _require_neutral(name, given.pop(name), kind)
    if "stream_options" in given and not given.get("stream"):
        raise Refusal(400, "stream_options: goes with stream: true", "stream_options")
    try:
        return kind.model_validate(given)
    except ValidationError as e:
        raise _first(e) from e


def _require_neutral(name: str, value: object, kind: type[Body]) -> None:
    shown = brief(name, 60)
    if name in kind.neutral:
        if value != kind.neutral[name]:
            fix = f"leave it out, or give {json.dumps(kind.neutral[name])}"
            raise Refusal(400, f"{shown}: {brief(json.dumps(value), 60)} is not supported; {fix}", name, "unsupported_parameter")
        return
    near = difflib.get_close_matches(name, [*kind.model_fields, *kind.neutral], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise Refusal(400, f"{shown}: unknown parameter{hint}", shown, "unknown_parameter")


def _first(error: ValidationError) -> Refusal:
    fault = error.errors(include_url=False)[0]
    where = [str(part) for part in fault["loc"]]
    name = where[0] if where else "body"
    if fault["type"] == "missing":
        return Refusal(400, f"{'.'.join(where)}: is missing", name, "missing_required_parameter")
    if not where:  # of several parameters together: it says their names
        said = fault["msg"].removeprefix("Value error, ")
        return Refusal(400, said, said.partition(":")[0], "invalid_value")
    value = brief(json.dumps(fault["input"], default=str), 60)
    said = "is not text" if fault["type"] == "string_type" else fault["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    return Refusal(400, f"{'.'.join(where)}: {value}: {said}", name, "invalid_value")
