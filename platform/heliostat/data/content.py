"""What samples hold, and the few things that streaming does with them.

Token datasets give an int32 array [n, sequence_length]; datasets of rows give an Arrow table of n rows, with the shards' own
columns. Nothing else in the engine looks inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

Content: TypeAlias = Any  # np.ndarray | pa.Table


def part(content: Content, rows: slice) -> Content:
    """Consecutive samples, without a copy."""
    return content[rows] if isinstance(content, np.ndarray) else content.slice(rows.start, rows.stop - rows.start)


def split(content: Content, size: int) -> list[Content]:
    """Parts of `size` samples each."""
    return [part(content, slice(i, i + size)) for i in range(0, len(content), size)]


def take(content: Content, indices: np.ndarray) -> Content:
    return content[indices] if isinstance(content, np.ndarray) else content.take(pa.array(indices))


def join(parts: list[Content]) -> Content:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else pa.concat_tables(parts)


def pack(content: Content) -> pa.Buffer:
    """Bytes that `unpack` makes into the same samples, in another process."""
    if isinstance(content, np.ndarray):
        return pa.py_buffer(np.ascontiguousarray(content))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content)
    return sink.getvalue()


def unpack(data: pa.Buffer, samples: int, tokens: bool) -> Content:
    if tokens:
        return np.frombuffer(data, dtype=np.int32).reshape(samples, -1)
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


def sample_bytes(content: Content) -> Iterator[bytes | memoryview | pa.Buffer]:
    """Each sample's bytes, for a digest: a row's values, each with its length, column by column."""
    if isinstance(content, np.ndarray):
        yield from np.ascontiguousarray(content)
        return
    columns = [_values(column) for column in content.columns]
    for values in zip(*columns, strict=True):
        yield b"".join(len(value).to_bytes(8, "little") + value for value in values)


def _values(column: pa.ChunkedArray) -> list[bytes]:
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [v or b"" for v in column.to_pylist()]
    return [repr(v).encode() for v in column.to_pylist()]
