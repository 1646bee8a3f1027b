"""Reads archives of code: .tar, with any compression, and .zip. Writes nothing to disk, and has only one of the archive's files
in memory.

An archive is a bomb if it decompresses to more than RATIO times its size plus MUCH bytes. Reading stops at this limit, and
reports the archive as a `Dropped` with the reason `bomb`.
"""

from __future__ import annotations

import bz2
import copy
import io
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO, cast

from heliostat.curation.readers import repository
from heliostat.curation.readers.repository import MemberError, RepositoryFile, name_of
from heliostat.curation.readers.streams import CODECS, LeftOutError, ReadLimits, unpacked
from heliostat.curation.stage import Document, Dropped

RATIO, MUCH = 200, 64 << 20
HEAD = 1 << 20  # maximum bytes to read up to the next member of a .tar
DIRECTORY = 64 << 20  # maximum bytes of a .zip's directory, and of one read
BLOCK = 1 << 20
PACKINGS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2}  # LZMA uses as much memory as the archive claims
ENCRYPTED = 1
_SUFFIX = re.compile(rf"\.(?:tar(?:{'|'.join(map(re.escape, CODECS))})?|tgz|zip)$", re.IGNORECASE)
_BROKEN = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    KeyError,
    IndexError,
)  # fmt: skip (bz2 raises an OSError without an errno)


def is_archive(path: str) -> bool:
    return _SUFFIX.search(path) is not None


def read(path: str, stream: BinaryIO, limits: ReadLimits) -> Iterator[Document | Dropped]:
    """Yields the files of an archive. An id is the archive's path, `#`, and the file's path."""
    end = _SUFFIX.search(path)
    assert end, path
    members = _zip if end[0].lower() == ".zip" else _tar
    about = {"repository": path[: end.start()]}
    yield from repository.documents(path, partial(members, path, stream, limits), limits, about)


def _tar(path: str, stream: BinaryIO, limits: ReadLimits) -> Iterator[RepositoryFile]:
    most = _most(stream, limits)
    stream.seek(0)
    name = f"{path[:-4]}.tar.gz" if path.lower().endswith(".tgz") else path
    packed = unpacked(name, cast(BinaryIO, _Reads(stream)), replace(limits, max_file_bytes=most))
    yield from _members(_Forward(packed, _bomb(most) if most < limits.max_file_bytes else None))


def _members(plain: _Forward) -> Iterator[RepositoryFile]:
    plain.allow(HEAD)
    try:
        archive: Any = tarfile.TarFile(fileobj=plain, errors="surrogateescape", encoding="utf-8")
        while (member := archive.next()) is not None:
            archive.members = []  # otherwise, tarfile keeps all members
            name = name_of(member.name.encode("utf-8", "surrogateescape"))
            kind = "link" if member.issym() or member.islnk() else "file" if member.isfile() else "special"
            if not member.isdir():
                yield RepositoryFile(name, member.size, kind, partial(_of_tar, archive, plain, member))  # type: ignore[arg-type]
            plain.allow(HEAD)
    except (*_BROKEN, OSError) as e:
        raise _unreadable(e) from e
    if plain.last.strip(b"\0"):
        raise LeftOutError("corrupt", "what follows a file is no file")
    if not plain.last:
        raise LeftOutError("truncated", "no mark at its end")
    while plain.take(BLOCK):  # reads to the end, where compression faults may appear
        pass


def _of_tar(archive: Any, plain: _Forward, member: tarfile.TarInfo) -> bytes:
    plain.allow(member.size + HEAD)
    try:
        with archive.extractfile(member) as file:
            return bytes(file.read(member.size))
    except (*_BROKEN, OSError) as e:
        raise _unreadable(e) from e


class _Forward(io.RawIOBase):
    """Wraps a stream as a file that can only be read forward. Rejects a read of more bytes than `allow` has allowed, because a
    header may claim terabytes."""

    def __init__(self, stream: BinaryIO, too_large: LeftOutError | None) -> None:
        self._stream, self._too_large = stream, too_large
        self._at, self._left, self.last = 0, 0, b""

    def allow(self, count: int) -> None:
        self._left = count

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence or offset < self._at:
            raise LeftOutError("corrupt", "it leads backwards")
        while self._at < offset:
            if not self.take(min(BLOCK, offset - self._at)):
                raise LeftOutError("truncated", "it ends within a file")
        return self._at

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._left:
            raise LeftOutError("corrupt", f"a head of more than {HEAD:,} bytes")
        self.last = self.take(size)
        self._left -= len(self.last)
        return self.last

    def take(self, size: int) -> bytes:
        """Reads `size` bytes, regardless of the limit; fewer at the end of the stream."""
        try:
            data = self._stream.read(size)
        except LeftOutError as e:
            raise (self._too_large if self._too_large and e.reason == "too_large" else e) from e
        self._at += len(data)
        return data


def _zip(path: str, stream: BinaryIO, limits: ReadLimits) -> Iterator[RepositoryFile]:
    most, total, reads = _most(stream, limits), 0, _Reads(stream)
    try:
        with zipfile.ZipFile(reads) as archive:
            for member in archive.infolist():
                if member.is_dir():
                    continue
                mode = member.external_attr >> 16
                kind = "link" if stat.S_ISLNK(mode) else "file" if stat.S_ISREG(mode) or not stat.S_IFMT(mode) else "special"
                total += min(member.file_size, limits.max_document_bytes)
                if total > most:
                    raise _bomb(most)
                name = name_of(member.filename.encode("utf-8", "surrogateescape"))
                yield RepositoryFile(name, member.file_size, kind, partial(_of_zip, archive, member))  # type: ignore[arg-type]
    except (*_BROKEN, OSError) as e:
        raise _unreadable(reads.error or e) from e


def _of_zip(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.flag_bits & ENCRYPTED or member.compress_type not in PACKINGS:
        packed = "encrypted" if member.flag_bits & ENCRYPTED else f"packed by method {member.compress_type}"
        raise MemberError("packing", packed)
    out = bytearray()
    try:
        for block in _unpacked_bz2(archive, member) if member.compress_type == zipfile.ZIP_BZIP2 else _blocks(archive, member):
            out += block
    except (*_BROKEN, OSError) as e:
        broken = _unreadable(e)
        raise MemberError(broken.reason, broken.detail) from e
    if len(out) != member.file_size:
        raise MemberError("truncated", f"{len(out):,} bytes, and {member.file_size:,} are said")
    return bytes(out)


def _blocks(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(member) as file:
        while block := file.read(BLOCK):
            yield block


def _unpacked_bz2(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yields the decompressed blocks of a bzip2 member, up to the size in the member's header. Python's zipfile has no such
    limit."""
    packed = copy.copy(member)
    packed.compress_type, packed.file_size = zipfile.ZIP_STORED, member.compress_size
    packed.CRC = None  # type: ignore[assignment]  # it covers the decompressed data
    decoder, left, crc = bz2.BZ2Decompressor(), member.file_size, 0
    for data in _blocks(archive, packed):
        while left and not decoder.eof and (data or not decoder.needs_input):
            block = decoder.decompress(data, min(left, BLOCK))
            left, crc, data = left - len(block), zlib.crc32(block, crc), b""
            yield block
        if not left or decoder.eof:
            break
    if crc != member.CRC:
        raise zipfile.BadZipFile(f"another checksum than that of {member.filename[:100]!r}")


class _Reads:
    """Wraps a stream for zipfile. Never closes the stream, and rejects a read of more than DIRECTORY bytes, the limit for the
    directory of a .zip."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        self.seek, self.tell, self.seekable, self.readable = stream.seek, stream.tell, stream.seekable, stream.readable

    def read(self, size: int = -1) -> bytes:
        if size > DIRECTORY:
            raise LeftOutError("too_large", f"a directory of more than {DIRECTORY:,} bytes")
        try:
            return self._stream.read(DIRECTORY if size < 0 else size)
        except OSError as e:
            self.error = e  # zipfile reports this error as a fault of the archive
            raise

    def close(self) -> None:
        """Does nothing: the stream stays open, because the reader reads the stream again."""


def _most(stream: BinaryIO, limits: ReadLimits) -> int:
    return min(limits.max_file_bytes, RATIO * stream.seek(0, io.SEEK_END) + MUCH)


def _bomb(most: int) -> LeftOutError:
    return LeftOutError("bomb", f"more than {most:,} bytes, unpacked: {RATIO} times its size and {MUCH >> 20} MiB")


def _unreadable(error: Exception) -> LeftOutError:
    """Converts an error of an archive's content to a LeftOutError. Raises an OSError with an errno unchanged, because the cause
    is the stream, not the content."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return LeftOutError("corrupt", f"{type(error).__name__}: {str(error)[:200]}")
