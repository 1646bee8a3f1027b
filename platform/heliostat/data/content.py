"""Defines the contents of samples, and the operations on them that streaming needs.

The content of n token samples is an int32 array [n, sequence_length]. The content of n rows is an Arrow table with the shards'
columns. No other code of the engine reads inside a sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import pyarrow as pa

Content: TypeAlias = np.ndarray | pa.Table


def part(content: Content, rows: slice) -> Content:
    """Returns the samples of the slice `rows`, without copying the data."""
    return content[rows] if isinstance(content, np.ndarray) else content.slice(rows.start, rows.stop - rows.start)


def split(content: Content, size: int) -> list[Content]:
    """Splits samples into parts of `size` samples each."""
    return [part(content, slice(i, i + size)) for i in range(0, len(content), size)]


def take(content: Content, indices: np.ndarray) -> Content:
    return content[indices] if isinstance(content, np.ndarray) else content.take(pa.array(indices))


def join(parts: list[Content]) -> Content:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else pa.concat_tables(parts)


def pack(content: Content) -> pa.Buffer:
    """Serializes samples. `unpack` restores them in another process."""
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
    """Yields, for each sample, the bytes from which its digest is computed.

    A token sample is its int32 values. A row is a hash of the columns' names and types, followed by its values. Before each
    value comes its length. A null has eight bytes 0xff instead of a length and a value. These bytes aren't a valid length.
    """
    if isinstance(content, np.ndarray):
        yield from np.ascontiguousarray(content)
        return
    head = hashlib.blake2b(json.dumps([[f.name, kind_of(f.type)] for f in content.schema]).encode(), digest_size=16).digest()
    columns = [_values(column) for column in content.columns]
    for row in range(len(content)):
        yield b"".join([head, *(_marked(values[row]) for values in columns)])


def kind_of(kind: pa.DataType) -> str:
    """Describes an Arrow type by a string that no version of Arrow changes. A dictionary type counts as its value type."""
    if pa.types.is_dictionary(kind):
        return kind_of(kind.value_type)
    if pa.types.is_struct(kind):
        return f"struct<{','.join(f'{json.dumps(f.name)}:{kind_of(f.type)}' for f in kind)}>"
    if pa.types.is_map(kind):
        return f"map<{kind_of(kind.key_type)},{kind_of(kind.item_type)}>"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"list<{kind_of(kind.value_type)}>"
    return str(kind)


def _marked(value: bytes | None) -> bytes:
    return b"\xff" * 8 if value is None else len(value).to_bytes(8, "little") + value


BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_string,
    pa.types.is_large_string,
)


def _values(column: pa.ChunkedArray) -> list[bytes | None]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if any(is_bytes(kind) for is_bytes in BYTES):  # also text, because Parquet doesn't check its UTF-8
        return column.cast(pa.large_binary()).to_pylist()
    if pa.types.is_temporal(kind) and kind.bit_width in (32, 64):  # as numbers, because libraries spell time zones differently
        column = column.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
    return [None if v is None else repr(v).encode() for v in column.to_pylist()]


def sample_bytes_1(content: Content) -> Iterator[bytes | memoryview | pa.Buffer]:
    """Yields the bytes of each sample for receipts of version 1.

    They contain no names and types, and a null is the same as an empty value.
    """
    if isinstance(content, np.ndarray):
        yield from sample_bytes(content)
        return
    columns = [_values_1(column) for column in content.columns]
    for values in zip(*columns, strict=True):
        yield b"".join(len(value).to_bytes(8, "little") + value for value in values)


def _values_1(column: pa.ChunkedArray) -> list[bytes]:
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [v or b"" for v in column.to_pylist()]
    return [repr(v).encode() for v in column.to_pylist()]
