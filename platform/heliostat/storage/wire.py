"""Encodes plain values as bytes, and decodes them, for messages between the processes of a run.

    data = wire.pack({"step": 7, "digests": array})
    wire.unpack(data)

Unlike with pickle, decoding never runs code from the bytes. Values are numbers, text, bytes, None, lists, tuples, ranges, and
dictionaries of them. NumPy arrays, CPU tensors, Arrow tables, and the errors of `heliostat.errors` are supported, too. So are
instances of dataclasses and named tuples that `@wire.travels` registers.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack
import numpy as np
import pyarrow as pa

from heliostat import errors
from heliostat.errors import HeliostatError, WorkerError, innermost

if TYPE_CHECKING:  # imports torch, which takes a second
    import torch

C = TypeVar("C", bound=type[object])

MOST = 2**31 - 1  # bytes per message
NAMES = "surrogatepass"  # the name of a file may be invalid text, and errors contain names of files
TUPLE, RANGE, INTEGER, ARRAY, SCALAR, TENSOR, TABLE, ERROR, RECORD = range(1, 10)  # codes of MessagePack's extension types
_records: dict[str, type[Any]] = {}


def travels(cls: C) -> C:
    """Registers a dataclass or named tuple, so that its instances can be sent, field by field."""
    _records[_name(cls)] = cls
    return cls


def pack(value: object) -> bytes:
    """Encodes a value. Raises TypeError if the value isn't plain, and ValueError if the encoded value has more than MOST
    bytes."""
    data = msgpack.packb(value, default=_encode, strict_types=True, unicode_errors=NAMES)
    if len(data) > MOST:
        raise ValueError(f"a message between processes has {len(data):,} bytes, more than the maximum of {MOST:,}")
    return data


def unpack(data: bytes) -> Any:
    """Decodes a value. Raises ValueError if the bytes are not an encoded value."""
    return msgpack.unpackb(data, ext_hook=_decode, strict_map_key=False, unicode_errors=NAMES)


def _encode(value: object) -> object:
    """Encodes values for which MessagePack has no type."""
    if _records.get(_name(type(value))) is type(value):
        return _extension(RECORD, value)
    for code, (kind, _, _) in _CODES.items():
        if kind is not None and isinstance(value, kind):
            return _extension(code, value)
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return _extension(INTEGER, value)
    for plain in _PLAIN:
        if isinstance(value, plain):
            return plain(value)
    if type(value).__module__ == "torch":
        return _extension(TENSOR, value)
    raise TypeError(
        f"{type(value).__qualname__} can't be sent between processes. Use numbers, text, lists, dicts, or NumPy arrays"
    )


def _extension(code: int, value: object) -> msgpack.ExtType:
    return msgpack.ExtType(code, _CODES[code][1](value))


def _decode(code: int, data: bytes) -> object:
    if code not in _CODES:
        raise ValueError(
            f"unknown type {code} in a message between processes. Use the same version of heliostat in all processes"
        )
    return _CODES[code][2](data)


def _fields(record: Any) -> list[object]:
    return list(record) if isinstance(record, tuple) else [getattr(record, f.name) for f in dataclasses.fields(record)]


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _pack_array(value: np.ndarray) -> bytes:
    if value.dtype.hasobject:
        raise TypeError("an array of Python objects can't be sent between processes. Use an array of numbers")
    out = io.BytesIO()
    np.lib.format.write_array(out, value, allow_pickle=False)
    return out.getvalue()


def _unpack_array(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _pack_tensor(value: object) -> bytes:
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{type(value).__qualname__} can't be sent between processes. Use a CPU tensor or a NumPy array")
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return pack([str(value.dtype).removeprefix("torch."), list(value.shape), flat.numpy().tobytes()])


def _unpack_tensor(data: bytes) -> torch.Tensor:
    import torch

    name, shape, content = unpack(data)
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown tensor dtype {name!r} in a message between processes")
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)


def _pack_table(value: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, value.schema) as writer:
        writer.write_table(value)
    return sink.getvalue().to_pybytes()


def _unpack_table(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


def _pack_error(value: HeliostatError) -> bytes:
    """Encodes an error: its class, its arguments, and its attributes.

    If the class isn't in `heliostat.errors`, encodes the error as its nearest base class in that module.
    """
    value = innermost(value) or value
    kind = next(c for c in type(value).__mro__ if c.__module__ == errors.__name__)
    args = value.args if type(value) is kind else (str(value),)
    try:
        return pack([kind.__name__, list(args), vars(value), str(value)])
    except TypeError:
        return pack([kind.__name__, [str(value)], {}, str(value)])


def _unpack_error(data: bytes) -> HeliostatError:
    name, args, attributes, text = unpack(data)
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, HeliostatError)):
        raise ValueError(f"unknown error class {name!r} in a message between processes")
    try:
        error = kind(*args)
    except TypeError:  # the subclass takes other arguments
        error = WorkerError(text)
    vars(error).update(attributes)
    return error


def _unpack_record(data: bytes) -> object:
    name, values = unpack(data)
    if name not in _records:
        raise ValueError(f"{name!r} isn't registered for messages between processes. Decorate the class with @wire.travels")
    kind = _records[name]
    if not dataclasses.is_dataclass(kind):
        return kind(*values)
    return kind(**dict(zip((f.name for f in dataclasses.fields(kind)), values, strict=True)))


_PLAIN: tuple[Any, ...] = (dict, list, str, bytes, int, float)  # subclasses of these are sent as plain values
# by the code of a MessagePack extension type: (class of its values, or None if it is recognized otherwise; encoder; decoder)
_CODES: dict[int, tuple[type | None, Callable[[Any], bytes], Callable[[bytes], object]]] = {
    TUPLE: (tuple, lambda value: pack(list(value)), lambda data: tuple(unpack(data))),
    RANGE: (range, lambda value: pack([value.start, value.stop, value.step]), lambda data: range(*unpack(data))),
    INTEGER: (None, lambda value: str(int(value)).encode(), int),
    ARRAY: (np.ndarray, _pack_array, _unpack_array),
    SCALAR: (np.generic, lambda value: _pack_array(np.asarray(value)), lambda data: _unpack_array(data)[()]),
    TENSOR: (None, _pack_tensor, _unpack_tensor),
    TABLE: (pa.Table, _pack_table, _unpack_table),
    ERROR: (HeliostatError, _pack_error, _unpack_error),
    RECORD: (None, lambda value: pack([_name(type(value)), _fields(value)]), _unpack_record),
}
