"""Reads documents from files: pure functions from bytes to normalised text, or to the reason why there is none.

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

from heliostat.pipelines.text import sources

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
}
BLOCK = 1 << 20  # bytes that are unpacked at a time
Form = Literal["none", "NFC", "NFKC"]


@dataclass(frozen=True)
class Rules:
    """Defines the requirements that a document must meet."""

    text_column: str = "text"
    normalise: Form = "NFC"
    min_chars: int = 1
    max_chars: int | None = None
    max_document_bytes: int = 1 << 26
    max_file_bytes: int = 1 << 33


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
    detail: str = ""


def clean(id: str, raw: bytes | str, rules: Rules) -> Document | Dropped:
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
    return Document(id, text)


def read(path: str, data: bytes, rules: Rules) -> Iterator[Document | Dropped]:
    """Yields every document of a file; ids are the path, with `#line` or `#row`, from 1, for files of many documents."""
    suffix, codec = sources.kind(path)
    try:
        if suffix == ".parquet":
            yield from _parquet(path, _whole(data, codec, rules.max_file_bytes), rules)
        elif suffix == ".jsonl":
            yield from _jsonl(path, _lines(data, codec, rules), rules)
        else:
            yield clean(path, _whole(data, codec, min(rules.max_document_bytes, rules.max_file_bytes)), rules)
    except sources.LeftOutError as e:
        yield Dropped(path, e.reason, e.detail)
    except (OSError, EOFError) as e:
        yield Dropped(path, "corrupt", str(e).partition("\n")[0])


def _unpack(data: bytes, codec: str | None) -> pa.NativeFile:
    """Opens the plain bytes as a stream, which raises an OSError where broken compression is reached."""
    raw = pa.BufferReader(data)
    return pa.CompressedInputStream(raw, codec) if codec and data else raw


def _whole(data: bytes, codec: str | None, limit: int) -> bytes:
    """Unpacks the plain bytes; LeftOutError as soon as there are more than `limit`."""
    stream, out = _unpack(data, codec), bytearray()
    while block := stream.read(BLOCK):
        out += block
        if len(out) > limit:
            raise sources.LeftOutError("too_large", f"more than {limit:,} bytes, unpacked")
    return bytes(out)


def _lines(data: bytes, codec: str | None, rules: Rules) -> Iterator[bytes | None]:
    """Yields the lines of the plain bytes, None for a line that is longer than a document may be.

    LeftOutError behind the last byte that a file may have.
    """
    stream, total, skipping = io.BufferedReader(_unpack(data, codec)), 0, False
    while piece := stream.readline(BLOCK if skipping else rules.max_document_bytes + 1):
        total += len(piece)
        if total > rules.max_file_bytes:
            raise sources.LeftOutError("too_large", f"more than {rules.max_file_bytes:,} bytes, unpacked")
        ended = piece.endswith(b"\n")
        if skipping:
            skipping = not ended
        elif ended or len(piece) <= rules.max_document_bytes:
            yield piece
        else:
            skipping = True
            yield None


def _jsonl(path: str, lines: Iterable[bytes | None], rules: Rules) -> Iterator[Document | Dropped]:
    for number, line in enumerate(lines, 1):
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
        elif not isinstance(text := record.get(rules.text_column), str):
            yield Dropped(id, "no_text")
        else:
            yield clean(id, text, rules)


def _parquet(path: str, data: bytes, rules: Rules) -> Iterator[Document | Dropped]:
    row = 0
    try:
        if rules.text_column not in pq.read_schema(pa.BufferReader(data)).names:
            yield Dropped(path, "no_text")
            return
        total = 0
        for values in sources.parquet_values(data, rules.text_column, rules.max_file_bytes):
            texts = values.dictionary if isinstance(values, pa.DictionaryArray) else values
            if not any(is_text(texts.type) for is_text in (pa.types.is_string, pa.types.is_large_string)):
                yield Dropped(path, "no_text")
                return
            texts = pc.cast(texts, pa.large_binary())  # bytes: Parquet does not check its UTF-8
            chosen = values.indices if isinstance(values, pa.DictionaryArray) else range(len(texts))
            for place in chosen:
                row += 1
                index = place if isinstance(place, int) else place.as_py()
                value = texts[index] if index is not None else None
                size = len(value.as_buffer()) if value is not None and value.is_valid else 0
                total += size
                if total > rules.max_file_bytes:
                    raise sources.LeftOutError("too_large", f"more than {rules.max_file_bytes:,} bytes, unpacked")
                yield _value(f"{path}#{row}", value, size, rules)
    except (pa.ArrowException, OSError, ValueError) as e:
        yield Dropped(path, "corrupt", str(e).partition("\n")[0])


def _value(id: str, value: pa.Scalar | None, size: int, rules: Rules) -> Document | Dropped:
    if value is None or not value.is_valid:
        return Dropped(id, "no_text")
    if size > rules.max_document_bytes:
        return Dropped(id, "too_large", f"more than {rules.max_document_bytes:,} bytes")
    return clean(id, value.as_py(), rules)
