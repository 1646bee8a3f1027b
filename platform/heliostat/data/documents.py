"""Finds the row groups and the samples that contain a given document. An image or a conversation is a document in one sample: a
row, which for conversations may be a pack of several."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.data.manifest import Manifest

IDS = "ids"  # the column of packs, with the ids of the documents in each row


@dataclass(frozen=True)
class Piece:
    """Describes the part of a document that one row group contains.

    `chunk`: index of the row group in the manifest; `row_group`: index of the row group in the shard; `first`: index of the
    document's first token in the row group; `tokens`: number of the document's tokens in the row group. In a dataset of kind
    "rows", `first` is the index of the row, and `tokens` is 1.
    """

    chunk: int
    row_group: int
    first: int
    tokens: int

    def samples(self, length: int) -> range:
        """Returns the indices of the row group's samples, of `length` tokens each, that contain tokens of the document."""
        return range(self.first // length, (self.first + self.tokens - 1) // length + 1)


def pieces(dataset: Manifest, path: str, id: str) -> list[Piece]:
    """Finds a document in a shard. Returns one piece for each row group that contains a part of the document, and in a dataset of
    kind "rows", one piece for each row.

    `path`: the shard's path in the dataset; `id`: the document's id.
    """
    chunks = dataset.chunks
    mine = np.flatnonzero(pc.equal(chunks["path"], path).to_numpy())
    groups = dict(zip(chunks["row_group"].to_numpy()[mine].tolist(), mine.tolist(), strict=True))
    place, parts = dataset.location.join(path), list[Piece]()
    with place.open() as source:
        file = place.attempt(partial(pq.ParquetFile, source))
        column = "document" if dataset.kind == "tokens" else IDS if IDS in file.schema_arrow.names else "id"
        for group, chunk in groups.items():
            names = place.attempt(partial(file.read_row_group, group, columns=[column]))[column]
            rows = rows_of(names, id)
            if dataset.kind != "tokens":
                parts += [Piece(chunk, group, row, 1) for row in rows.tolist()]
            elif len(rows):
                tokens = place.attempt(partial(file.read_row_group, group, columns=["tokens"]))["tokens"]
                sizes = pc.list_value_length(tokens).to_numpy()
                first, last = int(rows[0]), int(rows[-1])
                parts.append(Piece(chunk, group, int(sizes[:first].sum()), int(sizes[first : last + 1].sum())))
    return parts


def rows_of(names: pa.ChunkedArray, id: str) -> np.ndarray:
    """Returns the indices of the rows that contain a document, int64. `names`: for each row, the id of its document, or the list
    of the ids of its documents."""
    column = names.combine_chunks()
    if not pa.types.is_list(column.type):
        return np.flatnonzero(pc.equal(column, id))
    return np.unique(pc.list_parent_indices(column).to_numpy()[np.flatnonzero(pc.equal(column.flatten(), id))])


def current(dataset: Manifest, path: str) -> str | None:
    """Returns the path of the shard in `dataset` with the same number as the shard `path` of an earlier version.

    Returns None if there is no such shard.
    """
    folder = path.rpartition("/")[0] + "/"
    return next((p for p in dataset.paths if p.startswith(folder)), None)
