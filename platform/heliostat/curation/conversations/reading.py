"""Reads records as conversations and preferences in a Ray task, renders them, and fits them into the maximum length."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import xxhash

from heliostat.curation import readers
from heliostat.curation.conversations import packing, rendering, shapes
from heliostat.curation.conversations.messages import THOUGHTS, WEIGHT, FaultError, ParsedConversation
from heliostat.curation.conversations.rendering import Dialect, Rendered, Renderer
from heliostat.curation.pairs import extracting
from heliostat.curation.pairs import reading as pairs
from heliostat.curation.pieces import FilePart
from heliostat.curation.stage import Document, Dropped
from heliostat.curation.text import sources
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.tasks import TextSource
from heliostat.data.conversations import TEMPLATE
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location

TooLong = Literal["drop", "cut", "split"]
SOURCE, PROMPT, TEXT, ROWS, COUNTS = "record", "prompt", "digest", "rows", "counts"  # columns of a document
RECORD = "conversations"  # key of the dataset's record of its pipeline
Record = ParsedConversation | shapes.ParsedPreference
MANY_MESSAGES = 64  # above which the length is measured first
SURELY_LONG = 2  # times the maximum length: more tokens than differ between a text and its segments
REASONS = {
    "unparsed": pairs.REASONS["unparsed"],
    "no_pairs": "a Python file without functions with docstrings; for preferences, with fewer than two",
    "no_shape": "a record without the columns of a shape; set `columns` (PreferencePipeline needs `chosen` and `rejected`)",
    "several_shapes": "a record with the columns of several shapes; set `shape`",
    "invalid_messages": "messages that aren't a list of mappings with a role and a text",
    "unknown_role": "a role that isn't system, developer, user, assistant, or tool",
    "empty_turn": "a message without text and calls",
    "no_answer": "no message of the assistant",
    "no_prompt": "a preference without a prompt",
    "several_turns": "answers that aren't one message of the assistant each",
    "other_prompt": "answers to another prompt than the preference's, or to two different prompts",
    "same_answers": "a preference whose answers are equal",
    "invalid_tool_call": "a call without a function's name, or with arguments that aren't a JSON mapping",
    "special_token": "a text that contains a special token of the tokenizer",
    "template": "messages that the chat template rejects",
    "rewritten": "a template that changes earlier turns, so that answers don't follow their prompts; set `turns: each`",
    "unrendered": "a message, a call, or tools that the chat template leaves out",
    "untrained": "no token to train after the template",
    "too_long": "more than sequence_length tokens",
}


@dataclass(frozen=True)
class StoredDialect:
    """Locates the parts of a dialect: the tokenizer's file in the dataset's folder, the template, and special tokens."""

    output: str
    tokenizer: str
    template: str
    special: tuple[tuple[str, str], ...]
    end_of_document: str


@lru_cache(maxsize=2)
def _dialect(stored: StoredDialect) -> Dialect:
    definition = Location(stored.output).join(stored.tokenizer).read().decode()
    return Dialect(definition, stored.template, dict(stored.special), stored.end_of_document)


@dataclass(frozen=True)
class RecordRules(TextRules):
    """Converts records to documents: a document's text is the plain conversation, and its column SOURCE is the record."""

    by_row: ClassVar[bool] = True

    shape: str = "auto"
    names: tuple[tuple[str, str], ...] = ()  # (column of a shape, its name in the input)

    def lacks(self, names: Collection[str]) -> str:
        if why := shapes.missing(self._renamed(names), self.shape, shapes.PAIRS if self.shape in shapes.PAIRS else shapes.NEEDS):
            raise FaultError("no_shape", why)
        return ""

    def document(self, id: str, values: dict[str, Any]) -> Document | Dropped:
        try:
            if len(json.dumps(values, default=str)) > self.max_document_bytes:
                return Dropped(id, "too_large", f"more than {self.max_document_bytes:,} bytes")
            record = self.parsed({name: values[column] for name, column in self._renamed(values).items()})
            return Document(id, record.text, {SOURCE: record})
        except FaultError as e:
            return Dropped(id, e.reason, e.detail)
        except RecursionError:
            return Dropped(id, "invalid_messages", "too many levels")

    def _renamed(self, columns: Collection[str]) -> dict[str, str]:
        """Returns the input's column for each name in the shapes."""
        renamed = {name: column for name, column in self.names if column in columns}
        return {column: column for column in columns if column not in renamed.values()} | renamed

    def parsed(self, values: dict[str, Any]) -> Record:
        values = {name: None if value == "" and name != "input" else value for name, value in values.items()}  # CSV has no null
        return shapes.preference(values) if self.shape in shapes.PAIRS else shapes.conversation(values, self.shape)


def version(shape: str, too_long: TooLong, turns: rendering.Turns) -> int:
    """Returns the version of the rules by which records become rows. Increase it when the same records give other rows, but only
    for the shapes and keys whose rows differ, so that the other datasets stay up to date."""
    return 2 if shape in shapes.PAIRS or (too_long != "drop" and turns == "all") else 1


@dataclass(frozen=True)
class ConversationSource(TextSource):
    """Reads the conversations of an input. Each conversation is a document; its columns have its tokens (`ROWS`)."""

    by_text: ClassVar[bool] = False

    rules: RecordRules
    stored: StoredDialect
    turns: rendering.Turns
    end_of_turn: bool
    sequence_length: int
    too_long: TooLong

    @property
    def renderer(self) -> Renderer:
        return _renderer(self.stored, self.turns, self.end_of_turn)

    def read(self, part: FilePart) -> Iterator[Document | Dropped]:
        try:
            for item in super().read(part):
                if isinstance(item, Dropped):
                    yield item
                elif SOURCE in item.columns:
                    yield self._document(item.id, item.columns[SOURCE])
                else:
                    yield from self._functions(item)
        except FaultError as e:  # of a complete table
            raise ConfigError(f"input: {part.path or sources.root(self.input).name!r} {e.detail}") from e

    def _functions(self, item: Document) -> Iterator[Document | Dropped]:
        """Yields conversations from the docstrings of a Python file, or preferences, whose rejected answer is the file's next
        function. Drops other files of text."""
        name = item.id.partition("#")[0].lower()
        if not isinstance(item.text, str) or readers.suffix_of(name) != ".py":
            yield Dropped(item.id, "no_shape", "a text")
            return
        try:
            functions = list(extracting.docstrings(item.text))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            yield Dropped(item.id, "unparsed", f"{type(e).__name__}: {e}"[:200])
            return
        preferences = self.rules.shape in shapes.PAIRS
        if len(functions) < 1 + preferences:
            yield Dropped(item.id, "no_pairs")
            return
        for pair, other in zip(functions, [*functions[1:], functions[0]], strict=True):
            id, right = f"{item.id}#{pair.line}", shapes.function(pair.query, pair.text)
            wrong = shapes.function(pair.query, other.text)
            if not preferences:
                yield self._document(id, right)
            elif wrong.text == right.text:
                yield Dropped(id, "same_answers")
            else:
                yield self._document(id, shapes.better(right, wrong))

    def _document(self, id: str, record: Record) -> Document | Dropped:
        first = record if isinstance(record, ParsedConversation) else record.with_answer(None)
        try:
            rendered = self.rendered(record)
        except FaultError as e:
            return Dropped(id, e.reason, e.detail)
        except RecursionError:
            return Dropped(id, "invalid_messages", "too many levels")
        rendered[COUNTS]["bytes"] = len(record.text.encode("utf-8", "surrogatepass"))
        return Document(id, record.text, {PROMPT: first.prompt, TEXT: _digest(record.text), **rendered})

    def finish(self, document: Document) -> Document | Dropped:
        assert isinstance(document.text, str)
        if document.columns[TEXT] != _digest(document.text):
            raise ConfigError("stages: a stage has changed a text, but conversations keep their tokens. Remove this stage")
        return document

    def rendered(self, record: Record) -> dict[str, Any]:
        """Renders a record. Returns the columns ROWS and COUNTS. FaultError if the record must be dropped."""
        if isinstance(record, shapes.ParsedPreference):
            return self._answers(record)
        rows, counts = self._by_turn(record) if self.turns == "each" else self._fitted(record)
        counts.update(
            trailing=record.trailing,
            conversations=len(rows),
            tokens=sum(len(row.tokens) for row in rows),
            trained=sum(int(row.trained.sum()) for row in rows),
            turns=sum(len(row.turns) for row in rows),
            trained_ends=sum(turn.ended for row in rows for turn in row.turns),
            retokenized=sum(row.retokenized for row in rows),
            ended=0 if self.renderer.end else len(rows),
        )
        return {ROWS: [[_packed(row.tokens), _packed(np.packbits(row.trained))] for row in rows], COUNTS: dict(counts)}

    def _answers(self, preference: shapes.ParsedPreference) -> dict[str, Any]:
        answers = self.renderer.preference(preference)
        longest = len(answers.prompt) + max(len(answers.chosen), len(answers.rejected))
        if longest > self.sequence_length:
            raise FaultError("too_long", f"{longest:,} tokens")
        trained = len(answers.chosen) + len(answers.rejected)
        counts = {"conversations": 1, "tokens": len(answers.prompt) + trained, "trained": trained, "turns": 2, "trained_ends": 2,
                  "ended": 0 if self.renderer.end else 1}  # fmt: skip
        return {ROWS: [[_packed(one) for one in answers]], COUNTS: counts}

    def _fitted(self, conversation: ParsedConversation) -> tuple[list[Rendered], Counter[str]]:
        """Renders a conversation as one row or, if it is too long, as `too_long` says."""
        measured = self.too_long == "drop" or self.turns == "all"
        if measured and (count := self._surely_long(conversation.messages, conversation.tools)):
            if self.too_long == "drop":
                raise FaultError("too_long", f"{count:,} tokens")
            if self.too_long == "split":
                return self._split(conversation), Counter(split=1)
            conversation = self._beginning(conversation, SURELY_LONG * self.sequence_length)
        row = self.renderer.conversation(conversation)
        if len(row.tokens) <= self.sequence_length:
            return [row], Counter()
        if self.too_long == "split":
            return self._split(conversation), Counter(split=1)
        if self.too_long == "cut" and (kept := packing.cut(row.trained, self.sequence_length)):
            return [row.cut(kept)], Counter(cut=1)
        raise FaultError("too_long", f"{len(row.tokens):,} tokens")

    def _length(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> int:
        """Counts the tokens of messages that are rendered together."""
        (tokens,) = self.renderer.encode(self.renderer.text(messages, tools))
        return len(tokens)

    def _surely_long(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> int:
        """Counts the tokens of many messages if these are surely too many; otherwise returns 0. Rendering all turns takes their
        square."""
        count = self._length(messages, tools) if len(messages) > MANY_MESSAGES else 0
        return count if count > SURELY_LONG * self.sequence_length else 0

    def _beginning(self, conversation: ParsedConversation, limit: int) -> ParsedConversation:
        """Returns the first messages of a conversation, up to a trained answer, with more than `limit` tokens."""
        most, last = MANY_MESSAGES, len(conversation.messages)
        learned = [n for n, one in enumerate(conversation.messages, 1) if one["role"] == "assistant" and one.get(WEIGHT, 1)]
        while True:
            end = next((n for n in learned if n >= most), last)
            begin = ParsedConversation(conversation.messages[:end], conversation.tools)
            if end == last or self._length(begin.messages, begin.tools) > limit:
                return begin
            most += most // 4

    def _by_turn(self, conversation: ParsedConversation) -> tuple[list[Rendered], Counter[str]]:
        """Renders the conversation up to each turn of the assistant as a conversation of its own, whose last turn is trained.
        Leaves out those that don't fit, and counts the conversation as cut; FaultError if none fits."""
        rows, faults, counts = list[Rendered](), list[FaultError](), Counter[str]()
        for number, message in enumerate(conversation.messages, 1):
            if message["role"] == "assistant" and message.get(WEIGHT, 1):
                part = ParsedConversation(conversation.messages[:number], conversation.tools)
                try:
                    some, cut = self._fitted(part)
                    rows, counts = rows + some, counts | cut
                except FaultError as e:
                    if e.reason != "too_long":
                        raise
                    faults.append(e)
                    if self._stays_long(part):
                        break  # rendering each of thousands of turns takes their square
        if not rows:
            raise faults[0] if faults else FaultError("untrained")
        counts.update(split=int(len(rows) > 1))
        return rows, counts | Counter(cut=1) if faults else counts

    def _stays_long(self, conversation: ParsedConversation) -> bool:
        """Returns whether the conversation is surely too long, also after more turns, when templates leave out its thoughts."""
        plain = [{**message, "content": message["content"].rpartition("</think>")[2]} for message in conversation.messages]
        for message in plain:
            message.pop(THOUGHTS, None)
        try:
            return self._length(plain, conversation.tools) > SURELY_LONG * self.sequence_length
        except FaultError:  # the template needs the thoughts
            return False

    def _split(self, conversation: ParsedConversation) -> list[Rendered]:
        """Splits a conversation before messages of the user. Each part has the system prompt, and as many exchanges as fit."""
        head, exchanges = conversation.exchanges()
        rows, waiting = list[Rendered](), list[list[dict[str, Any]]]()
        last: Rendered | None = None
        for exchange in exchanges:
            if count := self._surely_long([*head, *exchange], conversation.tools):
                raise FaultError("too_long", f"{count:,} tokens in one exchange")
            both = self._part(conversation, head, [*waiting, exchange])
            if len(both.tokens) > self.sequence_length and last is not None:
                rows.append(last)
                waiting, both = [], self._part(conversation, head, [exchange])
            if len(both.tokens) > self.sequence_length:
                raise FaultError("too_long", f"{len(both.tokens):,} tokens in one exchange")
            waiting, last = [*waiting, exchange], both
        return [*rows, *([last] if last else [])]

    def _part(self, conversation: ParsedConversation, head: list[Any], exchanges: list[list[Any]]) -> Rendered:
        messages = [*head, *(message for exchange in exchanges for message in exchange)]
        return self.renderer.conversation(ParsedConversation(messages, conversation.tools))


@lru_cache(maxsize=4)
def _renderer(stored: StoredDialect, turns: rendering.Turns, end_of_turn: bool) -> Renderer:
    return Renderer(_dialect(stored), turns, end_of_turn)


def source_again(dataset: Manifest, by: dict[str, Any]) -> ConversationSource:
    """Returns an object that reads a dataset's input again. `by`: the dataset's record of its pipeline, from `made_by`."""
    rules, keys = by["rules"], dict(by[RECORD])
    special, end = keys.pop("special"), keys.pop("end_of_document")
    template = dataset.file(TEMPLATE).read().decode()
    stored = StoredDialect(
        dataset.location.uri, dataset.meta["files"]["tokenizer.json"], template, tuple(sorted(special.items())), end
    )
    names = tuple((name, column) for name, column in rules["names"])
    rules = RecordRules(**{**rules, "columns": tuple(rules["columns"]), "names": names})
    return ConversationSource(by["input"], rules=rules, stored=stored, **keys)


def made_by(source: ConversationSource) -> dict[str, Any]:
    """Returns everything that `source_again` needs and the dataset's files don't contain, as JSON values."""
    stored = source.stored
    keys = {name: getattr(source, name) for name in ("turns", "end_of_turn", "sequence_length", "too_long")}
    own = {**keys, "special": dict(stored.special), "end_of_document": stored.end_of_document}
    return {"input": sources.absolute(source.input), "rules": asdict(source.rules), RECORD: own}


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def unpacked_tokens(text: str) -> np.ndarray:
    """Returns the tokens of a column ROWS, int32."""
    return np.frombuffer(base64.b64decode(text), np.int32)


def unpacked_mask(text: str, count: int) -> np.ndarray:
    """Returns the mask of `count` tokens of a column ROWS, bool."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)
