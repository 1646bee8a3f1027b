"""Chooses a sample of a text input by the hashes of its records' places: a pure function of the listing and the fraction.

Files of one document are chosen by their paths. Of files of many, first places are chosen (ranges of lines; whole files, where a
range cannot be read), more of them the fewer there are, and then records within them, so that every record has the same chance
and only what is chosen is read. Order, the cluster and the cut into tasks play no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import xxhash

from heliostat.curation import pieces, readers
from heliostat.curation.pieces import Part
from heliostat.curation.stage import Document, Dropped
from heliostat.pipelines.prepare import InputFile
from heliostat.pipelines.text import sources
from heliostat.pipelines.text.tasks import TextSource

BLOCK = 64 << 10  # bytes of lines that are chosen together, in inputs of up to BLOCKS of them
BLOCKS = 1 << 20
PLACES = 64  # that are chosen at least, where there are so many, lest a sample is of one neighbourhood
OF_PLACES, OF_RECORDS = 1, 2  # seeds
FEW_UNKNOWN = 0.05
ONE = (".txt", ".md", ".py", ".rst", ".html", ".htm", ".xhtml", ".pdf")  # kinds of files that are one document
Kind = Literal["one", "lines", "records"]


def kind(path: str) -> Kind:
    """Tells how a file is sampled: as a whole, by ranges of its lines, or by its records as they are read."""
    suffix, codec = sources.kind(path)
    if (suffix or readers.suffix_of(path)) in ONE:
        return "one"
    return "lines" if suffix == ".jsonl" and codec is None else "records"


def chosen(what: str, rate: float, seed: int) -> bool:
    """Tells whether a place or record is among a share of all, by its hash."""
    return xxhash.xxh64_intdigest(what.encode("utf-8", "surrogatepass"), seed) < rate * (1 << 64)


@dataclass
class Sample:
    """Holds the parts that are read, the share of the records in them that is taken, by kind of file, and the sizes of both."""

    fraction: float
    parts: list[Part] = field(default_factory=list)
    records: dict[str, float] = field(default_factory=dict)
    input_bytes: int = 0
    read_bytes: int = 0
    taken_bytes: float = 0.0
    files: int = 0
    taken_files: float = 0.0
    many_bytes: int = 0
    """Of the input's bytes, those of files of many documents, whose number is not known."""

    @property
    def of_bytes(self) -> float:
        """Returns how many times the sample's bytes the input has."""
        return self.input_bytes / self.taken_bytes

    @property
    def unknown(self) -> float:
        """Returns the share of the input, in bytes, of which nobody knows how many documents it holds."""
        return self.many_bytes / max(1, self.input_bytes)

    @property
    def of_documents(self) -> float:
        """Returns how many times the sample's documents the input has: by files where they are known to be one each."""
        return self.files / self.taken_files if self.unknown < FEW_UNKNOWN else self.of_bytes

    def pieces(self) -> Iterator[list[Part]]:
        """Yields the parts in pieces of work."""
        target, held, piece = pieces.size(self.read_bytes), 0, list[Part]()
        for part in self.parts:
            piece.append(part)
            held += part.length + pieces.FILE_BYTES
            if held >= target:
                yield piece
                held, piece = 0, []
        if piece:
            yield piece


def choose(files: Iterable[InputFile], fraction: float, name: str) -> Sample:
    """Chooses a sample; `name` is the path of an input that is one file."""
    found, by_kind = Sample(fraction), dict[str, list[InputFile]]()
    for file in files:
        by_kind.setdefault(kind(file.path or name), []).append(file)
    for which, of_kind in sorted(by_kind.items()):
        total = sum(f.bytes for f in of_kind)
        block = max(BLOCK, 1 << max(0, (total // BLOCKS).bit_length()))
        parts = [part for f in of_kind for part in _places(f, which, block)]
        rate = fraction if which == "one" else min(1.0, max(fraction, PLACES / len(parts)))
        taken = [p for p in parts if chosen(f"{p.path}\0{p.start}", rate, OF_PLACES)]
        found.records[which] = fraction / rate
        found.parts += taken
        found.input_bytes += total
        found.many_bytes += 0 if which == "one" else total
        found.read_bytes += sum(part.length for part in taken)
        found.taken_bytes += sum(part.length for part in taken) * found.records[which]
        found.files += len(parts)
        found.taken_files += len(taken) * found.records[which]
    found.parts.sort(key=lambda part: (part.path, part.start))
    return found


def _places(file: InputFile, which: str, block: int) -> list[Part]:
    """Cuts a file into the places that are chosen or not."""
    ranged = which == "lines" and file.bytes > block
    whole = [Part(file.path, file.bytes, file.modified)]
    return [Part(file.path, file.bytes, file.modified, a, b) for a, b in pieces.ranges(file.bytes, block)] if ranged else whole


@dataclass(frozen=True)
class SampledSource(TextSource):
    """Reads a sample of a text input: of each part, the records whose places are chosen."""

    name: str
    records: dict[str, float]

    def read(self, part: Part) -> Iterator[Document | Dropped]:
        """Yields a part's chosen records; those of a range of lines are named after it, because their numbers are not known."""
        path = part.path or self.name
        rate = self.records[kind(path)]
        for item in TextSource.read(self, part):
            id = item.id if part.stop is None else f"{path}@{part.start}#{item.id.rpartition('#')[2]}"
            if rate >= 1 or chosen(id, rate, OF_RECORDS):
                yield Dropped(id, item.reason, item.detail) if isinstance(item, Dropped) else Document(
                    id, item.text, item.columns)  # fmt: skip
