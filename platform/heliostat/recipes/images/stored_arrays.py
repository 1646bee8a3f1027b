"""Defines how a dataset stores latents, text embeddings, and features of images, and the error that storing adds. All functions
are pure.

A row has the array of an image or a caption, such as embeddings [tokens, width], as float16, or as int8. With int8, some numbers
of a row share a float16 scale: their largest absolute value divided by 127. So the error of a row depends only on the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

LARGEST = 127  # of int8, symmetric
StoredType = Literal["float16", "int8"]
WIDTH = (-1,)  # axes of a row's array [..., width] whose numbers share a scale: a scale per embedding
AREA = (-2, -1)  # of latents [channels, height, width]: a scale per channel
PATCHES = (-3, -2)  # of features [rows, columns, channels]: a scale per channel


@dataclass(frozen=True)
class ArrayFormat:
    """Describes the stored arrays of a column. `shape`: of a row's array; `shared`: negative numbers of the axes along which the
    numbers share a scale."""

    shape: tuple[int, ...]
    dtype: StoredType = "float16"
    shared: tuple[int, ...] = WIDTH

    @property
    def row_bytes(self) -> int:
        return 2 * math.prod(self.shape) if self.dtype == "float16" else math.prod(self.shape) + 2 * math.prod(self._scales)

    @property
    def _scales(self) -> list[int]:
        """Returns the shape of a row's scales."""
        rank = len(self.shape)
        return [1 if axis - rank in self.shared else size for axis, size in enumerate(self.shape)]

    def pack(self, arrays: torch.Tensor) -> tuple[list[bytes], torch.Tensor]:
        """Packs the arrays of several rows, fp32 [n, *shape]. Also returns the arrays as `unpack` gives them."""
        if self.dtype == "float16":
            halves = arrays.half()
            return _rows(halves), halves.float()
        scale = (arrays.abs().amax(self.shared, keepdim=True) / LARGEST).half()
        divisor = torch.where(scale > 0, scale, 1).float()
        numbers = (arrays / divisor).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        return [one + other for one, other in zip(_rows(scale), _rows(numbers), strict=True)], numbers * scale.float()

    def parts(self, rows: list[bytes]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reads the arrays of several rows in the stored type, [n, *shape]. Also returns their scales, fp32, with length 1 along
        the axes `shared`; None with float16."""
        raw = torch.frombuffer(bytearray().join(rows), dtype=torch.uint8).view(len(rows), self.row_bytes)
        if self.dtype == "float16":
            return raw.view(torch.float16).view(len(rows), *self.shape), None
        scale, numbers = (part.contiguous() for part in raw.tensor_split([2 * math.prod(self._scales)], 1))
        scales = scale.view(torch.float16).view(len(rows), *self._scales).float()
        return numbers.view(torch.int8).view(len(rows), *self.shape), scales

    def unpack(self, rows: list[bytes]) -> torch.Tensor:
        """Unpacks the arrays of several rows, fp32 [n, *shape]."""
        return scaled(*self.parts(rows))


def scaled(numbers: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Converts stored numbers to fp32."""
    return numbers.float() if scales is None else numbers * scales


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
