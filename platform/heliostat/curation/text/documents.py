"""Reads documents from files: pure functions from bytes to normalised text, or to the reason why there is none.

Whatever is wrong with a file or a record becomes a `Dropped` with one of `REASONS`; nothing here raises for bad data.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.curation.pieces import Part
from heliostat.curation.readers import Limits, streams
from heliostat.curation.stage import Dropped
from heliostat.curation.text import sources
from heliostat.tasks.care import CRASHED, MEANING, UNREAD, UNREAD_MEANING

__all__ = ["REASONS", "Document", "Dropped", "Rules", "clean", "read"]
REASONS = {
    "unreadable": "the file vanished or cannot be opened",
    "corrupt": "broken compression or Parquet; what came before the break is kept",
    "invalid_json": "a line that is not a JSON object",
    "no_text": "no text column, or no string in it",
    "not_utf8": "bytes that are not UTF-8",
    "binary": "a NUL character",
    "empty": "nothing but white space",
    "too_short": "fewer than min_chars characters",
    "too_long": "more than max_chars characters",
    "too_large": "beyond max_file_bytes or max_document_bytes, unpacked; what came before is kept",
    "outside": "a link that leads out of the input",
    CRASHED: MEANING,
    UNREAD: UNREAD_MEANING,
}
BUFFER = 4 << 20  # bytes of a Parquet column that are read at a time: a row group may be larger than memory
Form = Literal["none", "NFC", "NFKC"]


@dataclass(frozen=True)
class Rules:
    """Defines the requirements that a document must meet."""

    text_column: str = "text"
    normalise: Form = "NFC"
    min_chars: int = 1
    max_chars: int | None = None
    max_document_bytes: int = 1 << 26
    max_file_bytes: int = 1 << 40
    columns: tuple[str, ...] = ()

    def text_of(self, value: Any) -> str | None:
        """Returns the text that a record's value is; None if it is none."""
        return value if isinstance(value, str) else None

    def texts_of(self, values: pa.Array) -> pa.Array | None:
        """Returns a column's texts, as a column of strings or a dictionary of them; None if it has none."""
        held = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        return values if pa.types.is_string(held) or pa.types.is_large_string(held) else None


@dataclass(frozen=True)
class Document:
    id: str
    text: str
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def clean(id: str, raw: bytes | str, rules: Rules, columns: dict[str, Any] | None = None) -> Document | Dropped:
    """Normalises a document, or returns the reason to drop it; removes a byte-order mark and keeps line ends as they are."""
    try:
        text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
        text.encode()  # JSON can spell lone surrogates, which no UTF-8 can
    except UnicodeError:
        return Dropped(id, "not_utf8")
    if "\0" in text:
        return Dropped(id, "binary")
    if rules.normalise != "none":
        text = unicodedata.normalize(rules.normalise, text)
    if not text.strip():
        return Dropped(id, "empty")
    if len(text) < rules.min_chars:
        return Dropped(id, "too_short")
    if rules.max_chars is not None and len(text) > rules.max_chars:
        return Dropped(id, "too_long")
    return Document(id, text, columns or {})


def read(path: str, data: bytes | pa.NativeFile, rules: Rules, part: Part | None = None) -> Iterator[Document | Dropped]:
    """Yields every document of a file, or of a part of it; ids are the path, with `#line` or `#row`, from 1, for files of many
    documents.
    """
    suffix, codec = sources.kind(path)
    file = pa.BufferReader(data) if isinstance(data, bytes) else data
    part = part or Part(path, 0, 0)
    try:
        if suffix == ".parquet":
            if codec:
                file = pa.BufferReader(_whole(path, file, rules.max_file_bytes))
            yield from _parquet(path, file, rules, part)
        elif suffix == ".jsonl":
            yield from _jsonl(path, _lines(path, file, rules, part), rules, part.first)
        else:
            yield clean(path, _whole(path, file, min(rules.max_document_bytes, rules.max_file_bytes)), rules)
    except sources.LeftOutError as e:
        yield Dropped(path, e.reason, e.detail)
    except (OSError, EOFError) as e:
        yield Dropped(path, "corrupt", str(e).partition("\n")[0])


def _whole(path: str, file: pa.NativeFile, limit: int) -> bytes:
    """Unpacks the plain bytes; LeftOutError as soon as there are more than `limit`."""
    return streams.whole(streams.unpacked(path, file, Limits()), limit)


def _lines(path: str, file: pa.NativeFile, rules: Rules, part: Part) -> Iterator[bytes | None]:
    """Yields the lines that begin in the part, None for a line that is longer than a document may be."""
    if part.start:  # what the line that begins before the range leaves in it belongs to the range before
        file.seek(part.start - 1)
    plain = streams.unpacked(path, file, Limits(max_file_bytes=rules.max_file_bytes))
    yield from streams.lines(plain, rules.max_document_bytes, part.start, part.stop)


def count_lines(file: pa.NativeFile, part: Part) -> int:
    """Counts the lines that begin in a part of a file of `part.bytes` bytes."""
    stop = part.bytes if part.stop is None else part.stop
    found, at = int(part.start == 0), max(0, part.start - 1)
    while at < stop - 1:
        block = file.read_at(min(8 * streams.BLOCK, stop - 1 - at), at)
        if not block:
            break
        found += block.count(b"\n")
        at += len(block)
    return found


def _jsonl(path: str, lines: Iterable[bytes | None], rules: Rules, first: int) -> Iterator[Document | Dropped]:
    for number, line in enumerate(lines, first):
        id = f"{path}#{number}"
        if line is None:
            yield Dropped(id, "too_large", f"a line of more than {rules.max_document_bytes:,} bytes")
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            yield Dropped(id, "not_utf8")
            continue
        except (ValueError, RecursionError):
            yield Dropped(id, "invalid_json")
            continue
        if not isinstance(record, dict):
            yield Dropped(id, "invalid_json")
        elif (text := rules.text_of(record.get(rules.text_column))) is None:
            yield Dropped(id, "no_text")
        else:
            yield clean(id, text, rules, {c: record[c] for c in rules.columns if c in record})


def _parquet(path: str, file: pa.NativeFile, rules: Rules, part: Part) -> Iterator[Document | Dropped]:
    try:
        footer = pq.read_metadata(file)
        if rules.text_column not in footer.schema.to_arrow_schema().names:
            if part.start == 0:
                yield Dropped(path, "no_text")
            return
        flat = [rules.text_column for i in range(len(footer.schema)) if footer.schema.column(i).path == rules.text_column]
        opened = pq.ParquetFile(file, metadata=footer, page_checksum_verification=True, read_dictionary=flat,
                                pre_buffer=False, buffer_size=BUFFER)  # fmt: skip
        total = 0
        for row, values, others in sources.parquet_values(opened, rules.text_column, rules.columns, rules.max_file_bytes, part):
            if (values := rules.texts_of(values)) is None:
                if part.start == 0:
                    yield Dropped(path, "no_text")
                return
            texts = values.dictionary if isinstance(values, pa.DictionaryArray) else values
            texts = pc.cast(texts, pa.large_binary())  # bytes: Parquet does not check its UTF-8
            chosen = values.indices if isinstance(values, pa.DictionaryArray) else range(len(texts))
            for number, place in enumerate(chosen):
                index = place if isinstance(place, int) else place.as_py()
                value = texts[index] if index is not None else None
                size = len(value.as_buffer()) if value is not None and value.is_valid else 0
                total += size
                if total > rules.max_file_bytes:
                    raise sources.LeftOutError("too_large", f"more than {rules.max_file_bytes:,} bytes, unpacked")
                columns = {name: column[number].as_py() for name, column in others.items()}
                yield _value(f"{path}#{row + number}", value, size, rules, columns)
    except (pa.ArrowException, OSError, ValueError) as e:
        yield Dropped(path, "corrupt", str(e).partition("\n")[0])


def _value(id: str, value: pa.Scalar | None, size: int, rules: Rules, columns: dict[str, Any]) -> Document | Dropped:
    if value is None or not value.is_valid:
        return Dropped(id, "no_text")
    if size > rules.max_document_bytes:
        return Dropped(id, "too_large", f"more than {rules.max_document_bytes:,} bytes")
    return clean(id, value.as_py(), rules, columns)
