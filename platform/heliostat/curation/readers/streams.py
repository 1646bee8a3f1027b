"""Opens compressed streams, splits text into lines, and reads files that are one document. All functions respect size limits.
For invalid data, they raise LeftOutError or yield a `Dropped`."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa

from heliostat.curation.pieces import PackedSlice
from heliostat.curation.stage import Document, Dropped

REASONS = {
    "unknown_kind": "a suffix that isn't supported",
    "corrupt": "broken compression, records, or tables; the readable data before and after the fault is kept",
    "truncated": "a record that is shorter than its declared length",
    "too_large": "more bytes than max_document_bytes or max_file_bytes, decompressed; the data before the limit is kept",
    "invalid_json": "a line that isn't a JSON object",
    "no_text": "no text column, or no string in the text column",
    "not_utf8": "bytes that aren't UTF-8",
    "not_html": "a response that isn't an HTML page",
    "http_status": "a response with a status other than 200",
    "empty": "only white space",
    "binary": "a file with a NUL character",
    "link": "a link in an archive, or a link or submodule in a git clone; heliostat doesn't follow links",
    "special": "a device or another special file in an archive",
    "outside": "a link, a clone, or a name in an archive that leads out of the input or the archive",
    "repeated": "a second file with the same name in an archive; the first file is kept",
    "packing": "an encrypted file in a .zip, or a file in a .zip with an unsupported compression",
    "bomb": "an archive that decompresses to more than 200 times its size plus 64 MiB; the data before the limit is kept",
    "unreadable": "a file that vanished, can't be opened, or isn't in its git clone",
}
CODECS = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz"}
BLOCK = 1 << 20  # bytes that are decompressed at once
LINE = 64 << 10  # bytes after the end of a range that a read includes, for the last line of the range
CHECKS = ("incorrect data check", "incorrect length check")  # zlib's messages for a wrong checksum at a member's end
ZST_BLOCK = 1 << 16  # smaller for .zst, because a fault loses the decompressed data of its block
XZ_MEMORY = 256 << 20  # maximum memory to decompress .xz; `xz -9` makes files that need 65 MiB


@dataclass(frozen=True)
class ReadLimits:
    """Defines the maximum size of a document and of a decompressed file, and the text column of records.

    `columns`: columns of records to keep with the text. None: all columns, with the record's `id` as `source_id`.
    """

    max_document_bytes: int = 1 << 26
    max_file_bytes: int = 1 << 50
    text_column: str = "text"
    columns: tuple[str, ...] | None = None

    def text_of(self, value: object) -> str | None:
        """Returns a record's value if the value is a string; otherwise None."""
        return value if isinstance(value, str) else None

    by_row: ClassVar[bool] = False
    """Whether `document` needs more columns of a Parquet row than the text column and `columns`."""

    def lacks(self, names: list[str]) -> str:
        """Explains what a table with these columns lacks; "" if its rows can be documents."""
        return "" if self.text_column in names else f"no column {self.text_column!r}"

    def document(self, id: str, values: dict[str, Any]) -> Document | Dropped:
        """Returns a record as a document with the requested columns; a `Dropped` if the record has no text or too much text."""
        text = self.text_of(values.get(self.text_column))
        if text is None:
            return Dropped(id, "no_text")
        if len(text) > self.max_document_bytes:
            return Dropped(id, "too_large", f"more than {self.max_document_bytes:,} bytes")
        if self.columns is not None:
            return Document(id, text, {name: values[name] for name in self.columns if name in values})
        columns = {k: v for k, v in values.items() if k not in (self.text_column, "id") and v is not None}
        return Document(id, text, columns | ({"source_id": values["id"]} if values.get("id") is not None else {}))

    def texts_of(self, values: pa.Array) -> pa.Array | None:
        """Returns a column's values if they are strings or a dictionary of strings; otherwise None."""
        value_type = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        return values if pa.types.is_string(value_type) or pa.types.is_large_string(value_type) else None


class LeftOutError(Exception):
    """Reports that the rest of a file can't be read. `reason`: a key of REASONS.

    `complete`: whether only a checksum is wrong, and the data before the error is complete.
    """

    def __init__(self, reason: str, detail: str = "", complete: bool = False) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.complete = reason, detail, complete


def codec_of(path: str) -> str | None:
    """Returns the compression of a path's last suffix; None if the suffix isn't in CODECS."""
    return next((codec for suffix, codec in CODECS.items() if path.lower().endswith(suffix)), None)


@dataclass(frozen=True)
class FrameBlock:
    """Holds decompressed data. A frame is the smallest part of a compressed file that can be decompressed without the data before
    it: a frame of .zst, a member of .gz, a stream of .bz2 and .xz.

    `frame`: the offset at which the frame begins. `read`: the offset up to which the compressed file was read.
    """

    data: bytes
    frame: int
    read: int


def unpacked(path: str, stream: BinaryIO, limits: ReadLimits, packed: PackedSlice | None = None,
             block: int = BLOCK) -> io.BufferedReader:  # fmt: skip
    """Returns a stream of the decompressed bytes, or of a slice of these bytes. Reading raises LeftOutError at invalid data,
    and after `max_file_bytes`. `block`: the bytes per read of a file that isn't compressed."""
    codec = codec_of(path)
    if packed is not None:
        stream.seek(packed.frame)
    plain = iter(lambda: stream.read(block), b"")
    blocks = plain if codec is None else _zst(stream) if codec == "zst" else (block.data for block in frames(stream, codec))
    return io.BufferedReader(_Blocks(blocks if packed is None else _within(blocks, packed), limits.max_file_bytes), block)


def _within(blocks: Iterator[bytes], packed: PackedSlice) -> Iterator[bytes]:
    """Yields the bytes of a slice from the blocks that begin at the slice's frame."""
    skip, left = packed.skip, packed.size
    for block in blocks:
        data = block[skip:] if left is None else block[skip : skip + left]
        skip = max(0, skip - len(block))
        if data:
            yield data
        if left is not None and (left := left - len(data)) == 0:
            return


def _zst(stream: BinaryIO) -> Iterator[bytes]:
    try:
        opened = pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd")
        while block := opened.read(ZST_BLOCK):
            yield block
    except pa.ArrowInvalid as e:
        raise LeftOutError("corrupt", str(e).partition("\n")[0]) from e
    except OSError as e:
        if e.errno is not None:  # an error of the stream itself
            raise
        raise LeftOutError("corrupt", str(e).partition("\n")[0]) from e


def _new(codec: str) -> Any:
    if codec == "gz":
        return zlib.decompressobj(zlib.MAX_WBITS | 16)
    return bz2.BZ2Decompressor() if codec == "bz2" else lzma.LZMADecompressor(memlimit=XZ_MEMORY)


def frames(stream: BinaryIO, codec: str, start: int = 0, stop: int | None = None) -> Generator[FrameBlock, None, int]:
    """Yields the decompressed bytes of the frames that begin before the offset `stop`, in blocks. The stream must be at `start`,
    where a frame begins. One block of input may become many decompressed blocks. Returns the offset of the first frame that
    begins at or after `stop`, or the offset of the file's end.

    Zeros after a frame are padding. For gzip, also yields the data before an invalid byte.
    """
    decoder, begun, ended, frame, read = _new(codec), False, False, start, start
    while data := stream.read(BLOCK):
        read += len(data)
        data = data if begun or not ended else data.lstrip(b"\0")
        while data or (begun and codec != "gz" and not decoder.needs_input):
            if not begun:
                frame = read - len(data)
                if stop is not None and frame >= stop:
                    return frame
            before = decoder.copy() if codec == "gz" else None
            try:
                block = decoder.decompress(data, BLOCK)
            except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as e:
                if before is not None and (rest := _before_break(before, data)):
                    yield FrameBlock(rest, frame, read)
                raise LeftOutError("corrupt", str(e), complete=any(check in str(e) for check in CHECKS)) from e
            begun, data = True, decoder.unconsumed_tail if codec == "gz" else b""
            if block:
                yield FrameBlock(block, frame, read - len(data))
            if decoder.eof:
                data, decoder, begun, ended = decoder.unused_data.lstrip(b"\0"), _new(codec), False, True
    if begun:
        raise LeftOutError("corrupt", f"the {codec} stream ends within a member")
    return read


def _before_break(decoder: zlib._Decompress, data: bytes) -> bytes:
    """Returns the data that a block of gzip input contains before the first invalid byte. Decompresses byte by byte."""
    out = bytearray()
    for at in range(len(data)):
        try:
            out += decoder.decompress(data[at : at + 1])
        except zlib.error:
            break
    return bytes(out)


class _Blocks(io.RawIOBase):
    """Wraps an iterator of byte blocks as a raw stream. Reading raises LeftOutError after `most` bytes."""

    def __init__(self, blocks: Iterator[bytes], most: int) -> None:
        self._blocks, self._left, self._most, self._total = blocks, memoryview(b""), most, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            if self._total > self._most:
                raise LeftOutError("too_large", f"more than {self._most:,} bytes, unpacked")
            self._left = memoryview(next(self._blocks, b""))
            before, self._total = self._total, self._total + len(self._left)
            if self._total > self._most:
                self._left = self._left[: self._most - before]
                if not self._left:
                    return self.readinto(buffer)
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._left))
        target[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def lines(stream: BinaryIO, most: int, first: int = 0, stop: int | None = None) -> Iterator[bytes | None]:
    """Yields lines with their line ends. Yields None for a line of more than `most` bytes, without the complete line in memory.

    If a file is read in ranges, yields the lines that begin between the offsets `first` and `stop`. The stream must begin one
    byte before `first`. So a line that spans many ranges is read only in the range where the line begins.
    """
    buffer, skipping, at = bytearray(), first > 0, max(0, first - 1)
    read: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
    try:
        while (stop is None or buffer or at < stop) and (block := read(BLOCK)):
            start = 0
            while (end := block.find(b"\n", start) + 1) > 0:
                if not skipping:
                    if stop is not None and not buffer and at + start >= stop:
                        return
                    yield _line(buffer, block[start:end], most)
                buffer.clear()
                start, skipping = end, False
            if not skipping and (buffer or stop is None or at + start < stop):
                buffer += memoryview(block)[start:]
                if len(buffer) > most:
                    yield None
                    buffer.clear()
                    skipping = True
            at += len(block)
    except LeftOutError as e:
        if buffer and e.complete:
            yield bytes(buffer)
        raise
    if buffer:
        yield bytes(buffer)


def _line(buffer: bytearray, end: bytes, most: int) -> bytes | None:
    """Joins the beginning (`buffer`) and the end of a line. Returns None if the line has more than `most` bytes, without the line
    end."""
    return (bytes(buffer) + end if buffer else end) if len(buffer) + len(end) <= most + 1 else None


def whole(stream: BinaryIO, most: int) -> bytes:
    """Returns all bytes of a stream; LeftOutError if the stream has more than `most` bytes."""
    out = bytearray()
    while block := stream.read(BLOCK):
        out += block
        if len(out) > most:
            raise LeftOutError("too_large", f"more than {most:,} bytes, unpacked")
    return bytes(out)


def page(path: str, stream: BinaryIO, limits: ReadLimits) -> Iterator[Document | Dropped]:
    data = _file(path, stream, limits)
    yield Document(path, data) if data.strip() else Dropped(path, "empty")


def text(path: str, stream: BinaryIO, limits: ReadLimits) -> Iterator[Document | Dropped]:
    data = _file(path, stream, limits)
    yield decoded(path, data) if data.strip() else Dropped(path, "empty")


def decoded(id: str, data: bytes, columns: dict[str, object] | None = None) -> Document | Dropped:
    """Returns a document from UTF-8 bytes, without the byte-order mark; a `Dropped` if the bytes aren't UTF-8."""
    try:
        return Document(id, data.decode("utf-8-sig"), columns or {})
    except UnicodeDecodeError:
        return Dropped(id, "not_utf8")


def _file(path: str, stream: BinaryIO, limits: ReadLimits) -> bytes:
    return whole(unpacked(path, stream, limits), min(limits.max_document_bytes, limits.max_file_bytes))
