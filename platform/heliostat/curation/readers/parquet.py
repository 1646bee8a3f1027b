"""Reads Parquet files row group by row group, within size limits. Yields documents for the text pipeline, and batches of rows for
the image pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.curation.pieces import FilePart
from heliostat.curation.readers.streams import LeftOutError, ReadLimits, codec_of, decoded, unpacked, whole
from heliostat.curation.stage import Document, Dropped

ROWS = 1024  # rows that become Python objects at once
BUFFER = 4 << 20  # bytes of a column per read, because a row group may be larger than memory


def opened(source: pa.NativeFile, large: str) -> pq.ParquetFile:
    """Opens a Parquet file. `large`: the column with large values. This column is read as an Arrow dictionary, so equal values
    are in memory only once."""
    footer = pq.read_metadata(source)
    paths = [footer.schema.column(i).path for i in range(len(footer.schema))]
    return pq.ParquetFile(source, metadata=footer, page_checksum_verification=True, pre_buffer=False, buffer_size=BUFFER,
                          read_dictionary=[path for path in paths if path in (large, f"{large}.bytes")])  # fmt: skip


def batches(
    file: pq.ParquetFile, columns: tuple[str, ...], limit: int, part: FilePart, rows: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields pairs: the number of a batch's first row (counted from 1), and the batch, which has at most `rows` rows. Ignores
    columns that the file doesn't have.

    For a part of the file, reads only the row groups that begin in this part. Raises LeftOutError for a row group with more than
    `limit` decompressed bytes. The footer has this size, so such a row group is never decompressed.
    """
    present = [name for name in dict.fromkeys(columns) if name in file.schema_arrow.names]
    roots = [file.metadata.schema.column(i).path.split(".")[0] for i in range(file.metadata.num_columns)]
    number = 1
    for group in range(file.metadata.num_row_groups):
        info = file.metadata.row_group(group)
        if part.stop is None or part.start <= _begins(info) < part.stop:
            if sum(info.column(i).total_uncompressed_size for i, name in enumerate(roots) if name in present) > limit:
                raise LeftOutError("too_large", f"a row group of more than {limit:,} bytes, unpacked")
            row = number
            for batch in file.iter_batches(rows, row_groups=[group], columns=present):
                yield row, batch
                row += len(batch)
        number += info.num_rows


def _begins(info: pq.RowGroupMetaData) -> int:
    columns = [info.column(i) for i in range(info.num_columns)]
    return min((min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) for c in columns), default=0)


def documents(path: str, stream: BinaryIO, limits: ReadLimits, part: FilePart) -> Iterator[Document | Dropped]:
    """Yields a document for each row of a Parquet file. An id ends in the number of the row, counted from 1."""
    packed = codec_of(path) is not None
    file = (pa.BufferReader(whole(unpacked(path, stream, limits), limits.max_file_bytes)) if packed
            else pa.PythonFile(stream, "r"))  # fmt: skip
    try:
        yield from _documents(path, opened(file, limits.text_column), limits, part)
    except (pa.ArrowException, OSError, ValueError) as e:
        yield Dropped(path, "corrupt", str(e).partition("\n")[0])


def _documents(path: str, file: pq.ParquetFile, limits: ReadLimits, part: FilePart) -> Iterator[Document | Dropped]:
    names, total = file.schema_arrow.names, 0
    if limits.lacks(names):
        if part.start == 0:
            yield Dropped(path, "no_text")
        return
    if limits.by_row:
        for first, batch in batches(file, tuple(names), limits.max_file_bytes, part, ROWS):
            for number, values in enumerate(batch.to_pylist(), first):
                yield limits.document(f"{path}#{number}", values)
        return
    others = [name for name in (names if limits.columns is None else limits.columns) if name in names]
    for first, batch in batches(file, (limits.text_column, *others), limits.max_file_bytes, part, ROWS):
        if (values := limits.texts_of(batch.column(limits.text_column))) is None:
            if part.start == 0:
                yield Dropped(path, "no_text")
            return
        texts = values.dictionary if isinstance(values, pa.DictionaryArray) else values
        texts = pc.cast(texts, pa.large_binary())  # as bytes, because Parquet readers don't check UTF-8
        chosen = values.indices if isinstance(values, pa.DictionaryArray) else range(len(texts))
        for number, place in enumerate(chosen):
            index = place if isinstance(place, int) else place.as_py()
            value = texts[index] if index is not None else None
            size = len(value.as_buffer()) if value is not None and value.is_valid else 0
            total += size
            if total > limits.max_file_bytes:
                raise LeftOutError("too_large", f"more than {limits.max_file_bytes:,} bytes, unpacked")
            columns = {name: batch.column(name)[number].as_py() for name in others}
            yield _document(f"{path}#{first + number}", value, size, limits, columns)


def _document(id: str, value: pa.Scalar | None, size: int, limits: ReadLimits, columns: dict[str, object]) -> Document | Dropped:
    if value is None or not value.is_valid:
        return Dropped(id, "no_text")
    if size > limits.max_document_bytes:
        return Dropped(id, "too_large", f"more than {limits.max_document_bytes:,} bytes")
    return decoded(id, value.as_py(), columns)
