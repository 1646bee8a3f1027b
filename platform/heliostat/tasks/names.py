"""Packs the names of temporary files, because the driver of `heliostat data prepare` holds millions of them.

A name has the file's digest and size (`named`). As a string, a name takes 112 bytes. Packed, it takes 25 bytes.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

NAMED = re.compile(r"[0-9a-f]{2}/([0-9a-f]{32})-(\d+)\.\w+")
SUFFIXES = (".parquet", ".json")
PACKABLE = re.compile(r"(?=(..)/\1)../([0-9a-f]{32})-(0|[1-9][0-9]{0,18})(\.parquet|\.json)")
OTHER = len(SUFFIXES)  # marks a name of another form. Its UTF-8 bytes follow
SIZES = struct.Struct("<BQ")  # place of the suffix in SUFFIXES, size in the name; or OTHER, length of the name
DIGEST_BYTES = 16
COUNTS = struct.Struct("<qq")  # rows and bytes of a run


def named(data: bytes, suffix: str) -> str:
    """Returns the name of the temporary file for this content: a prefix of the SHA-256, the size, and the suffix."""
    return _name(hashlib.sha256(data).hexdigest()[: 2 * DIGEST_BYTES], len(data), suffix)


def size_of(name: str) -> int | None:
    """Returns the size in bytes that is in a temporary file's name; None if `named` didn't make this name."""
    match = NAMED.fullmatch(name)
    return int(match[2]) if match else None


def _name(digest: str, size: int, suffix: str) -> str:
    return f"{digest[:2]}/{digest}-{size}{suffix}"


def packed(*names: str) -> bytes:
    """Returns names as few bytes, from which `unpacked` returns the names. Any string has such bytes, but only the names of
    `named` become shorter."""
    return b"".join(map(_packed, names))


def _packed(name: str) -> bytes:
    if match := PACKABLE.fullmatch(name):
        return SIZES.pack(SUFFIXES.index(match[4]), int(match[3])) + bytes.fromhex(match[2])
    encoded = name.encode()
    return SIZES.pack(OTHER, len(encoded)) + encoded


def unpacked(data: bytes | bytearray, at: int = 0) -> Iterator[str]:
    """Yields the names that `packed` has packed, one after another, from the byte `at` on."""
    while at < len(data):
        place, size = SIZES.unpack_from(data, at)
        at += SIZES.size
        stop = at + (size if place == OTHER else DIGEST_BYTES)
        yield data[at:stop].decode() if place == OTHER else _name(data[at:stop].hex(), size, SUFFIXES[place])
        at = stop


@dataclass
class SpilledNames:
    """Lists names of temporary files, in 25 bytes each."""

    _data: bytearray = field(default_factory=bytearray)

    def append(self, name: str) -> None:
        self._data += packed(name)

    def extend(self, names: Iterable[str]) -> None:
        self._data += packed(*names)

    def __iter__(self) -> Iterator[str]:
        return unpacked(self._data)


class SpilledRun:
    """Describes a temporary file of documents (a run): its name, the number of its documents, and their bytes. `decided`: the
    temporary files that list which of these documents were dropped later. The fields are packed into one value."""

    __slots__ = ("_packed",)

    def __init__(self, name: str, rows: int, bytes: int, decided: Iterable[str] = ()) -> None:
        self._packed = COUNTS.pack(rows, bytes) + packed(name, *decided)

    @property
    def rows(self) -> int:
        return int(COUNTS.unpack_from(self._packed)[0])

    @property
    def bytes(self) -> int:
        return int(COUNTS.unpack_from(self._packed)[1])

    @property
    def name(self) -> str:
        return next(unpacked(self._packed, COUNTS.size))

    @property
    def decided(self) -> tuple[str, ...]:
        return tuple(unpacked(self._packed, COUNTS.size))[1:]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpilledRun) and self._packed == other._packed

    def __hash__(self) -> int:
        return hash(self._packed)

    def __repr__(self) -> str:
        return f"SpilledRun({self.name!r}, {self.rows}, {self.bytes}, {self.decided})"
