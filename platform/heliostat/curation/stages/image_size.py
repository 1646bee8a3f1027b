"""Drops images by their size: sides, pixels, and aspect ratio.

LAION-5B (Schuhmann et al. 2022, arXiv 2210.08402) contains images of all sizes, and has subsets with sides of at least 1,024
pixels. DataComp (Gadre et al. 2023, arXiv 2304.14108) drops images with a shorter side below 200 pixels or an aspect ratio above
3; these are the defaults. This stage reads only the header of an image, so put `image_size` before stages that read pixels.
`image_size` must be before stages that compare images or run on GPUs, because these stages resize the images to the dataset's
size.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from heliostat.curation.picturing import fault, opened, picture_of
from heliostat.curation.stage import Document, Outcome, Stage
from heliostat.schema import Float


class ImageSize(Stage):
    of_images: ClassVar[bool] = True
    reasons: ClassVar[dict[str, str]] = {"undecodable": "bytes that are no PNG, JPEG or WebP"}
    limits: ClassVar = {
        "small": ("side", "min_side", "a side of fewer pixels than {}"),
        "large": ("pixels", "max_pixels", "more pixels than {}"),
        "aspect": ("aspect", "max_aspect", "a side longer than {} times the other"),
    }
    needs: ClassVar = ("images", "PIL")
    libraries: ClassVar[tuple[str, ...]] = ("pillow",)

    min_side: int = Field(200, ge=1)
    """Minimum pixels of the shorter side; images with fewer are dropped (`small`)."""
    max_pixels: int | None = Field(None, ge=1)
    """Maximum pixels, width times height; images with more are dropped (`large`). Unset: Pillow's limit of 89,478,485."""
    max_aspect: Float = Field(3.0, ge=1)
    """Maximum ratio of the longer side to the shorter side; images with a larger ratio are dropped (`aspect`)."""

    def decide(self, document: Document) -> Outcome:
        picture = picture_of(document)
        try:
            width, height = opened(picture.data).size
        except Exception as e:  # noqa: BLE001 (Pillow's decoders raise errors of every kind for bad bytes)
            return Outcome(None, "undecodable", fault(e))
        m = {"side": min(width, height), "pixels": width * height, "aspect": max(width, height) / max(1, min(width, height))}
        reason = self.failed(m)
        return Outcome(None if reason else document, reason, f"{width}x{height}" if reason else "", m)
