"""Decodes image files. Needs no torch, so that tasks on CPUs start fast."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from heliostat.data import device_threads

DECODERS = device_threads.pool(4, "decode")  # Pillow releases the GIL while it decodes


def decoded(images: list[bytes]) -> np.ndarray:
    """Decodes image files of one size to uint8 [n, height, width, channels]."""
    return np.stack(list(DECODERS.map(decode, images)))


def decode(data: bytes) -> np.ndarray:
    """Decodes an image file to uint8 [height, width, channels]."""
    image = np.asarray(Image.open(io.BytesIO(data)))
    return image if image.ndim == 3 else image[:, :, None]
