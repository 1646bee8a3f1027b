"""Chooses a sample of a text input: a pure function of the listing and the fraction.

Files with one document are chosen by the hashes of their paths. Large and small files have the same chance. Files with many
documents are split into ranges of lines; a file that can't be split is one range. First, hashes choose some of the ranges. If
there are few ranges, heliostat chooses a larger share of the ranges. Then hashes choose records in these ranges. So every record
has the same chance, and heliostat reads only the chosen ranges. The sample doesn't depend on the order, the cluster, or the split
into tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Literal

from heliostat.curation import pieces, readers
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.sampled import OF_RECORDS, PLACES, SampledParts, chosen, evenly, place
from heliostat.curation.stage import Document, Dropped
from heliostat.curation.text.tasks import TextSource
from heliostat.tasks import cpu_time

BLOCK = 64 << 10  # bytes of a range of lines, in inputs of up to BLOCKS ranges
BLOCKS = 1 << 20
RANGES = 256  # minimum number of chosen ranges of lines; they are small, and complete files may be large
Kind = Literal["one", "lines", "records"]


def kind(path: str) -> Kind:
    """Returns how a file is sampled: as a complete file, by ranges of lines, or by records during reading."""
    number = readers.numbered(path)
    if number == "":
        return "one"
    return "lines" if number == "line" and readers.ranged(path) else "records"


def choose(files: Iterable[InputFile], fraction: float, name: str) -> SampledParts:
    """Chooses a sample of about `fraction` of the input. `name`: the path of an input that is a single file."""
    sample, by_kind = SampledParts(fraction, name), dict[str, list[InputFile]]()
    for file in files:
        by_kind.setdefault(kind(file.path or name), []).append(file)
    for which, of_kind in sorted(by_kind.items()):
        total = sum(f.bytes for f in of_kind)
        block = max(BLOCK, 1 << max(0, (total // BLOCKS).bit_length()))
        parts = [part for f in of_kind for part in _places(f, which, block)]
        least = RANGES if which == "lines" else PLACES
        rate = fraction if which == "one" else min(1.0, max(fraction, least / len(parts)))
        sample.add(which, parts, evenly(parts, rate), which == "one", fraction / rate)
    sample.parts.sort(key=lambda part: (part.path, part.start))
    return sample


def _places(file: InputFile, which: str, block: int) -> list[FilePart]:
    """Splits a file into ranges of about `block` bytes, from which the sample is chosen. A file that can't be split is one
    range."""
    ranged = which == "lines" and file.bytes > block
    whole = file.part
    return [replace(whole, start=a, stop=b) for a, b in pieces.ranges(file.bytes, block)] if ranged else [whole]


@dataclass(frozen=True)
class SampledTexts(TextSource):
    """Reads a sample of a text input: from each part, only the chosen records."""

    name: str
    records: dict[str, float]

    def rate(self, part: FilePart) -> float:
        """Returns the share of a part's records that are in the sample."""
        return self.records[kind(part.path or self.name)]

    def read(self, part: FilePart) -> Iterator[Document | Dropped]:
        """Yields a part's chosen records. In a range of lines, the range is a part of a record's id, because the line numbers in
        the file aren't known."""
        rate, items = self.rate(part), TextSource.read(self, part)
        if part.stop is not None:  # a task of the complete input opens a range for 100 MB, and not for each 64 KB
            with cpu_time.loading():
                first = list(islice(items, 1))
            items = chain(first, items)
        for item in items:
            id = item.id if part.stop is None else f"{place(part, self.name)}#{item.id.rpartition('#')[2]}"
            if rate >= 1 or chosen(id, rate, OF_RECORDS):
                yield Dropped(id, item.reason, item.detail) if isinstance(item, Dropped) else Document(
                    id, item.text, item.columns)  # fmt: skip
