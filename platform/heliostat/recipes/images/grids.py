"""Arranges images in a grid, and encodes images as PNG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SHOWN_SIDE = 64  # pixels; smaller pictures are enlarged in the grid
GAP = 4  # gray pixels after each picture


def grid(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Arranges images of the same size in rows, and enlarges small images. Returns uint8 [height, width, channels]. A single
    image stays unchanged."""
    pictures = [p if p.ndim == 3 else p[:, :, None] for p in pictures]
    if len(pictures) == 1:
        return pictures[0]
    height, width, channels = pictures[0].shape
    scale = max(1, SHOWN_SIDE // max(height, width))
    height, width = height * scale + GAP, width * scale + GAP
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    out = np.full((rows * height, columns * width, channels), 128, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * height, i % columns * width
        out[y : y + height - GAP, x : x + width - GAP] = picture.repeat(scale, 0).repeat(scale, 1)
    return out


def png(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture).save(out, "PNG")
    return out.getvalue()
