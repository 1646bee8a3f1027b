"""Reads the inputs of a batch inference: texts like a text pipeline, chats, and images like an image pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from heliostat import extras
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.segment import DocumentSource
from heliostat.curation.text import making, sources
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.tasks import TextSource
from heliostat.inference.batch.tasks import BatchSettings
from heliostat.tasks.flow import Flow

PIECES = 256  # approximate number of pieces of an input
LEAST, MOST = 16 << 10, 1 << 20  # limits of a piece's size, in bytes


@dataclass(frozen=True)
class ChatRules(TextRules):
    """Accepts texts and lists of messages. A list of messages becomes JSON text."""

    def text_of(self, value: object) -> str | None:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else super().text_of(value)

    def texts_of(self, values: pa.Array) -> pa.Array | None:
        if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
            return super().texts_of(values)
        return pa.array([None if one is None else json.dumps(one, ensure_ascii=False, default=str) for one in values.to_pylist()],
                        pa.large_string())  # fmt: skip


class InputReading(Protocol):
    """Lists an input's files, and divides the files into pieces. `source` returns the object that reads the documents of one
    piece in a Ray task.

    `identity`: the settings that determine the texts or images that are read.
    """

    @property
    def identity(self) -> dict[str, object]: ...

    def listing(self) -> list[InputFile]: ...

    def pieces(self, flow: Flow, files: list[InputFile]) -> Iterable[list[FilePart]]: ...

    def source(self, flow: Flow) -> DocumentSource: ...


@dataclass(frozen=True)
class Texts:
    """Reads texts, or chats as JSON, from the files of a text input."""

    input: str
    rules: TextRules

    @property
    def identity(self) -> dict[str, object]:
        return vars(self.rules)

    def listing(self) -> list[InputFile]:
        return sources.listing(self.input)

    def pieces(self, flow: Flow, files: list[InputFile]) -> Iterable[list[FilePart]]:
        target = flow.work.begin(max(LEAST, min(MOST, sum(f.bytes for f in files) // PIECES)))
        return making.pieces_of(flow, self.input, files, target)

    def source(self, flow: Flow) -> DocumentSource:
        return TextSource(self.input, self.rules)


def of(input: str, settings: BatchSettings) -> InputReading:
    """Returns the reader for a task's inputs; raises MissingExtraError if the reader needs a library that isn't installed."""
    if settings.task == "embed-images":
        extras.require("images", "PIL", what="embed-images")
        from heliostat.inference.batch.pictures import Pictures

        return Pictures(input, settings.column, tuple(settings.keep))
    rules = ChatRules if settings.task == "chat" else TextRules
    return Texts(input, rules(text_column=settings.column, normalise="none", min_chars=0, columns=tuple(settings.keep)))
