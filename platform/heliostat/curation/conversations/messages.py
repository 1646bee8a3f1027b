"""Checks the messages of a conversation, and converts them to the form of chat templates. All functions are pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from heliostat.recipes.text.chat import filled

ROLES = {"system", "developer", "user", "assistant", "tool"}
PARTS = ("text", "input_text", "output_text")  # types of a message's parts that are text
THOUGHTS = "reasoning_content"  # key of a message
WEIGHT = "weight"  # key of an answer: 0 if the model doesn't learn the answer
Message = dict[str, Any]


class FaultError(Exception):
    """Reports why a record can't become a row. `reason`: a key of `reading.REASONS`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ParsedConversation:
    """Holds a conversation: its messages in the form of chat templates, and JSON schemas of functions that the model may call.

    `trailing`: the number of messages after the last answer, which the conversation leaves out.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    trailing: int = 0

    @property
    def text(self) -> str:
        """Returns roles and contents as plain text, for the comparison of documents."""
        tools = [f"tools: {_json(self.tools)}"] if self.tools else []
        return "\n\n".join([*tools, *(f"{message['role']}: {_content(message)}" for message in self.messages)])

    @property
    def prompt(self) -> str:
        """Returns the beginning and the digest of the first message of the user. Conversations with the same prompt are held out
        together."""
        first = next((m for m in self.messages if m["role"] == "user"), self.messages[0])["content"]
        return f"{first[:60]} ({hashlib.sha256(first.encode()).hexdigest()})"

    def exchanges(self) -> tuple[list[Message], list[list[Message]]]:
        """Splits the messages before messages of the user. Returns the messages before the first exchange, which are the system
        prompt, and the exchanges. Each exchange has a message of the assistant."""
        first = next((n for n, message in enumerate(self.messages) if message["role"] not in ("system", "developer")), 0)
        exchanges: list[list[Message]] = [[]]
        for message in self.messages[first:]:
            if message["role"] == "user" and any(one["role"] == "assistant" for one in exchanges[-1]):
                exchanges.append([])
            exchanges[-1].append(message)
        return self.messages[:first], exchanges

    def strings(self) -> Iterator[str]:
        """Yields all texts that people or models wrote, including the arguments of calls."""
        for message in self.messages:
            yield message["content"]
            if others := {key: value for key, value in message.items() if key not in ("role", "content")}:
                yield _json(others)
        yield from map(_json, self.tools or ())


def _content(message: Message) -> str:
    calls = [f"{call['function']['name']}({_json(call['function']['arguments'])})" for call in message.get("tool_calls", ())]
    thoughts = [str(message[THOUGHTS])] if THOUGHTS in message else []
    return "\n".join([*thoughts, *([message["content"]] if message["content"] else []), *calls])


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def listed(value: object, name: str) -> list[Any]:
    """Returns a list that is given as a list, or as its JSON, such as in CSV. FaultError for another value."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise FaultError("invalid_messages", f"{name}: invalid JSON") from e
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise FaultError("invalid_messages", f"{name}: not a list of mappings")
    return value


def tools_of(value: object) -> list[dict[str, Any]] | None:
    """Returns the functions of a conversation; None if there are none."""
    return (listed(filled(value), "tools") or None) if value not in (None, "") else None


def parse(value: object, name: str = "messages") -> list[Message]:
    """Returns messages in the form of chat templates: `role`, `content` (a string), and maybe `tool_calls` and other keys, which
    stay as they are. FaultError for an invalid message."""
    return [_message(filled(raw), f"{name}.{number}") for number, raw in enumerate(listed(value, name))]


def _message(raw: dict[str, Any], where: str) -> Message:
    role = raw.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise FaultError("unknown_role", f"{where}: {str(role)[:40]!r}")
    if role == "assistant" and raw.get(WEIGHT, 1) not in (0, 1):
        raise FaultError("invalid_messages", f"{where}.{WEIGHT}: neither 0 nor 1")
    message: Message = {**raw, "content": _text(raw.get("content", ""), where)}
    if calls := message.pop("tool_calls", None):
        if role != "assistant":
            raise FaultError("invalid_tool_call", f"{where}: a call by the role {role}")
        message["tool_calls"] = [_call(call, where) for call in listed(calls, f"{where}.tool_calls")]
    if not message["content"].strip() and "tool_calls" not in message:
        raise FaultError("empty_turn", where)
    return message


def _text(content: object, where: str) -> str:
    """Returns a message's content, a string or a list of parts, as a string."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FaultError("invalid_messages", f"{where}: the content isn't text")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") in PARTS else part for part in content]
    if others := [text for text in texts if not isinstance(text, str)]:
        raise FaultError("invalid_messages", f"{where}: {len(others)} parts of the content aren't text")
    return "".join(map(str, texts))


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)  # some sets leave out the level `function`
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise FaultError("invalid_tool_call", f"{where}: a call without the name of a function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as e:
            raise FaultError("invalid_tool_call", f"{where}: the arguments of {function['name']} are invalid JSON") from e
    if not isinstance(arguments, dict):
        raise FaultError("invalid_tool_call", f"{where}: the arguments of {function['name']} aren't a mapping")
    id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
