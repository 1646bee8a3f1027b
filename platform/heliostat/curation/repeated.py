"""Finds the parts of documents that others have too, of any number of documents: signed, chosen by hash, and removed.

Every part of a text is spilled under the hash of its content. A task holds the hashes of one part of all keys: it finds the first
occurrence of each, then goes through the occurrences some at a time and spills the others under the document that they are in.
So a line that is in every document takes no more memory than one that is in two. What is first follows from the documents' ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import xxhash

from heliostat.curation import segment
from heliostat.curation.comparable import words
from heliostat.curation.segment import SpilledRun, by_run, survivors
from heliostat.storage.locations import Location
from heliostat.tasks import spill

Unit = Literal["line", "paragraph"]
BETWEEN = {"line": "\n", "paragraph": "\n\n"}
HELD = 1 << 20  # occurrences that are held before they are merged or spilled
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # the hash of each occurrence, of its document, and its place there


class Signing(Protocol):
    """Hashes the parts of texts that are compared; an object of plain fields, which travels to tasks."""

    def hashes(self, text: str) -> list[tuple[int, int]]:
        """Lists (place, hash of the content) of a text's parts."""
        ...


@dataclass(frozen=True)
class ComparedParts:
    """Defines lines or paragraphs that are compared, and how."""

    unit: Unit
    min_words: int
    normalise: bool

    def hashes(self, text: str) -> list[tuple[int, int]]:
        """Lists (place, hash of the content) of a text's parts that have enough words."""
        parts = text.split(BETWEEN[self.unit])
        found = words(parts)
        long = np.flatnonzero(found.counts >= self.min_words)
        if not self.normalise:
            return [(i, _hash(" ".join(parts[i].split()))) for i in long.tolist()]
        ends = np.cumsum(found.counts)[long]
        return list(zip(long.tolist(), found.spans(ends - found.counts[long], ends).tolist(), strict=True))


def _hash(text: str) -> int:
    return xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass"))


def sign(folder: Location, run: SpilledRun, parts: Signing) -> dict[str, Any]:
    """Spills (hash of the part, hash of the id, row, place) of the parts of a run's documents."""
    found: list[tuple[int, int, int, int]] = []
    for table in survivors(folder, run, columns=["id", "text"]):
        for row, id, text in zip(table["row"].to_pylist(), table["id"].to_pylist(), table["text"].to_pylist(), strict=True):
            document = segment.key_of(id)
            found += [(hash, document, row, place) for place, hash in parts.hashes(text)]
    hashes, documents, rows, places = zip(*found, strict=True) if found else ((), (), (), ())
    table = pa.table({"key": np.array(hashes, np.uint64), "document": np.array(documents, np.uint64),
                      "row": np.array(rows, np.uint32), "place": np.array(places, np.uint32)})  # fmt: skip
    name = spill.write(folder, table, ("document", "row", "place"))
    return {"signed": name, "rows": len(found), "files": [name]}


def choose(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, Any]:
    """Spills the repeated parts of a part of all keys, by the documents that lose them: all but each one's first occurrence."""
    low, high = spill.share(part, parts)
    keys, documents, places = _firsts(folder, names, low, high)
    held, size, files = list[pa.Table](), 0, list[str]()
    for name in names:
        for table in spill.read(folder, name, low, high):
            which = np.searchsorted(keys, table["key"].to_numpy())
            first = (documents[which] == table["document"].to_numpy()) & (places[which] == table["place"].to_numpy())
            lost = table.filter(pa.array(~first))
            held.append(pa.table({"key": lost["node"], "place": lost["place"]}))
            size += len(lost)
            if size >= HELD:
                files.append(spill.write(folder, pa.concat_tables(held), ("place",)))
                held, size = [], 0
    if size:
        files.append(spill.write(folder, pa.concat_tables(held), ("place",)))
    return {"lost": files, "files": files}


def _firsts(folder: Location, names: list[str], low: int, high: int) -> Rows:
    """Finds the first occurrence of each hash: in the document whose id has the least hash, and there the first."""
    none = (np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.uint32))
    held, new = [none], 0
    for name in names:
        for table in spill.read(folder, name, low, high):
            held.append((table["key"].to_numpy(), table["document"].to_numpy(), table["place"].to_numpy()))
            new += len(table)
            if new >= max(HELD, len(held[0][0])):
                held, new = [_first(held)], 0
    return _first(held)


def _first(held: list[Rows]) -> Rows:
    keys, documents, places = (np.concatenate([rows[i] for rows in held]) for i in range(3))
    order = np.lexsort((places, documents, keys))
    keys, documents, places = keys[order], documents[order], places[order]
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    return keys[first], documents[first], places[first]


def lost_of(
    folder: Location, first: int, runs: list[SpilledRun], names: list[str]
) -> Iterator[tuple[SpilledRun, dict[int, set[int]]]]:
    """Yields some runs, of which the first has the number `first`, with the places that each of their documents loses, by row."""
    lost = dict(by_run(folder, first, len(runs), names))
    for number, run in enumerate(runs, first):
        found: dict[int, set[int]] = {}
        if table := lost.pop(number, None):
            rows = (table["key"].to_numpy() & np.uint64(0xFFFFFFFF)).tolist()
            for row, place in zip(rows, table["place"].to_pylist(), strict=True):
                found.setdefault(row, set()).add(place)
        yield run, found
