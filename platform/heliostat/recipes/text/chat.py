"""Reads a chat's messages, and converts these messages to tokens with the chat template of the model's tokenizer.

The template comes from the model's author, and transformers runs it in a sandbox.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from heliostat.errors import ConfigError
from heliostat.schema import Strict
from heliostat.text import brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Parts = BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value)


class TextPart(Strict):
    """Describes a part of a message. Only text is supported."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """Describes a message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], Parts]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Returns the message in the form of chat templates."""
        return {"role": self.role, "content": "".join(part.text for part in self.content)} | (
            {"name": self.name} if self.name else {}
        )


MESSAGES = TypeAdapter(Annotated[list[Message], Field(min_length=1)])


def read(text: str) -> list[dict[str, str]]:
    """Reads messages from JSON, in the form of chat templates. Raises ConfigError, which names the problem."""
    try:
        messages = filled(json.loads(text))
    except (ValueError, RecursionError) as e:
        raise ConfigError("isn't a JSON list of messages") from e
    try:
        return [message.plain() for message in MESSAGES.validate_python(messages)]
    except ValidationError as e:
        fault = e.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise ConfigError(f"{where + ': ' if where else ''}{brief(fault['msg'])}") from e


def filled(value: Any) -> Any:
    """Removes keys with the value null, including keys inside the parts of messages, because a table's rows have all columns."""
    if isinstance(value, dict):
        return {k: filled(v) for k, v in value.items() if v is not None}
    return [filled(one) for one in value] if isinstance(value, list) else value


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Returns the tokens of a chat, up to the start of the answer. Raises ConfigError if the template or the tokenizer rejects
    the messages."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as e:  # templates raise any error; the tokenizer fails for half a character (a lone surrogate)
        raise ConfigError(f"the model's chat template or tokenizer rejects the messages: {brief(e, 200)}") from e
