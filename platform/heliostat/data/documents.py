"""Finds a document in a shard: the rows that hold it, and the samples that are cut from them; an image is a row and a sample."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.data.manifest import Manifest


@dataclass(frozen=True)
class Piece:
    """Describes the tokens of a document in one chunk: which it is in the manifest, and the `tokens` from `first` on in it."""

    chunk: int
    row_group: int
    first: int
    tokens: int

    def samples(self, length: int) -> range:
        """Returns the chunk's samples, of so many tokens each, that hold some of the document."""
        return range(self.first // length, (self.first + self.tokens - 1) // length + 1)


def pieces(dataset: Manifest, path: str, id: str) -> list[Piece]:
    """Finds a document in a shard, by its id: a piece for each chunk that holds some of it; an image's row counts as a token."""
    chunks, column = dataset.chunks, "document" if dataset.kind == "tokens" else "id"
    mine = np.flatnonzero(pc.equal(chunks["path"].cast("string"), path).to_numpy())
    groups = dict(zip(chunks["row_group"].to_numpy()[mine].tolist(), mine.tolist(), strict=True))
    place, parts = dataset.location.join(path), list[Piece]()
    with place.open() as source:
        file = place.attempt(partial(pq.ParquetFile, source))
        for group, chunk in groups.items():
            names = place.attempt(partial(file.read_row_group, group, columns=[column]))[column]
            rows = np.flatnonzero(pc.equal(names, id).to_numpy())
            if len(rows) and column == "id":
                parts.append(Piece(chunk, group, int(rows[0]), 1))
            elif len(rows):
                tokens = place.attempt(partial(file.read_row_group, group, columns=["tokens"]))["tokens"]
                sizes = pc.list_value_length(tokens).to_numpy()
                first, last = int(rows[0]), int(rows[-1])
                parts.append(Piece(chunk, group, int(sizes[:first].sum()), int(sizes[first : last + 1].sum())))
    return parts


def current(dataset: Manifest, path: str) -> str | None:
    """Returns the path of a version's shard of the same number as `path`, which an earlier version may have; None if none."""
    folder = path.rpartition("/")[0] + "/"
    return next((p for p in dataset.paths if p.startswith(folder)), None)
