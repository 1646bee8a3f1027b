"""Reads files of records: JSON lines, CSV, or Arrow. A record's text becomes a document, and the record's other fields become the
document's columns."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from heliostat.curation.pieces import FilePart
from heliostat.curation.readers.streams import BLOCK, LINE, LeftOutError, ReadLimits, lines, unpacked
from heliostat.curation.stage import Document, Dropped

ROWS = 1024  # rows of an Arrow batch that become Python objects at once
MOST_COLUMNS = 10_000
CONTINUES, DICTIONARY, BATCH = b"\xff\xff\xff\xff", 2, 3  # Arrow messages: their first bytes, and two message types
PACKED_BEFORE = b"ARROW:experimental_compression"  # Arrow 0.17's name for the compression of buffers


def jsonl(path: str, stream: BinaryIO, limits: ReadLimits, part: FilePart) -> Iterator[Document | Dropped]:
    """Yields a document for each line that begins in `part`; a `Dropped` for a line that isn't a JSON object. An id ends in the
    number of the line."""
    start, stop = (part.start, part.stop) if part.packed is None else (0, None)  # a slice has only complete lines
    if start:  # the rest of a line that begins before the range belongs to the earlier range
        stream.seek(start - 1)
    block = BLOCK if stop is None else min(BLOCK, stop - start + LINE)
    plain = unpacked(path, stream, limits, part.packed, block)
    for number, line in enumerate(lines(plain, limits.max_document_bytes, start, stop), part.first):
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
            yield limits.document(id, values) if isinstance(values, dict) else Dropped(id, "invalid_json")


def separated(path: str, stream: BinaryIO, limits: ReadLimits, mark: str) -> Iterator[Document | Dropped]:
    """Yields a document for each row of a CSV or TSV file after the header. An id ends in the number of the row. `mark`: the
    separator of fields."""
    csv.field_size_limit(limits.max_document_bytes)
    source = _Text(unpacked(path, stream, limits), limits.max_document_bytes)
    rows, header, number = csv.reader(source, delimiter=mark), None, 0
    while True:
        id = f"{path}#{number}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except (csv.Error, LeftOutError) as e:
            yield Dropped(id, getattr(e, "reason", "corrupt"), f"line {source.line:,}: {e}")
            rows, number = csv.reader(source, delimiter=mark), number + 1  # continues after the faulty row
            continue
        except UnicodeDecodeError:
            yield Dropped(id, "not_utf8", f"line {source.line:,}")
            rows, number = csv.reader(source, delimiter=mark), number + 1
            continue
        if header is None:
            header = [name.strip() for name in row]
            if why := limits.lacks(header) or ("too many columns" if len(header) > MOST_COLUMNS else ""):
                yield Dropped(path, "no_text", f"{why} in its first line")
                return
        elif len(row) == len(header):
            yield limits.document(id, dict(zip(header, row, strict=True)))
        elif row:
            yield Dropped(id, "corrupt", f"line {source.line:,}: {len(row):,} fields, and {len(header):,} in the header")
        number += bool(row)


class _Text:
    """Iterates over a stream's lines as text, and counts the lines. Raises LeftOutError at a line of more than `most` bytes."""

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


def arrow(path: str, stream: BinaryIO, limits: ReadLimits) -> Iterator[Document | Dropped]:
    """Yields a document for each row of an Arrow IPC stream or file. Has one batch in memory. An id ends in the number of the
    row, counted from 1."""
    row, bounded = 0, _Bounded(unpacked(path, stream, limits), 16 * limits.max_document_bytes)
    try:
        bounded.skip_magic()
        reader = pa.ipc.open_stream(pa.PythonFile(bounded, "r"))
        if why := limits.lacks(reader.schema.names):
            yield Dropped(path, "no_text", why)
            return
        rows = 1 if any(map(_shares, reader.schema.types)) else ROWS
        for batch in reader:
            batch.validate(full=True)
            for start in range(0, len(batch), rows):
                for values in batch.slice(start, rows).to_pylist():
                    row += 1
                    yield limits.document(f"{path}#{row}", values)
    except (pa.ArrowException, ValueError, MemoryError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:  # an error of the stream itself
            raise
        yield Dropped(path, "corrupt", f"after row {row:,}: {str(e).partition(chr(10))[0]}")


def _shares(kind: pa.DataType) -> bool:
    """Checks whether rows of an Arrow type may share stored bytes. Then the rows, as Python objects, can need more memory than
    the stored bytes."""
    types = pa.types
    tests = (types.is_dictionary, types.is_run_end_encoded, types.is_string_view, types.is_binary_view, types.is_list_view,
            types.is_large_list_view)  # fmt: skip
    return any(is_one(kind) for is_one in tests) or any(_shares(kind.field(i).type) for i in range(kind.num_fields))


class _Bounded:
    """Wraps a stream of Arrow IPC messages. Raises LeftOutError at a message with more than `most` bytes, stored or
    decompressed."""

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self._stream, self._most, self._buffer, self.closed = stream, most, b"", False
        self._pieces, self._dictionaries = list[bytes](), dict[int, int]()

    def skip_magic(self) -> None:
        """Skips the magic bytes at the start of an Arrow IPC file, if the stream begins with them."""
        self._buffer = self._stream.read(8)
        if self._buffer.startswith(b"ARROW1"):
            self._buffer = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._most:
            raise LeftOutError("too_large", f"a batch of more than {self._most:,} bytes")
        out = b""
        while len(out) < size:
            self._pieces = self._pieces or [piece for piece in self._message() if piece]
            if not self._pieces:
                break
            piece = self._pieces.pop(0)
            if len(out) + len(piece) > size:
                self._pieces.insert(0, piece[size - len(out) :])
            out = out + piece[: size - len(out)] if out else piece[:size]
        return out

    def _message(self) -> list[bytes]:
        """Reads the next message, and checks the message's decompressed size. Returns the message's bytes in parts: length,
        metadata, and body."""
        head = self._exactly(4)
        length = head + (self._exactly(4) if head == CONTINUES else b"")
        if len(length) not in (4, 8) or not (size := int.from_bytes(length[-4:], "little", signed=True)):
            return [head, length[4:]]  # the end of the stream
        about = self._exactly(size)
        if len(about) < size:
            return [head, length[4:], about]
        try:
            body = self._exactly(_value("<q", about, _field(about, _follow(about, 0), 3)))  # a flatbuffer of Message.fbs
            size, dictionary, more = _unpacked_bytes(about, body)
        except (struct.error, IndexError) as e:
            raise ValueError(f"a message that is none: {e}") from e
        if dictionary is not None:
            size += self._dictionaries.get(dictionary, 0) if more else 0
            self._dictionaries[dictionary] = size
        if sum(self._dictionaries.values()) + (size if dictionary is None else 0) > self._most:
            raise LeftOutError("too_large", f"a batch of more than {self._most:,} bytes, unpacked")
        return [head, length[4:], about, body]

    def _exactly(self, size: int) -> bytes:
        """Reads exactly `size` bytes, or fewer at the stream's end."""
        if not 0 <= size <= self._most:
            raise LeftOutError("too_large", f"a batch of more than {self._most:,} bytes")
        out, self._buffer = self._buffer[:size], self._buffer[size:]
        while len(out) < size and (piece := self._stream.read(size - len(out))):
            out += piece
        return out

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def _unpacked_bytes(about: bytes, body: bytes) -> tuple[int, int | None, bool]:
    """Returns three values; the first is the decompressed size of an Arrow message's body, in bytes.

    The others describe a dictionary: its number (None for another message), and whether the message extends an earlier
    dictionary. A compressed buffer begins with its decompressed length; a length of -1 means that the buffer is stored
    uncompressed.
    """
    message = _follow(about, 0)
    kind, head = _value("<B", about, _field(about, message, 1)), _field(about, message, 2)
    if kind not in (DICTIONARY, BATCH) or not head:
        return len(body), None, False
    batch, number, more = _follow(about, head), None, False
    if kind == DICTIONARY:
        number, more = _value("<q", about, _field(about, batch, 0)), bool(_value("<B", about, _field(about, batch, 2)))
        batch = _follow(about, _field(about, batch, 1))
    buffers = _field(about, batch, 2)
    if not buffers or not (_field(about, batch, 3) or PACKED_BEFORE in about):
        return len(body), number, more
    start, total = _follow(about, buffers) + 4, 0
    for at, length in struct.iter_unpack("<qq", about[start : start + 16 * _number("<I", about, start - 4)]):
        if length and not 0 <= at <= len(body) - 8:
            raise IndexError("a buffer outside its body")
        said = _number("<q", body, at) if length else 0
        if said < -1:
            raise IndexError("a buffer of less than no bytes")
        total += length if said == -1 else said
    return total, number, more


def _field(data: bytes, table: int, number: int) -> int:
    names = table - _number("<i", data, table)
    if names < 0:
        raise IndexError("a table outside the message")
    present = 4 + 2 * number < _number("<H", data, names)
    offset = _number("<H", data, names + 4 + 2 * number) if present else 0
    return table + offset if offset else 0


def _follow(data: bytes, at: int) -> int:
    return at + _number("<I", data, at)


def _value(form: str, data: bytes, place: int) -> int:
    return _number(form, data, place) if place else 0


def _number(form: str, data: bytes, at: int) -> int:
    return int(struct.unpack_from(form, data, at)[0])
