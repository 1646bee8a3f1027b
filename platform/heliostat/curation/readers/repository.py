"""Makes documents from a repository's files: one document per file, with `path`, `repository`, `language`, and `license`.

Archives and clones yield their files as members. All members are read twice: first for the license files, then for all files.
Members are untrusted. Nothing is written to disk, so the names of members have no effect. Links aren't followed. Sizes are
checked before decompression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import xxhash

from heliostat.curation.code_languages import language_of
from heliostat.curation.licenses import MOST, Licenses, is_license_file
from heliostat.curation.readers.streams import LeftOutError, ReadLimits
from heliostat.curation.stage import Document, Dropped

MEMBERS = 1_000_000  # maximum members of a repository
LICENSE_FILES = 10_000
NAME = 4096  # maximum characters of a name


class MemberError(LeftOutError):
    """Reports that one member of an archive or a git clone can't be read. The reader continues with the next member."""


@dataclass(frozen=True)
class RepositoryFile:
    """Describes a file of a repository: its name, size in bytes, and kind. Call `read` for the content before you request the
    next file."""

    name: str
    size: int
    kind: Literal["file", "link", "special"]
    read: Callable[[], bytes]


Members = Callable[[], Iterator[RepositoryFile]]
"""Yields a repository's files, from the first file at each call. Raises LeftOutError if the remaining files can't be read."""


def name_of(raw: bytes) -> str:
    """Decodes a file's name from UTF-8. Invalid bytes become backslash escapes, so that every name can be stored."""
    return raw.decode("utf-8", "backslashreplace")


def documents(path: str, members: Members, limits: ReadLimits, about: dict[str, str]) -> Iterator[Document | Dropped]:
    """Yields the documents of the repository at `path`, and a `Dropped` for each dropped file. `about`: columns to add to every
    document."""
    licenses, seen = _licenses(members), set[int]()
    try:
        for number, member in enumerate(members(), 1):
            if number > MEMBERS:
                raise LeftOutError("too_large", f"more than {MEMBERS:,} files")
            id, name = f"{path}#{member.name[:NAME]}", xxhash.xxh64_intdigest(member.name.encode("utf-8", "surrogatepass"))
            if name in seen or len(member.name) > NAME:
                yield Dropped(f"{id}#{number}", "repeated" if name in seen else "corrupt", f"file {number:,}")
            else:
                yield _document(id, member, limits, licenses, about)
            seen.add(name)
    except LeftOutError as e:
        yield Dropped(path, e.reason, e.detail)


def _licenses(members: Members) -> Licenses:
    """Reads the repository's license files. Ignores unreadable files, because the later pass over all files reports them."""
    licenses, count = Licenses(), 0
    try:
        for number, member in enumerate(members(), 1):
            if number > MEMBERS:
                break
            if member.kind == "file" and _outside(member.name) is False and is_license_file(member.name):
                count += 1
                licenses.add(member.name, _text(member) if count <= LICENSE_FILES else "")  # "" means that the license is unknown
    except LeftOutError:
        pass
    return licenses


def _text(member: RepositoryFile) -> str:
    try:
        return member.read().decode("utf-8", "replace") if member.size <= MOST else ""
    except MemberError:
        return ""


def _document(
    id: str, member: RepositoryFile, limits: ReadLimits, licenses: Licenses, about: dict[str, str]
) -> Document | Dropped:
    if member.kind != "file":
        return Dropped(id, member.kind)
    if _outside(member.name):
        return Dropped(id, "outside", "its name leads out of the repository")
    if member.size > limits.max_document_bytes:
        return Dropped(id, "too_large", f"more than {limits.max_document_bytes:,} bytes")
    try:
        data = member.read()
        if not data.strip():
            return Dropped(id, "empty")
        if b"\0" in data:
            return Dropped(id, "binary")
        text = data.decode("utf-8-sig")
    except MemberError as e:
        return Dropped(id, e.reason, e.detail)
    except UnicodeDecodeError as e:
        return Dropped(id, "not_utf8", f"byte {e.start:,}")
    columns = {**about, "path": member.name, "license": licenses.of(member.name, text)}
    if language := language_of(member.name, text):
        columns["language"] = language
    return Document(id, text, columns)


def _outside(name: str) -> bool:
    return not name or name.startswith("/") or ".." in name.replace("\\", "/").split("/")
