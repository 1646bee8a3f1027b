"""Opens and decodes images for stages."""

from __future__ import annotations

import base64
import io
import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

from heliostat.curation.stage import Document, Picture
from heliostat.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 96  # pixels of the longer side
FORMATS = ("PNG", "JPEG", "WEBP")


def picture_of(document: Document) -> Picture:
    """Returns a document's image; ConfigError if the document has no image."""
    if document.picture is None:
        raise ConfigError(f"stages: {document.id} isn't an image. Use this stage in image pipelines")
    return document.picture


def fault(error: Exception) -> str:
    """Formats the error for an invalid image, without the memory addresses that Pillow's errors may contain. So the text is the
    same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")[:200]


def opened(data: bytes) -> Image:
    """Opens an image, and reads only its header. Raises Pillow's errors for invalid bytes, or for too many pixels."""
    from PIL import Image as pil

    with warnings.catch_warnings():
        warnings.simplefilter("error", pil.DecompressionBombWarning)
        return pil.open(io.BytesIO(data), formats=FORMATS)


def upright(data: bytes) -> Image:
    """Decodes an image to 8 bits, rotates it as its EXIF data requires, and makes transparent pixels white. Raises the errors of
    `opened`."""
    from PIL import Image as pil
    from PIL import ImageOps

    loaded = opened(data)
    loaded.load()
    image = ImageOps.exif_transpose(loaded)
    if image.mode.startswith("I"):
        return _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image)
    return image


def _eight_bits(image: Image) -> Image:
    """Scales 16-bit grayscale to 8 bits by taking the upper byte, like Pillow does for 16-bit colors. Transparent pixels become
    white."""
    from PIL import Image as pil

    values = np.asarray(image)
    grey = (values.clip(0, 0xFFFF) >> 8).astype(np.uint8)
    if "transparency" in image.info:  # the transparent value has 16 bits
        grey[values == image.info["transparency"]] = 255
    eight_bits = pil.fromarray(grey)
    eight_bits.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return eight_bits


def thumbnail(data: bytes) -> str:
    """Returns a small JPEG of an image, in base64; "" if the bytes can't be decoded."""
    try:
        image = upright(data).convert("RGB")
    except Exception:  # noqa: BLE001 - Pillow raises errors of many kinds for invalid bytes
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=75)
    return base64.b64encode(out.getvalue()).decode()
