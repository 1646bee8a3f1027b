"""Defines how a dataset stores latents and text embeddings, and the error that storing adds. All functions are pure.

A row has the array of an image or a caption, such as embeddings [tokens, width], as float16, or as int8. With int8, the numbers
along the last axis (an embedding) share a float16 scale: their largest absolute value divided by 127.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from heliostat.recipes.images.stored_features import StoredType, quantized


@dataclass(frozen=True)
class ArrayFormat:
    """Describes the stored arrays of a column. `shape`: of a row's array."""

    shape: tuple[int, ...]
    dtype: StoredType = "float16"

    @property
    def row_bytes(self) -> int:
        return 2 * math.prod(self.shape) if self.dtype == "float16" else math.prod(self.shape) + self._scale_bytes

    @property
    def _scale_bytes(self) -> int:
        return 2 * math.prod(self.shape[:-1])

    def pack(self, arrays: torch.Tensor) -> tuple[list[bytes], torch.Tensor]:
        """Packs the arrays of several rows, fp32 [n, *shape]. Also returns the arrays as `unpack` gives them."""
        if self.dtype == "float16":
            halves = arrays.half()
            return _rows(halves), halves.float()
        scale, numbers = quantized(arrays, -1)
        return [one + other for one, other in zip(_rows(scale), _rows(numbers), strict=True)], numbers * scale.float()

    def unpack(self, rows: list[bytes]) -> torch.Tensor:
        """Unpacks the arrays of several rows, fp32 [n, *shape]."""
        raw = torch.frombuffer(bytearray().join(rows), dtype=torch.uint8).view(len(rows), self.row_bytes)
        if self.dtype == "float16":
            return raw.view(torch.float16).view(len(rows), *self.shape).float()
        scale, numbers = raw[:, : self._scale_bytes].contiguous(), raw[:, self._scale_bytes :].contiguous()
        scales = scale.view(torch.float16).view(len(rows), *self.shape[:-1], 1)
        return numbers.view(torch.int8).view(len(rows), *self.shape) * scales.float()


def _rows(values: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in values.cpu().numpy()]


@dataclass(frozen=True)
class StoredError:
    """Sums the errors that storing adds to the numbers of a column: squares of the numbers, and squares of the errors."""

    dtype: StoredType
    squares: float = 0.0
    missed: float = 0.0

    @classmethod
    def between(cls, dtype: StoredType, exact: torch.Tensor, stored: torch.Tensor) -> StoredError:
        """Measures some numbers. Both tensors: fp32, of the same shape, on any device."""
        exact, missed = exact.reshape(-1), (exact - stored).reshape(-1)
        return cls(dtype, float(exact.dot(exact)), float(missed.dot(missed)))

    def __add__(self, other: StoredError) -> StoredError:
        return StoredError(self.dtype, self.squares + other.squares, self.missed + other.missed)

    def named(self) -> dict[str, str | float]:
        """Returns an entry of a manifest: the type, and the relative error (root mean square)."""
        relative = (self.missed / self.squares) ** 0.5 if self.squares else 0.0
        return {"dtype": self.dtype, "relative_error": float(f"{relative:.3g}")}


StoredErrors: TypeAlias = dict[str, StoredError]
"""Errors by the name of the column."""


def summed(errors: Iterable[StoredErrors]) -> StoredErrors:
    """Adds the errors of some batches."""
    out = StoredErrors()
    for name, one in (item for each in errors for item in each.items()):
        out[name] = out[name] + one if name in out else one
    return dict(sorted(out.items()))
