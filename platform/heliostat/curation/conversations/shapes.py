"""Converts records of the usual shapes to conversations and to preferences. All functions are pure.

messages      {"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}
completion    {"prompt": ..., "completion": ...}, both strings or both lists of messages
alpaca        {"instruction": ..., "input": ..., "output": ...}
sharegpt      {"conversations": [{"from": "human", "value": ...}, ...]}
pairs         {"prompt": ..., "chosen": ..., "rejected": ...}, strings or lists of messages
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from heliostat.curation.conversations import messages
from heliostat.curation.conversations.messages import FaultError, Message, ParsedConversation

Shape = Literal["auto", "messages", "completion", "alpaca", "sharegpt"]
NEEDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}
PAIRS = {"pairs": ("chosen", "rejected")}
COLUMNS = {*(name for names in (NEEDS | PAIRS).values() for name in names), "input", "prompt", "system", "tools"}
# roles of ShareGPT, by the names that its sets use
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


@dataclass(frozen=True)
class ParsedPreference:
    """Holds a prompt with two answers, each one message of the assistant."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """Returns roles and contents as plain text, for the comparison of documents."""
        answers = (ParsedConversation([one]).text.partition(": ")[2] for one in (self.chosen, self.rejected))
        return "\n\n".join([self.with_answer(None).text, *map(": ".join, zip(("chosen", "rejected"), answers, strict=True))])

    def with_answer(self, answer: Message | None) -> ParsedConversation:
        return ParsedConversation([*self.prompt, *([answer] if answer else [])], self.tools)


def missing(names: Collection[str], shape: str, shapes: Mapping[str, tuple[str, ...]] = NEEDS) -> str:
    """Explains which columns a table lacks for the shape, and the fix; "" if it has the columns of a shape."""
    wanted = shapes if shape == "auto" else {shape: shapes[shape]}
    if any(set(columns) <= set(names) for columns in wanted.values()):
        return ""
    needs = ", or ".join(" and ".join(columns) for columns in wanted.values())
    others = {**dict.fromkeys(PAIRS, "PreferencePipeline"), **dict.fromkeys(NEEDS, "ConversationPipeline")}
    pipeline = next((others[name] for name, columns in (NEEDS | PAIRS).items()
                     if name not in shapes and set(columns) <= set(names)), None)  # fmt: skip
    fix = f"Prepare it with heliostat.pipelines:{pipeline}" if pipeline else "Set `columns`, or exclude the file"
    return f"has the columns {', '.join(names)}, but needs {needs}. {fix}"


def function(question: str, answer: str) -> ParsedConversation:
    """Makes a conversation of the first sentence of a function's docstring, and the function without the docstring."""
    prompt, code = f"Write a Python function. Its docstring: {question}", f"```python\n{textwrap.dedent(answer).rstrip()}\n```"
    return ParsedConversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": code}])


def better(chosen: ParsedConversation, rejected: ParsedConversation) -> ParsedPreference:
    """Makes a preference of two conversations that differ only in the last message, the answer."""
    return ParsedPreference(chosen.messages[:-1], chosen.messages[-1], rejected.messages[-1], chosen.tools)


def shape_of(record: Mapping[str, Any]) -> str:
    """Returns the only shape whose columns the record has. FaultError if the record has those of none, or of several."""
    shapes = [name for name, columns in NEEDS.items() if all(record.get(column) is not None for column in columns)]
    if len(shapes) != 1:
        reason, which = ("several_shapes", " and ".join(shapes)) if shapes else ("no_shape", ", ".join(sorted(record))[:200])
        raise FaultError(reason, which)
    return shapes[0]


def conversation(record: Mapping[str, Any], shape: str) -> ParsedConversation:
    """Converts a record to a conversation that ends with a turn of the assistant. FaultError if this isn't possible.

    `shape`: a key of NEEDS, or "auto".
    """
    name = shape_of(record) if shape == "auto" else shape
    if absent := [column for column in NEEDS[name] if record.get(column) is None]:
        raise FaultError("no_shape", f"without {', '.join(absent)}")
    turns = {"messages": _messages, "completion": _completion, "alpaca": _alpaca, "sharegpt": _sharegpt}[name](record)
    answers = [number for number, message in enumerate(turns) if message["role"] == "assistant"]
    if not answers:
        raise FaultError("no_answer")
    end = answers[-1] + 1
    return ParsedConversation(turns[:end], messages.tools_of(record.get("tools")), len(turns) - end)


def _messages(record: Mapping[str, Any]) -> list[Message]:
    return messages.parse(record["messages"])


def _system(record: Mapping[str, Any]) -> list[Message]:
    text = record.get("system") or ""
    if not isinstance(text, str):
        raise FaultError("invalid_messages", "system: not a string")
    return [{"role": "system", "content": text}] if text.strip() else []


def _completion(record: Mapping[str, Any]) -> list[Message]:
    return [*_system(record), *_turns(record["prompt"], "user", "prompt"),
            *_turns(record["completion"], "assistant", "completion")]  # fmt: skip


def _turns(value: object, role: str, name: str) -> list[Message]:
    """Returns messages that are given as a list, as the JSON of a list, or as the text of one turn."""
    if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[{")):
        try:
            return messages.parse(value, name)
        except FaultError:
            if isinstance(value, list):
                raise
    if not isinstance(value, str):
        raise FaultError("invalid_messages", f"{name}: neither text nor a list of messages")
    return messages.parse([{"role": role, "content": value}], name)


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    *texts, output = record["instruction"], record.get("input") or "", record["output"]
    if not all(isinstance(text, str) for text in (*texts, output)):
        raise FaultError("invalid_messages", "instruction, input, or output: not a string")
    prompt = "\n\n".join(text for text in texts if text.strip())
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": output}]
    return [*_system(record), *messages.parse(turns, "alpaca")]


def _sharegpt(record: Mapping[str, Any]) -> list[Message]:
    turns = list[Any]()
    for number, raw in enumerate(messages.listed(record["conversations"], "conversations")):
        speaker = raw.get("from", raw.get("role"))
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise FaultError("unknown_role", f"conversations.{number}: {str(speaker)[:40]!r}")
        content = raw.get("value", raw.get("content", ""))
        turns.append({"role": SPEAKERS[speaker], "content": content, messages.WEIGHT: raw.get(messages.WEIGHT)})
    return [*_system(record), *messages.parse(turns, "conversations")]


def _joined(prompt: list[Message], begin: list[Message]) -> list[Message]:
    """Joins a prompt and the common beginning of the answers, which repeats the prompt's last messages in some sets. Raises
    FaultError if the beginning is another prompt."""
    if any(_stripped(begin[n : n + len(prompt)]) == _stripped(prompt) for n in range(len(begin))):
        return begin
    repeated = next((n for n in range(len(prompt)) if _stripped(prompt[n:]) == _stripped(begin[: len(prompt) - n])), len(prompt))
    if prompt and begin and repeated == len(prompt) and begin[0]["role"] in ("system", prompt[-1]["role"]):
        raise FaultError("other_prompt", "the conversations don't begin with the prompt")
    return [*prompt[:repeated], *begin]


def _stripped(turns: list[Message]) -> list[Message]:
    return [{**turn, "content": turn["content"].strip()} for turn in turns]


def preference(record: Mapping[str, Any]) -> ParsedPreference:
    """Converts a record to a preference. If the record has no `prompt`, the prompt is the common beginning of both
    conversations. FaultError if this isn't possible."""
    if absent := [column for column in PAIRS["pairs"] if record.get(column) is None]:
        raise FaultError("no_shape", f"without {', '.join(absent)}")
    tools, question = messages.tools_of(record.get("tools")), record.get("prompt")
    prompt = [*_system(record), *(_turns(question, "user", "prompt") if question is not None else [])]
    chosen, rejected = (_turns(record[name], "assistant", name) for name in PAIRS["pairs"])
    if chosen == rejected:
        raise FaultError("same_answers")
    shared = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    begin = chosen[:shared]
    prompt = _joined(prompt, begin)
    answers = [chosen[shared:], rejected[shared:]]
    if all(one and one[0]["role"] != "assistant" for one in answers):
        raise FaultError("other_prompt", "the conversations have different prompts")
    if any(len(one) != 1 or one[0]["role"] != "assistant" for one in answers):
        raise FaultError("several_turns", "the conversations differ in more than the last turn of the assistant")
    if not prompt:
        raise FaultError("no_prompt")
    return ParsedPreference(prompt, answers[0][0], answers[1][0], tools)
