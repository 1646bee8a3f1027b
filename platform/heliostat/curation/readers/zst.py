"""Decompresses .zst files frame by frame. Finds the ends of frames from the headers of their blocks, without decompressing."""

from __future__ import annotations

import io
from collections.abc import Generator
from typing import BinaryIO, cast

import pyarrow as pa

from heliostat.curation.readers.streams import FrameBlock, LeftOutError

MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE = range(0x184D2A50, 0x184D2A60)  # such a frame has other data, for example a table of all frames
HEADER = 18  # maximum bytes of a frame's header, with the magic bytes
MOST_BLOCK = 1 << 17  # maximum compressed bytes of a block
TOGETHER = 1 << 20  # compressed bytes of frames that are decompressed together, because frames may be small
BLOCK = 1 << 18


def frames(stream: BinaryIO, start: int, stop: int) -> Generator[FrameBlock, None, int]:
    """Yields the decompressed bytes of the frames that begin at `start` or later, and before `stop`. Consecutive small frames
    count as one frame. Returns the offset of the first frame that begins at or after `stop`, or the offset of the file's end.
    Raises LeftOutError for invalid data."""
    stream.seek(start)
    compressed = _Frames(stream, start)
    while (frame := compressed.next_frame()) is not None and frame < stop:
        compressed.until = min(stop, frame + TOGETHER)
        try:
            opened = pa.CompressedInputStream(pa.PythonFile(cast(BinaryIO, compressed), "r"), "zstd")
            while block := opened.read(BLOCK):
                yield FrameBlock(block, frame, compressed.at)
        except (pa.ArrowInvalid, OSError) as e:
            if isinstance(e, OSError) and e.errno is not None:  # an error of the stream itself
                raise
            raise LeftOutError("corrupt", str(e).partition("\n")[0]) from e
    return compressed.at


class _Frames:
    """Wraps a stream as a stream that ends where the first frame begins at or after the offset `until`. Leaves out frames without
    compressed data."""

    closed = False

    def __init__(self, stream: BinaryIO, at: int) -> None:
        self._stream, self.at, self.until = stream, at, at
        self._left, self._inside, self._checksum = 0, False, 0  # bytes up to the next header; whether a block follows

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Does nothing, because the next frames are read too."""

    def next_frame(self) -> int | None:
        """Moves to the next frame with compressed data. Returns the frame's offset; None at the end of the file."""
        while head := self._stream.read(4):
            if head == MAGIC:
                self._stream.seek(-4, io.SEEK_CUR)
                return self.at
            if len(head) < 4 or int.from_bytes(head, "little") not in SKIPPABLE:
                raise LeftOutError("corrupt", f"no frame begins at byte {self.at:,}")
            size = int.from_bytes(self._whole(4), "little")
            if size and len(self._last(size)) < 1:
                raise LeftOutError("truncated", "the file ends in a frame")
            self.at += 8 + size
        return None

    def read(self, size: int = -1) -> bytes:
        out = bytearray()
        while len(out) + HEADER <= size:
            if self._left:
                data = self._stream.read(min(self._left, size - len(out)))
                if not data:
                    raise LeftOutError("truncated", "the file ends in a frame")
                self._left -= len(data)
            elif self._inside:
                data = self._block()
            elif (frame := self.next_frame()) is None or frame >= self.until:
                break
            else:
                data = self._header()
            self.at += len(data)
            out += data
        return bytes(out)

    def _header(self) -> bytes:
        head = self._whole(5)
        single, dictionary, content = head[4] >> 5 & 1, head[4] & 3, head[4] >> 6
        self._inside, self._checksum = True, head[4] & 4
        rest = (1 - single) + (0, 1, 2, 4)[dictionary] + (single, 2, 4, 8)[content]
        return head + (self._whole(rest) if rest else b"")

    def _block(self) -> bytes:
        head = self._whole(3)
        value = int.from_bytes(head, "little")
        last, kind, size = value & 1, value >> 1 & 3, value >> 3
        if kind == 3 or (size > MOST_BLOCK and kind != 1):
            raise LeftOutError("corrupt", f"an invalid block at byte {self.at:,}")
        self._left = (1 if kind == 1 else size) + (self._checksum if last else 0)
        self._inside = not last
        return head

    def _whole(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise LeftOutError("truncated", "the file ends in a frame")
        return data

    def _last(self, size: int) -> bytes:
        """Skips `size` bytes, and returns the last of them; b"" if the file has fewer bytes."""
        self._stream.seek(size - 1, io.SEEK_CUR)
        return self._stream.read(1)
