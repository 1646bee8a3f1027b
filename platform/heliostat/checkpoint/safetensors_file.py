"""Writes safetensors files as a stream: first the header, then one tensor after another. Never holds a complete file in memory.

The format is eight bytes with the header's length, a JSON header {name: dtype, shape, data_offsets}, and the data. Tensors with
larger elements come first, as in files of the safetensors library, so that all tensors are aligned.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from heliostat.errors import StorageError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Describes a tensor to write. `parts`: called when the tensor is written; returns its bytes in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[memoryview]]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, entries: list[Entry], metadata: dict[str, str]) -> dict[str, int]:
    """Writes the file and syncs it to disk; returns, for each tensor, the byte of the file at which the tensor starts.

    Raises StorageError if the disk is full.
    """
    ordered = sorted(entries, key=lambda e: -e.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": metadata}
    offsets, end = {}, 0
    for entry in ordered:
        offsets[entry.name] = end
        end += entry.size
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offsets[entry.name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for entry in ordered:
                for part in entry.parts():
                    f.write(part)
            f.flush()
            os.fsync(f.fileno())
    except BaseException as e:
        path.unlink(missing_ok=True)  # an incomplete file would only use space
        if isinstance(e, OSError):
            raise StorageError(
                f"{path}: can't write this file ({(e.strerror or str(e)).lower()}). Free some space on this disk"
            ) from e
        raise
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}
