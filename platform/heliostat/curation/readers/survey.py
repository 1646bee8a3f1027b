"""Finds the places in a large compressed file at which tasks can begin to read.

A reader can begin at a frame: a frame of .zst, a member of .gz, a stream of .xz. Bytes that look like the beginning of a
frame may be data in a frame. So one task per range of the file searches the range's first frame, and decompresses all frames up
to the first frame after the range. If each range ends where the next range begins, all frames are real, because the first range
begins at the file's start (`split`). Otherwise, one task surveys the file from its start.

A frame that is longer than a range is divided too. The tasks of its slices decompress the frame from its start, and skip the
data of earlier slices. Decompressing is cheap compared with filters and tokenizers.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any, BinaryIO

from heliostat.curation.pieces import FilePart, PackedSlice
from heliostat.curation.readers import streams, zst
from heliostat.curation.readers.records import Archive, Broken
from heliostat.curation.readers.streams import BLOCK, FrameBlock, LeftOutError
from heliostat.curation.readers.warc import MOST_BREAKS

MAGIC = {"gz": b"\x1f\x8b\x08", "zst": zst.MAGIC, "xz": b"\xfd7zXZ\0"}  # .bz2 is as slow to decompress as to filter
MOST_TRIES = 100  # maximum places in a range that look like the beginning of a frame and aren't
MOST_SLICES = {"gz": 8, "zst": 16, "xz": 4}
"""Maximum slices of a frame, fewer if decompressing is slow: on average, a task decompresses half of the frame before its own
slice."""


@dataclass(frozen=True)
class Mark:
    """Describes a place at which a task can begin to read.

    `at`: the offset in the compressed file, exact only at the beginning of a frame. `frame`: the offset of the frame from which a
    reader decompresses. `skip`: the decompressed bytes between the frame's beginning and the place. `offset` and `line`: the
    decompressed bytes and the line ends between the survey's beginning and the place.
    """

    at: int
    frame: int
    skip: int = 0
    offset: int = 0
    line: int = 0


@dataclass(frozen=True)
class Survey:
    """Holds what a survey found in a range of a compressed file.

    `begins`: the offset of the range's first frame; None if no frame begins in the range. `ends`: the offset of the first frame
    after the range; None if the data is damaged or too large. `bytes`, `lines`, and `faults`: the decompressed bytes, the line
    ends, and the invalid records between the two frames.
    """

    begins: int | None = None
    ends: int | None = None
    bytes: int = 0
    lines: int = 0
    faults: int = 0
    marks: list[Mark] = field(default_factory=list)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Survey:
        """Returns a survey from its JSON values."""
        return cls(**record | {"marks": [Mark(**mark) for mark in record["marks"]]})


def split(ranges: list[FilePart], surveys: list[Survey], limit: int) -> list[FilePart] | None:
    """Splits a file into parts that begin at the marks of its surveys, which have one range each. Returns None if a range doesn't
    end where the next one begins, or if the file has more than `limit` decompressed bytes."""
    marks, at, offset, line, faults = list[Mark](), 0, 0, 0, 0
    for part, survey in zip(ranges, surveys, strict=True):
        if part.stop is not None and at >= part.stop:  # an earlier frame ends after this range
            continue
        if survey.begins != at or survey.ends is None:
            return None
        marks += [replace(mark, offset=mark.offset + offset, line=mark.line + line) for mark in survey.marks]
        at, offset, line, faults = survey.ends, offset + survey.bytes, line + survey.lines, faults + survey.faults
    if offset > limit or faults >= MOST_BREAKS:  # a reader of the complete file stops at the last of these faults
        return None
    file = replace(ranges[0], stop=None)
    marks = [mark for mark in marks if mark.offset < offset]
    if len(marks) < 2:
        return [file]
    parts = [_part(file, mark, after.at, after.offset) for mark, after in pairwise(marks)]
    return [*parts, _part(file, marks[-1], file.bytes, None)]


def _part(file: FilePart, mark: Mark, stop: int, end: int | None) -> FilePart:
    packed = PackedSlice(mark.frame, mark.skip, None if end is None else end - mark.offset)
    return replace(file, start=mark.at, stop=stop, first=mark.line + 1, packed=packed)


def of_lines(stream: BinaryIO, codec: str, start: int, stop: int, target: int, limit: int) -> Survey:
    """Surveys the frames of a compressed file of lines that begin in a range. Marks the file's start, and the first line that
    begins in each part of about `target` compressed bytes."""
    for frame in islice(_places(stream, MAGIC[codec], start, stop), MOST_TRIES) if start else (0,):
        walk = _Lines(frame, target, MOST_SLICES[codec])
        try:
            return walk.over(_frames(stream, codec, frame, stop), limit)
        except LeftOutError:
            if walk.frame != frame:  # so the first frame is valid, and a later one is damaged
                return Survey(frame)
    return Survey()


def _frames(stream: BinaryIO, codec: str, start: int, stop: int) -> Generator[FrameBlock, None, int]:
    stream.seek(start)
    return zst.frames(stream, start, stop) if codec == "zst" else streams.frames(stream, codec, start, stop)


def _places(stream: BinaryIO, magic: bytes, start: int, stop: int) -> Iterator[int]:
    """Yields the offsets from `start` to `stop` at which a stream has the bytes `magic`."""
    while start < stop:
        stream.seek(start)
        block = stream.read(min(BLOCK, stop - start) + len(magic) - 1)
        place = block.find(magic)
        while place >= 0:
            yield start + place
            place = block.find(magic, place + 1)
        start += BLOCK


class _Lines:
    """Counts the lines of decompressed data, and marks lines at which tasks can begin."""

    def __init__(self, begins: int, target: int, most: int) -> None:
        self.begins, self.target, self.step, self.most = begins, target, target, most
        self.frame, self.frame_offset, self.offset, self.lines = begins, 0, 0, 0
        self.marks, self.slices = list[Mark](), list[Mark]()  # `slices`: marks in the current frame, after its first line
        self.last = self.read = begins  # where the last mark was requested, and up to where the file was read
        self.wanted: Mark | None = Mark(begins, begins)  # becomes a mark at the next line; `offset` is the frame's
        if not begins:
            self._mark(Mark(0, 0))

    def over(self, blocks: Generator[FrameBlock, None, int], limit: int) -> Survey:
        """Surveys the blocks up to their end. Raises LeftOutError for invalid data, and for more than `limit` bytes."""
        while True:
            try:
                block = next(blocks)
            except StopIteration as end:
                self._end_frame(end.value)
                return Survey(self.begins, end.value, self.offset, self.lines, 0, self.marks)
            self._take(block)
            if self.offset > limit:
                raise LeftOutError("too_large", f"more than {limit:,} bytes, unpacked")

    def _take(self, block: FrameBlock) -> None:
        if block.frame != self.frame:
            self._end_frame(block.frame)
            self.frame, self.frame_offset, self.step = block.frame, self.offset, self.target
            if self.wanted or block.frame - self.last >= self.target:
                self._want(block.frame)
        elif not self.wanted and self.read - self.last >= self.step:
            self._want(self.read)
        self.read = block.read
        if self.wanted and (end := block.data.find(b"\n") + 1):
            place = self.offset + end
            self._mark(replace(self.wanted, skip=place - self.wanted.offset, offset=place, line=self.lines + 1))
        self.offset += len(block.data)
        self.lines += block.data.count(b"\n")

    def _want(self, at: int) -> None:
        self.wanted, self.last = Mark(at, self.frame, offset=self.frame_offset), at

    def _mark(self, mark: Mark) -> None:
        self.wanted = None
        if mark.at == mark.frame:
            self.marks += [*self.slices, mark]
            self.slices = []
            return
        self.slices.append(mark)
        if len(self.slices) == self.most:
            self.slices, self.step = self.slices[1::2], 2 * self.step

    def _end_frame(self, end: int) -> None:
        """Keeps the marks of the current frame. A short last slice isn't worth the time to skip the others."""
        if self.slices and 2 * (end - self.slices[-1].at) < self.step:
            self.slices.pop()
        self.marks += self.slices
        self.slices, self.last = [], max(self.begins, self.marks[-1].at if self.marks else 0)


def of_records(stream: BinaryIO, start: int, stop: int, target: int, limit: int) -> Survey:
    """Surveys the gzip members of a web archive that begin in a range. Marks the file's start, and the first member with a valid
    record in each part of about `target` compressed bytes."""
    archive = Archive(stream, True, max(0, start - 1))
    begins, marks, size, faults = (None, list[Mark](), 0, 0) if start else (0, [Mark(0, 0)], 0, 0)
    more = not start or archive.resume()
    while more and (begins is not None or archive.member < stop):
        try:
            for record in archive.records(0):
                member = archive.member
                if member >= stop:
                    return Survey() if begins is None else Survey(begins, member, size, 0, faults, marks)
                if begins is None:
                    begins, faults = member, 0
                if not marks or member - marks[-1].at >= target:
                    marks.append(Mark(member, member, offset=size))
                size += record.size
                if size > limit:
                    return Survey(begins)
            break
        except Broken:
            faults += 1
            if faults > (MOST_TRIES if begins is None else MOST_BREAKS):
                return Survey(begins)
            more = archive.resume()
    return Survey() if begins is None else Survey(begins, stream.seek(0, io.SEEK_END), size, 0, faults, marks)
