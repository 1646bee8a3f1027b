"""Divides images into batches for the frozen encoders, and decodes the images.

Needs no torch, so that tasks on CPUs start fast.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from heliostat.recipes.images.decoding import decoded

PIXELS = "pixels"  # column of a batch with decoded images, uint8 [height, width, channels] each


def batches(table: pa.Table, most: int) -> Iterator[pa.Table]:
    """Yields a table's images in batches of at most `most` images with equal sizes."""
    sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
    for size in sorted(set(sizes)):
        mine = [i for i, one in enumerate(sizes) if one == size]
        for first in range(0, len(mine), most):
            yield table.take(pa.array(mine[first : first + most]))


def further(table: pa.Table, name: str) -> list[str]:
    """Returns the values of a column that the input or stages add; "" for missing values."""
    return [str(json.loads(columns).get(name, "")) if columns else "" for columns in table["columns"].to_pylist()]


def with_pixels(batch: pa.Table) -> pa.Table:
    """Decodes the images of a batch, and appends them as the column PIXELS."""
    images = [image.tobytes() for image in decoded(batch["image"].to_pylist())]
    return batch.append_column(PIXELS, pa.array(images, pa.large_binary()))


def pixels(batch: pa.Table) -> np.ndarray:
    """Returns the decoded images of a batch, uint8 [n, height, width, channels]."""
    shape = (len(batch), batch["height"][0].as_py(), batch["width"][0].as_py(), -1)
    return np.frombuffer(bytearray().join(batch[PIXELS].to_pylist()), np.uint8).reshape(shape)  # torch needs writable memory
