"""Shows a run's images in its report: for each kind of image, thumbnails of several steps.

With JavaScript, a slider selects the step. Without JavaScript, the images are a list. The page's size is bounded: at most KINDS
kinds, STEPS steps of each, NEWEST_BYTES for the newest step, and THUMBNAIL_BYTES for each other step.
"""

from __future__ import annotations

import base64
import io
import logging
import re
import tempfile
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from heliostat.text import printable

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

KINDS, STEPS = 6, 12
THUMBNAIL_SIDE, THUMBNAIL_BYTES = 720, 64 << 10  # maximum pixels per side, and maximum bytes
NEWEST_SIDE, NEWEST_BYTES = 2560, 1 << 20  # the same for the newest step, so that a large grid is readable
SMALLEST_SIDE = 64  # pixels per side of a thumbnail that isn't made smaller
FILE_BYTES = 32 << 20  # maximum bytes of an image that is downloaded
STEP = re.compile(r"step-(\d+)\.png")


class Shot(NamedTuple):
    """Contains the thumbnail of one step. `format`: png or jpeg."""

    step: int
    format: str
    data: bytes


class Series(NamedTuple):
    """Contains the thumbnails of one kind of image, by step. `steps`: the number of steps with such an image. `unreadable`: the
    number of chosen images that are too large or damaged."""

    name: str
    shots: list[Shot]
    steps: int
    unreadable: int = 0


def spread(count: int, most: int = STEPS) -> list[int]:
    """Chooses at most `most` of `count` numbers, evenly spread, with the first and the last number."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def gather(client: MlflowClient, run_id: str) -> list[Series]:
    """Downloads a run's images from MLflow, and makes thumbnails."""
    out = []
    for kind in client.list_artifacts(run_id, "images")[:KINDS]:
        files = sorted(
            (int(match[1]), f.path, f.file_size or 0)
            for f in client.list_artifacts(run_id, kind.path)
            if (match := STEP.fullmatch(Path(f.path).name))
        )
        shots, unreadable = list[Shot](), 0
        for step, path, size in (files[i] for i in spread(len(files))):
            limits = (NEWEST_SIDE, NEWEST_BYTES) if step == files[-1][0] else (THUMBNAIL_SIDE, THUMBNAIL_BYTES)
            with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
                data = Path(client.download_artifacts(run_id, path, folder)).read_bytes() if size <= FILE_BYTES else b""
            try:
                shots.append(Shot(step, *thumbnail(data, *limits)))
            except ValueError as e:
                unreadable += 1
                log.warning("%s: the report leaves out this image (%s)", path, e)
        out.append(Series(Path(kind.path).name, shots, len(files), unreadable))
    return out


def thumbnail(data: bytes, side: int = THUMBNAIL_SIDE, most: int = THUMBNAIL_BYTES) -> tuple[str, bytes]:
    """Scales an image down until it has at most `side` pixels per side and `most` bytes. Returns the format (png or jpeg), and
    the file's bytes.

    Uses JPEG if PNG needs too many bytes. Raises ValueError if the image can't be read.
    """
    from PIL import Image

    try:
        opened = Image.open(io.BytesIO(data))
        opened.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"not a readable image of at most {FILE_BYTES >> 20} MB: {e}") from e
    image = opened.convert(opened.mode if opened.mode in ("L", "RGB") else "RGB")
    while True:
        image.thumbnail((side, side))
        for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
            out = io.BytesIO()
            image.save(out, kind, **options)
            if len(out.getvalue()) <= most or (kind == "jpeg" and side <= SMALLEST_SIDE):
                return kind, out.getvalue()
        side = max(image.size) // 2


def figures(all_series: list[Series]) -> list[str]:
    """Renders each kind of image as a figure. `slider.js` adds the slider."""
    return [_figure(series) for series in all_series if series.shots or series.unreadable]


def _figure(series: Series) -> str:
    notes = [f"{len(series.shots):,} of {series.steps:,} steps"] if len(series.shots) < series.steps else []
    notes += [f"{series.unreadable:,} unreadable"] if series.unreadable else []
    name, note = escape(printable(series.name)), f" <span>{', '.join(notes)}</span>" if notes else ""
    shots = "".join(
        f"<div class='shot'><p>step {shot.step:,}</p><img alt='{name}, step {shot.step:,}' "
        f"src='data:image/{shot.format};base64,{base64.b64encode(shot.data).decode()}'></div>"
        for shot in series.shots
    )
    return f"<figure class='series'><figcaption>{name}{note}</figcaption>{shots}</figure>"
