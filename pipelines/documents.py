"""Files to documents: pure functions from bytes to normalised text, or to the reason why there is none.

Whatever is wrong with a file or a record becomes a `Dropped` with one of `REASONS`; nothing here raises for bad data.
"""

from __future__ import annotations

import hashlib
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import sources

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
}
Form = Literal["none", "NFC", "NFKC"]


@dataclass(frozen=True)
class Rules:
    """What a document must be."""

    text_column: str = "text"
    normalise: Form = "NFC"
    min_chars: int = 1
    max_chars: int | None = None


@dataclass(frozen=True)
class Document:
    id: str
    text: str

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Dropped:
    id: str
    reason: str


def clean(id: str, raw: bytes | str, rules: Rules) -> Document | Dropped:
    """The normalised document, or why it is dropped. A byte-order mark is removed; line ends stay as they are."""
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
    return Document(id, text)


def read(path: str, data: bytes, rules: Rules) -> Iterator[Document | Dropped]:
    """Every document of a file. Ids are the path, with `#line` or `#row`, from 1, for files of many documents."""
    suffix, codec = sources.kind(path)
    try:
        if suffix == ".parquet":
            yield from _parquet(path, _unpack(data, codec).read(), rules)
        elif suffix == ".jsonl":
            yield from _jsonl(path, io.BufferedReader(_unpack(data, codec)), rules)
        else:
            yield clean(path, _unpack(data, codec).read(), rules)
    except (OSError, EOFError):
        yield Dropped(path, "corrupt")


def _unpack(data: bytes, codec: str | None) -> pa.NativeFile:
    """A reader of the plain bytes; a broken stream is an OSError when its break is reached."""
    raw = pa.BufferReader(data)
    return pa.CompressedInputStream(raw, codec) if codec and data else raw


def _jsonl(path: str, lines: Iterable[bytes], rules: Rules) -> Iterator[Document | Dropped]:
    for number, line in enumerate(lines, 1):
        id = f"{path}#{number}"
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
        elif not isinstance(text := record.get(rules.text_column), str):
            yield Dropped(id, "no_text")
        else:
            yield clean(id, text, rules)


def _parquet(path: str, data: bytes, rules: Rules) -> Iterator[Document | Dropped]:
    row = 0
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        if rules.text_column not in file.schema_arrow.names:
            yield Dropped(path, "no_text")
            return
        for batch in file.iter_batches(1024, columns=[rules.text_column]):
            values = batch.column(0)
            if pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            if not any(is_text(values.type) for is_text in (pa.types.is_string, pa.types.is_large_string)):
                yield Dropped(path, "no_text")
                return
            for value in pc.cast(values, pa.large_binary()).to_pylist():  # bytes: Parquet does not check its UTF-8
                row += 1
                id = f"{path}#{row}"
                yield clean(id, value, rules) if value is not None else Dropped(id, "no_text")
    except (pa.ArrowException, OSError, ValueError):
        yield Dropped(path, "corrupt")
