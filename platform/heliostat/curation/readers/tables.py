"""Reads files of records: JSON lines, CSV, Arrow. What stands beside the text becomes the document's columns."""

from __future__ import annotations

import csv as csv_module
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from heliostat.curation.readers.streams import LeftOutError, Limits, lines
from heliostat.curation.stage import Document, Dropped

ROWS = 1024  # of an Arrow batch that are made Python's at a time
MOST_COLUMNS = 10_000


def record(id: str, values: dict[str, Any], limits: Limits) -> Document | Dropped:
    """Makes a document of a record; its own `id`, if it has one, becomes the column `source_id`."""
    text = values.get(limits.text_column)
    if not isinstance(text, str):
        return Dropped(id, "no_text", "" if limits.text_column in values else f"no {limits.text_column!r}")
    if len(text) > limits.max_document_bytes:
        return Dropped(id, "too_large", f"more than {limits.max_document_bytes:,} bytes")
    columns = {k: v for k, v in values.items() if k not in (limits.text_column, "id") and v is not None}
    if values.get("id") is not None:
        columns["source_id"] = values["id"]
    return Document(id, text, columns)


def jsonl(path: str, stream: BinaryIO, limits: Limits) -> Iterator[Document | Dropped]:
    """Yields a document for each line that is a JSON object."""
    for number, line in enumerate(lines(stream, limits.max_document_bytes), 1):
        id = f"{path}#{number}"
        if line is None:
            yield Dropped(id, "too_large", f"a line of more than {limits.max_document_bytes:,} bytes")
        elif line.strip():
            try:
                values = json.loads(line)
            except UnicodeDecodeError:
                yield Dropped(id, "not_utf8")
                continue
            except (ValueError, RecursionError):
                values = None
            yield record(id, values, limits) if isinstance(values, dict) else Dropped(id, "invalid_json")


def csv(path: str, stream: BinaryIO, limits: Limits) -> Iterator[Document | Dropped]:
    """Yields a document for each row under the header; ids count rows."""
    yield from _separated(path, stream, limits, ",")


def tsv(path: str, stream: BinaryIO, limits: Limits) -> Iterator[Document | Dropped]:
    """Yields the same of a file that tabs separate."""
    yield from _separated(path, stream, limits, "\t")


def _separated(path: str, stream: BinaryIO, limits: Limits, mark: str) -> Iterator[Document | Dropped]:
    csv_module.field_size_limit(limits.max_document_bytes)
    source = _Text(stream, limits.max_document_bytes)
    rows, header, number = csv_module.reader(source, delimiter=mark), None, 0
    while True:
        id = f"{path}#{number}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except (csv_module.Error, LeftOutError) as e:
            yield Dropped(id, getattr(e, "reason", "corrupt"), f"line {source.line:,}: {e}")
            rows, number = csv_module.reader(source, delimiter=mark), number + 1  # goes on behind what broke it
            continue
        except UnicodeDecodeError:
            yield Dropped(id, "not_utf8", f"line {source.line:,}")
            rows, number = csv_module.reader(source, delimiter=mark), number + 1
            continue
        if header is None:
            header = [name.strip() for name in row]
            if limits.text_column not in header or len(header) > MOST_COLUMNS:
                yield Dropped(path, "no_text", f"no column {limits.text_column!r} in its first line")
                return
        elif len(row) == len(header):
            yield record(id, dict(zip(header, row, strict=True)), limits)
        elif row:
            yield Dropped(id, "corrupt", f"line {source.line:,}: {len(row):,} fields, and {len(header):,} in the header")
        number += bool(row)


class _Text:
    """Yields a stream's lines as text, and counts them."""

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self._lines, self._most, self.line = lines(stream, most), most, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.line += 1
        if line is None:
            raise LeftOutError("too_large", f"more than {self._most:,} bytes")
        return line.decode("utf-8-sig" if self.line == 1 else "utf-8")


def arrow(path: str, stream: BinaryIO, limits: Limits) -> Iterator[Document | Dropped]:
    """Yields a document for each row of an Arrow IPC stream or file, batch by batch; ids count rows from 1."""
    row, bounded = 0, _Bounded(stream, 16 * limits.max_document_bytes)
    try:
        bounded.skip_magic()
        reader = pa.ipc.open_stream(pa.PythonFile(bounded, "r"))
        if limits.text_column not in reader.schema.names:
            yield Dropped(path, "no_text", f"no column {limits.text_column!r}")
            return
        for batch in reader:
            batch.validate(full=True)
            for start in range(0, len(batch), ROWS):
                for values in batch.slice(start, ROWS).to_pylist():
                    row += 1
                    yield record(f"{path}#{row}", values, limits)
    except (pa.ArrowException, ValueError, MemoryError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:  # the stream's own
            raise
        yield Dropped(path, "corrupt", f"behind row {row:,}: {str(e).partition(chr(10))[0]}")


class _Bounded:
    """Hands a stream on, but refuses to read more at once than a batch may have."""

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self._stream, self._most, self._held, self.closed = stream, most, b"", False

    def skip_magic(self) -> None:
        """Skips what an Arrow file has before its stream."""
        self._held = self._stream.read(8)
        if self._held.startswith(b"ARROW1"):
            self._held = b""

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self._most:
            raise LeftOutError("too_large", f"a batch of more than {self._most:,} bytes")
        out, self._held = self._held[:size], self._held[size:]
        while len(out) < size and (piece := self._stream.read(size - len(out))):
            out += piece
        return out

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
