"""Processes one image with its caption: decodes, filters, resizes, hashes, and encodes the image. All functions are pure.

Invalid data raises no error: an invalid image becomes a `Dropped` with one of the reasons in `REASONS`. An image is scaled to
cover its bucket, and cropped at its center. Transparent pixels become white.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from heliostat.curation.picturing import fault, upright
from heliostat.curation.stage import Dropped
from heliostat.tasks.care import CRASHED, MEANING, UNREAD, UNREAD_MEANING

REASONS = {
    "unreadable": "the file vanished or cannot be opened",
    "corrupt": "a broken archive, table or metadata line; what came before the break is kept",
    "too_large": "more than max_file_bytes, or an image of more than max_image_bytes",
    "outside": "a file_name or a link that leads out of the input",
    CRASHED: MEANING,
    UNREAD: UNREAD_MEANING,
    "no_image": "a caption without an image",
    "no_caption": "an image without a caption",
    "not_utf8": "a caption or a label with half a surrogate pair, which JSON can spell and no shard can hold",
    "undecodable": "bytes that are no whole PNG, JPEG or WebP",
    "too_small": "a side below min_side",
    "aspect": "longer than max_aspect times its width, or the other way about",
    "caption_short": "a caption of fewer than min_caption characters",
    "caption_long": "a caption of more than max_caption characters",
    "duplicate": "the pixels of another image",
    "near_duplicate": "almost the pixels of another image",
}
Encoding = Literal["png", "jpeg", "webp"]
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class ImageRules:
    """Defines the requirements for images, such as their minimum side, and the form in which they are stored, such as their size
    and encoding."""

    sizes: tuple[Size, ...]  # the buckets
    channels: int = 3
    encoding: Encoding = "png"
    quality: int = 95  # for jpeg and webp
    min_side: int = 1
    max_aspect: float | None = None
    min_caption: int = 1
    max_caption: int | None = None


@dataclass(frozen=True)
class Raw:
    """Holds an image with its caption and columns, as the input contains them. Missing values are None."""

    id: str
    image: bytes | None
    caption: str | None
    label: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredPicture:
    """Holds a stored image. `hash`: SHA-256 of the decoded pixels; `looks`: the image's perceptual hash."""

    id: str
    hash: str
    looks: int
    size: Size
    image: bytes
    caption: str
    label: str


def buckets(resolution: int, max_aspect: float, step: int) -> tuple[Size, ...]:
    """Lists bucket sizes, one per width, in ascending order. Sides are multiples of `step`.

    A bucket has at most resolution x resolution pixels, which limits the memory of a training step. Each width gets the largest
    height that this area allows.
    """
    out = []
    for width in range(step, int(resolution * max_aspect) + step, step):
        height = resolution * resolution // width // step * step
        if height and max(width, height) / min(width, height) <= max_aspect:
            out.append((width, height))
    return tuple(out)


def nearest(size: Size, sizes: tuple[Size, ...]) -> Size:
    """Returns the bucket size whose aspect ratio is nearest to the image's, by the difference of logarithms. In a tie, returns
    the narrowest size."""
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - aspect), s))


def prepare(raw: Raw, rules: ImageRules) -> StoredPicture | Dropped:
    """Prepares an image for storage: decodes, resizes, and encodes the image. Returns the stored image, or a `Dropped` with the
    reason."""
    caption = clean(raw, rules)
    if isinstance(caption, Dropped):
        return caption
    assert raw.image is not None
    try:
        pixels = decode(raw.image, rules.channels)
    except Exception as e:  # noqa: BLE001 (Pillow's decoders raise errors of every kind for bad bytes)
        return Dropped(raw.id, "undecodable", fault(e))
    width, height = pixels.size
    if min(width, height) < rules.min_side:
        return Dropped(raw.id, "too_small", f"{width}x{height}")
    if rules.max_aspect is not None and max(width, height) / min(width, height) > rules.max_aspect:
        return Dropped(raw.id, "aspect", f"{width}x{height}")
    size = nearest((width, height), rules.sizes)
    stored = encode(fit(pixels, size), rules.encoding, rules.quality)
    return StoredPicture(raw.id, pixel_hash(pixels), looks(pixels), size, stored, caption, raw.label)


def clean(raw: Raw, rules: ImageRules) -> str | Dropped:
    """Returns the caption with each run of white space as one space, or the reason to drop the image. Doesn't decode the
    image."""
    caption = " ".join((raw.caption or "").split())
    if raw.image is None:
        return Dropped(raw.id, "no_image")
    if not caption:
        return Dropped(raw.id, "no_caption")
    try:
        f"{caption}{raw.label}".encode()
    except UnicodeError:
        return Dropped(raw.id, "not_utf8")
    if len(caption) < rules.min_caption:
        return Dropped(raw.id, "caption_short")
    if rules.max_caption is not None and len(caption) > rules.max_caption:
        return Dropped(raw.id, "caption_long")
    return caption


def decode(data: bytes, channels: int) -> Image.Image:
    """Decodes bytes to an upright image with one channel or three; raises Pillow's errors for invalid bytes."""
    return upright(data).convert("L" if channels == 1 else "RGB")


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Scales an image to cover the size, and crops it at the center."""
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def encode(image: Image.Image, encoding: Encoding, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, encoding.upper(), **({} if encoding == "png" else {"quality": quality}))
    return out.getvalue()


def pixel_hash(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def looks(image: Image.Image) -> int:
    """Computes the difference hash (dHash), a signed 64-bit integer.

    Each bit shows whether one of 8 x 8 areas is brighter than the area to its right.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = np.packbits(small[:, :-1] > small[:, 1:])
    return int.from_bytes(bits.tobytes(), "big", signed=True)
