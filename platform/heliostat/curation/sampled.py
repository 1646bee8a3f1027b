"""Defines a sample of an input: the parts to read, and the ratio of the whole input to the sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import xxhash

from heliostat.curation import pieces
from heliostat.curation.pieces import FilePart

PLACES = 64  # minimum number of chosen places, if the input has as many: neighbors are often similar
OF_PLACES, OF_RECORDS, OF_LOTS = 1, 2, 3  # seeds of the three hashes
FEW_UNKNOWN = 0.05


def chosen(what: str, rate: float, seed: int) -> bool:
    """Checks whether a record is in the sample, which has the share `rate` of all records. The hash of `what` (the record's name)
    decides."""
    return _drawn(what, seed) < rate


def evenly(parts: Iterable[FilePart], rate: float) -> list[FilePart]:
    """Chooses a share of parts with a representative mix of sizes. A larger share contains all parts of a smaller share.

    Parts are grouped into classes by size, with bounds that are powers of two. Each class contributes its share, in the order of
    the parts' hashes. A random draw per class decides whether to round this share up or down. So each part has the same chance to
    be chosen, and within a class, pairs are almost independent.
    """
    classes, sample = dict[int, list[FilePart]](), list[FilePart]()
    for part in parts:
        classes.setdefault(part.length.bit_length(), []).append(part)
    for size, of_size in sorted(classes.items()):
        of_size.sort(key=lambda part: _drawn(f"{part.path}\0{part.start}", OF_PLACES))
        lot = _drawn(f"{size} {of_size[0].path}\0{of_size[0].start}", OF_LOTS)
        sample += [part for rank, part in enumerate(of_size) if rank + lot < rate * len(of_size)]
    return sample


def _drawn(what: str, seed: int) -> float:
    return xxhash.xxh64_intdigest(what.encode("utf-8", "surrogatepass"), seed) / (1 << 64)


def place(part: FilePart, name: str) -> str:
    """Returns the prefix of the ids of all documents in a part: a file's path, or `path@start` for a range of a file. `name`: the
    path of an input that is a single file."""
    path = part.path or name
    return path if part.stop is None else f"{path}@{part.start}"


@dataclass
class SampledParts:
    """Holds a sample: the parts to read, the share of the parts' records to take (by kind of file), and the sizes of the input
    and the sample."""

    fraction: float
    name: str = ""
    """Path of the input, if the input is a single file."""
    parts: list[FilePart] = field(default_factory=list)
    records: dict[str, float] = field(default_factory=dict)
    input_bytes: int = 0
    read_bytes: int = 0
    taken_bytes: float = 0.0
    files: int = 0
    taken_files: float = 0.0
    places: list[str] = field(default_factory=list)
    """Prefixes of document ids (`place`), one for each part that has many documents."""
    many_bytes: int = 0
    """Bytes of the input files that have many documents each. The number of these documents isn't known."""

    def add(self, kind: str, parts: list[FilePart], taken: list[FilePart], one: bool, rate: float) -> None:
        """Adds `parts` of the input. The sample contains the parts in `taken`, and a share `rate` of the records in each of
        these parts. `one`: whether each part is one document."""
        total, read = sum(part.length for part in parts), sum(part.length for part in taken)
        self.records[kind] = rate
        self.parts += taken
        self.input_bytes += total
        self.many_bytes += 0 if one else total
        self.places += [] if one else [place(part, self.name) for part in taken]
        self.read_bytes += read
        self.taken_bytes += read * rate
        self.files += len(parts)
        self.taken_files += len(taken) * rate

    @property
    def of_bytes(self) -> float:
        """Returns the ratio of the input's bytes to the sample's bytes."""
        return self.input_bytes / self.taken_bytes

    @property
    def unknown(self) -> float:
        """Returns the share of the input's bytes for which the number of documents is unknown."""
        return self.many_bytes / max(1, self.input_bytes)

    @property
    def of_documents(self) -> float:
        """Returns the ratio of the input's number of documents to the sample's number. If almost all files have one document,
        this is the ratio of the numbers of files. Otherwise, this is the ratio of the bytes."""
        return self.files / self.taken_files if self.unknown < FEW_UNKNOWN else self.of_bytes

    def pieces(self) -> Iterator[list[FilePart]]:
        """Yields the parts in pieces of similar size, one piece per task."""
        target, size, piece = pieces.size(self.read_bytes), 0, list[FilePart]()
        for part in self.parts:
            piece.append(part)
            size += part.length + pieces.FILE_BYTES
            if size >= target:
                yield piece
                size, piece = 0, []
        if piece:
            yield piece
