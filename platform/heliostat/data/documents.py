"""Finds the row groups and the samples that contain a given document. An image is a document of one row and one sample."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.data.manifest import Manifest


@dataclass(frozen=True)
class Piece:
    """Describes the part of a document that one row group contains.

    `chunk`: index of the row group in the manifest; `row_group`: index of the row group in the shard; `first`: index of the
    document's first token in the row group; `tokens`: number of the document's tokens in the row group.
    """

    chunk: int
    row_group: int
    first: int
    tokens: int

    def samples(self, length: int) -> range:
        """Returns the indices of the row group's samples, of `length` tokens each, that contain tokens of the document."""
        return range(self.first // length, (self.first + self.tokens - 1) // length + 1)


def pieces(dataset: Manifest, path: str, id: str) -> list[Piece]:
    """Finds a document in a shard. Returns one piece for each row group that contains a part of the document.

    `path`: the shard's path in the dataset; `id`: the document's id. An image's row counts as one token.
    """
    chunks, column = dataset.chunks, "document" if dataset.kind == "tokens" else "id"
    mine = np.flatnonzero(pc.equal(chunks["path"], path).to_numpy())
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
    """Returns the path of the shard in `dataset` with the same number as the shard `path` of an earlier version.

    Returns None if there is no such shard.
    """
    folder = path.rpartition("/")[0] + "/"
    return next((p for p in dataset.paths if p.startswith(folder)), None)
