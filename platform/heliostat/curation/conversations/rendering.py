"""Renders conversations with a chat template, and marks the tokens that the model learns to predict.

For each turn of the assistant that is trained, the template renders the messages before it with the start of the answer. The text
of the whole conversation must begin with this prompt. The answer is the text from there to the token that ends the turn. The
answer's text must be the same without the messages after it, as at inference. Each segment is tokenized by itself, so that an
answer begins after the same tokens as at inference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash
from tokenizers import Tokenizer

from heliostat.curation.conversations import templates
from heliostat.curation.conversations.messages import WEIGHT, FaultError, Message, ParsedConversation
from heliostat.curation.conversations.shapes import ParsedPreference
from heliostat.errors import ConfigError
from heliostat.text import brief

VERSION = 1  # increase it when the same conversations give different tokens
Turns = Literal["all", "each", "last"]
QUESTION, ANSWER = "Which word comes first?", "The first word."  # a conversation that finds the end of turns
# functions of the date would make a dataset depend on the day; Meta's templates have this date as a default
DATE = """{% macro strftime_now(form) %}{{ {"%d %b %Y": "26 Jul 2024", "%Y-%m-%d": "2024-07-26"}[form] or "26 July 2024" }}\
{% endmacro %}
"""


class AnswerSpan(NamedTuple):
    """Locates an answer in a text. `stop`: after the token that ends the turn, if there is one (`ended`)."""

    start: int
    stop: int
    ended: bool


class Turn(NamedTuple):
    """Locates a trained turn in the tokens of a conversation. `ended`: whether the token that ends the turn is trained."""

    start: int
    stop: int
    ended: bool


class Rendered(NamedTuple):
    """Contains the tokens of a conversation. `tokens`: int32 [n]. `trained`: bool [n], whether the model learns a token.
    `retokenized`: whether the whole text has other tokens than its segments."""

    tokens: np.ndarray
    trained: np.ndarray
    turns: tuple[Turn, ...]
    retokenized: bool

    def cut(self, count: int) -> Rendered:
        """Returns the first `count` tokens."""
        turns = tuple(turn for turn in self.turns if turn.start < count)
        turns = tuple(turn if turn.stop <= count else Turn(turn.start, count, False) for turn in turns)
        return Rendered(self.tokens[:count], self.trained[:count], turns, self.retokenized)


class Answers(NamedTuple):
    """Contains the tokens of a preference: int32 arrays."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


@dataclass(frozen=True)
class Dialect:
    """Describes how a model writes conversations: its tokenizer (JSON), chat template, and special tokens by name, such as
    `bos_token`."""

    definition: str = field(repr=False)
    template: str = field(repr=False)
    special: dict[str, str]
    end_of_document: str

    @property
    def digest(self) -> str:
        """Returns the XXH3-128 digest (hex) of everything that tokens depend on."""
        fields = [self.definition, self.template, self.special, self.end_of_document]
        return xxhash.xxh3_128_hexdigest(json.dumps(fields).encode())

    @property
    def template_digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.template.encode())


@lru_cache(maxsize=2)
def loaded(definition: str) -> Tokenizer:
    """Loads a tokenizer that reads the special tokens in a text, without truncation and padding."""
    tokenizer = Tokenizer.from_str(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = False
    return tokenizer


@dataclass(frozen=True)
class Renderer:
    """Converts conversations to tokens. `turns`: the assistant's turns that are trained; `each` trains the last turn, because the
    reader then passes the beginning of a conversation up to each turn. `end_of_turn`: whether the token that ends a turn is
    trained."""

    dialect: Dialect
    turns: Turns = "all"
    end_of_turn: bool = True

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return loaded(self.dialect.definition)

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Matches the special tokens."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        names = sorted((token.content for token in added if token.special), key=lambda name: (-len(name), name))
        return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")

    @cached_property
    def end(self) -> str:
        """Returns the token that ends a turn of the assistant; "" if the template has none. Raises ConfigError if the template
        rejects a conversation, has no start of the answer, or is of another model."""
        question: list[Message] = [{"role": "user", "content": QUESTION}]
        try:
            prompt = self.text(question, answer=True)
            whole = self.text([*question, {"role": "assistant", "content": ANSWER}])
        except FaultError as e:
            raise ConfigError(f"template: rejects a question with an answer ({e.detail}). Use another template") from e
        before, _, behind = whole.partition(ANSWER)
        shown = ANSWER in whole and QUESTION in before
        if not shown or not whole.startswith(prompt) or self.special.search(before, len(prompt)):
            raise ConfigError(
                "template: a conversation must begin with its prompt, which ends where the answer starts. "
                f"Prompt: {brief(json.dumps(prompt), 200)}, conversation: {brief(json.dumps(whole), 200)}. "
                "Render the start of the answer `if add_generation_prompt`, or use another template"
            )
        if absent := sorted(name for name in templates.special(whole) if self.tokenizer.token_to_id(name) is None):
            raise ConfigError(
                f"template: writes {', '.join(absent)}, which the tokenizer doesn't have. Use the template of the model, or set "
                "template: plain"
            )
        match = self.special.search(behind)
        return match[0] if match else ""

    @property
    def end_id(self) -> int:
        """Returns the id of the token that ends an answer."""
        number = self.tokenizer.token_to_id(self.end or self.dialect.end_of_document)
        assert number is not None
        return number

    def text(self, messages: list[Message], tools: list[dict[str, Any]] | None = None, answer: bool = False) -> str:
        """Renders messages in the sandbox of transformers. With `answer`, the text ends with the start of an answer. FaultError
        if the template rejects the messages."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.dialect.template
        if "strftime_now" in template:
            template = DATE + template
        try:
            options: Any = {"tools": tools, "add_generation_prompt": answer, **self.dialect.special}
            return render_jinja_template([messages], chat_template=template, **options)[0][0]
        except Exception as e:  # a template can raise any error
            raise FaultError("template", brief(e, 200)) from e

    def encode(self, *texts: str) -> list[np.ndarray]:
        """Returns the token ids of each text with special tokens, int32."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _segments(self, text: str, edges: list[int]) -> tuple[list[np.ndarray], bool]:
        """Returns the tokens of each part of a text between two edges, and whether the complete text has other tokens.

        Some tokenizers write a space before a text. So a part is tokenized after another text, whose tokens the part must not
        change: the part before it, or a line end.
        """
        parts = [text[a:b] for a, b in pairwise(edges)]
        together, *segments = self.encode(text, *parts)
        if np.array_equal(np.concatenate(segments), together):
            return segments, False
        for number, (before, part) in enumerate(pairwise(parts), 1):
            for first in (before, "\n"):
                context, both = self.encode(first, first + part)
                if np.array_equal(context, both[: len(context)]):
                    segments[number] = both[len(context) :]
                    break
        return segments, not np.array_equal(np.concatenate(segments), together)

    def conversation(self, conversation: ParsedConversation) -> Rendered:
        """Returns the tokens of a conversation that ends with a turn of the assistant, and the mask of trained tokens. FaultError
        if the template can't render it."""
        self._check(conversation)
        messages = conversation.messages
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self.text(messages, conversation.tools)
        learned = answers[0 if self.turns == "all" else -1 :]
        learned = [number for number in learned if messages[number].get(WEIGHT, 1)]
        if not learned:
            raise FaultError("untrained")
        spans = {number: self._span(conversation, number, whole) for number in learned}
        self._check_shown(conversation, whole, spans)
        edges = [0, *(edge for span in spans.values() for edge in (span.start, span.stop)), len(whole)]
        if any(b < a for a, b in pairwise(edges)):
            raise FaultError("rewritten")
        segments, retokenized = self._segments(whole, edges)
        if not self.end:  # nothing may come between the last answer and the token that ends it
            segments[-1] = np.array([self.end_id], np.int32)
        tokens, stops = np.concatenate(segments), np.cumsum([len(segment) for segment in segments]).tolist()
        trained, turns = np.zeros(len(tokens), bool), list[Turn]()
        for number, span in enumerate(spans.values()):
            start, stop = stops[2 * number], stops[2 * number + 1]
            trained[start : stop - (span.ended and not self.end_of_turn)] = True
            turns.append(Turn(start, stop, span.ended and self.end_of_turn))
        if not self.end and self.end_of_turn:
            trained[-1] = True
            turns[-1] = Turn(turns[-1].start, len(tokens), True)
        if not trained.any():
            raise FaultError("untrained")
        return Rendered(tokens, trained, tuple(turns), retokenized)

    def preference(self, preference: ParsedPreference) -> Answers:
        """Returns the tokens of a prompt, and of each answer with the end of its turn. FaultError if the template can't render
        them."""
        prompt, answers = np.zeros(0, np.int32), list[np.ndarray]()
        for answer in (preference.chosen, preference.rejected):
            conversation = preference.with_answer(answer)
            self._check(conversation)
            whole = self.text(conversation.messages, conversation.tools)
            number = len(preference.prompt)
            span = self._span(conversation, number, whole)
            self._check_shown(conversation, whole, {number: span})
            (prompt, tokens), _ = self._segments(whole[: span.stop], [0, span.start, span.stop])
            answers.append(tokens if self.end else np.append(tokens, np.int32(self.end_id)))
        if np.array_equal(answers[0], answers[1]):
            raise FaultError("same_answers", "after the template")
        return Answers(prompt, *answers)

    def _span(self, conversation: ParsedConversation, number: int, whole: str) -> AnswerSpan:
        """Locates an answer in the conversation's text. FaultError if the answer has another text there than as the last message,
        which is its text at inference."""
        messages, tools = conversation.messages, conversation.tools
        prompt = self.text(messages[:number], tools, answer=True)
        until = whole if number == len(messages) - 1 else self.text(messages[: number + 1], tools)
        start, matches = len(prompt), list(self.special.finditer(until, len(prompt)))
        match = next((one for one in matches if one[0] == self.end), matches[-1] if matches and self.end else None)
        stop = match.end() if match else start + len(until[start:].rstrip())
        if not (until.startswith(prompt) and whole.startswith(until[:stop])):
            raise FaultError("rewritten", f"messages.{number}")
        return AnswerSpan(start, stop, match is not None)

    def _check(self, conversation: ParsedConversation) -> None:
        for text in conversation.strings():
            if not text.isascii() and re.search(r"[\ud800-\udfff]", text):
                raise FaultError("invalid_messages", "half a character (a lone surrogate)")
            if match := self.special.search(text):
                raise FaultError("special_token", match[0])
        if conversation.tools and "tools" not in self.dialect.template:
            raise FaultError("unrendered", "tools")

    def _check_shown(self, conversation: ParsedConversation, whole: str, answers: dict[int, AnswerSpan]) -> None:
        """Raises FaultError if the template has left out the content of a message, or a call. `answers`: by their messages."""
        begin = 0  # where a message can begin; templates may write the system prompt later
        for number, message in enumerate(conversation.messages):
            in_order = message["role"] not in ("system", "developer")
            start, stop = answers[number][:2] if number in answers else (begin if in_order else 0, len(whole))
            ends = [_end(part, whole, start, stop) for part in _essential(message)]
            if None in ends:
                raise FaultError("unrendered", f"messages.{number}")
            if in_order:
                begin = min(filter(None, ends), default=begin)


def _end(part: str, text: str, start: int, stop: int) -> int | None:
    """Returns the end of the first occurrence of a message's part in a range of a text, plain or as JSON; None if it isn't
    there."""
    forms = (part, json.dumps(part, ensure_ascii=False)[1:-1])
    ends = [begin + len(form) for form in forms if (begin := text.find(form, start, stop)) >= 0]
    return min(ends, default=None)


def _essential(message: Message) -> Iterator[str]:
    """Yields the parts of a message that its text must have. Templates may leave out the thoughts of earlier turns."""
    yield message["content"].rpartition("</think>")[2].strip()
    yield from (call["function"]["name"] for call in message.get("tool_calls", ()))
