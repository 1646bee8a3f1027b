"""Defines a sample of an input: the parts to read, and the ratio of the whole input to the sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import xxhash

from heliostat.curation import pieces
from heliostat.curation.pieces import FilePart
from heliostat.tasks import spill

PLACES = 64  # minimum number of chosen places, if the input has as many: neighbors are often similar
OF_PLACES, OF_RECORDS, OF_LOTS = 1, 2, 3  # seeds of the three hashes
LEVELS, OF_STRATUM = 5, 32  # maximum digits of a stratum's number, and minimum number of parts of a stratum
FEW_UNKNOWN = 0.05


def chosen(what: str, rate: float, seed: int) -> bool:
    """Checks whether a record is in the sample, which has the share `rate` of all records. The hash of `what` (the record's name)
    decides."""
    return _drawn(what, seed) < rate


def evenly(parts: Iterable[FilePart], rate: float) -> list[FilePart]:
    """Chooses a share of parts with a representative mix of sizes and places. A larger share contains all parts of a smaller
    share.

    Parts are grouped into classes by size, with bounds that are powers of two. Each class contributes its share: parts that are
    spread evenly over the class in the order of paths (`_order`), because neighbors in this order are often similar. A random
    draw per class decides whether to round this share up or down. So each part has the same chance to be chosen.
    """
    classes, sample = dict[int, list[FilePart]](), list[FilePart]()
    for part in parts:
        classes.setdefault(part.length.bit_length(), []).append(part)
    for size, of_size in sorted(classes.items()):
        of_size.sort(key=lambda part: (part.path, part.start))
        name = f"{size} {of_size[0].path}\0{of_size[0].start}"
        lot, seed = _drawn(name, OF_LOTS), xxhash.xxh64_intdigest(name.encode("utf-8", "surrogatepass"), OF_PLACES)
        chosen_first = _order(len(of_size), seed)[: max(0, ceil(rate * len(of_size) - lot))]
        sample += [of_size[place] for place in chosen_first.tolist()]
    return sample


def _order(count: int, seed: int) -> np.ndarray:
    """Returns the numbers 0 to `count - 1`, int64 [count], in an order whose first numbers are spread evenly over up to 2 **
    LEVELS strata, however many they are (the radical inverse of van der Corput). Within a stratum, the order is random. So
    neighbors are drawn almost independently, as the estimate of duplicates assumes. A random rotation gives all numbers the same
    chance to come first.
    """
    levels = max(0, min(LEVELS, (count // OF_STRATUM).bit_length() - 1))
    places = np.arange(count)
    stratum = (places << levels) // count
    inverse = sum((((stratum >> level) & 1) << (levels - 1 - level) for level in range(levels)), np.zeros(count, np.int64))
    rank, drawn = np.zeros(count, np.int64), spill.mixed(places.astype(np.uint64) ^ np.uint64(seed))
    rank[np.lexsort((drawn, stratum))] = places - np.searchsorted(stratum, stratum)
    return (np.lexsort((inverse, rank)) + seed % count) % count


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
