"""Reads the bodies of requests. The bodies contain parameters of OpenAI's API. The error for an unsupported parameter contains
the parameter's name.

An unsupported parameter is accepted if its value changes nothing (`n: 1`), and rejected with any other value.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from heliostat.schema import Strict
from heliostat.text import brief
from heliostat.web.refusals import Refusal

MOST_INPUTS = 64  # prompts or texts of one request
MOST_PASSAGES = 50


def whole(text: str) -> str:
    """Returns the text; raises ValueError if it contains half a character (a lone surrogate), which tokenizers reject."""
    text.encode()
    return text


Whole = Annotated[str, AfterValidator(whole)]
Mode = Literal["bm25", "dense", "hybrid"]  # search modes
Text = Annotated[str, Field(min_length=1)]
Listed = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)  # a single text becomes a list with one item


class Body(Strict):
    """Holds the parameters of a request. `neutral`: unsupported parameters, each with the value that changes nothing."""

    neutral: ClassVar[dict[str, object]] = {}
    user: str = ""


B = TypeVar("B", bound=Body)


def parse(raw: bytes) -> dict[str, object]:
    """Parses a body; raises Refusal if it isn't a JSON object."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise Refusal(400, f"the body isn't valid JSON: {brief(e)}", code="invalid_json") from e
    if not isinstance(body, dict):
        raise Refusal(400, "the body isn't a JSON object. Send the parameters as a JSON object", code="invalid_json")
    return body


def read(kind: type[B], raw: bytes) -> B:
    """Reads a request; raises Refusal, which names the wrong parameter. A parameter whose value is null counts as missing."""
    fields = {name: value for name, value in parse(raw).items() if value is not None}
    for name in [n for n in fields if n not in kind.model_fields]:
        _require_neutral(name, fields.pop(name), kind)
    if "stream_options" in fields and not fields.get("stream"):
        raise Refusal(400, "stream_options: needs stream: true. Set stream to true", "stream_options")
    try:
        return kind.model_validate(fields)
    except ValidationError as e:
        raise _first(e) from e


def _require_neutral(name: str, value: object, kind: type[Body]) -> None:
    shown = brief(name, 60)
    if name in kind.neutral:
        if value != kind.neutral[name]:
            fix = f"Remove this parameter, or set its value to {json.dumps(kind.neutral[name])}"
            raise Refusal(400, f"{shown}: {brief(json.dumps(value), 60)} isn't supported. {fix}", name, "unsupported_parameter")
        return
    near = difflib.get_close_matches(name, [*kind.model_fields, *kind.neutral], 1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    raise Refusal(400, f"{shown}: unknown parameter{hint}", shown, "unknown_parameter")


def _first(error: ValidationError) -> Refusal:
    fault = error.errors(include_url=False)[0]
    where = [str(part) for part in fault["loc"]]
    name = where[0] if where else "body"
    if fault["type"] == "missing":
        return Refusal(400, f"{'.'.join(where)}: required", name, "missing_required_parameter")
    if not where:  # several parameters together are invalid: the message names them
        said = fault["msg"].removeprefix("Value error, ")
        return Refusal(400, said, said.partition(":")[0], "invalid_value")
    value = brief(json.dumps(fault["input"], default=str), 60)
    said = "isn't text" if fault["type"] == "string_type" else fault["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    return Refusal(400, f"{'.'.join(where)}: {value}: {said}", name, "invalid_value")
