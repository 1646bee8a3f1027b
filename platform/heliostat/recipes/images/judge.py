"""Classifies images with a classifier that is trained on the real images.

Measures the classifier's accuracy on held-out real images.

The classifier is a support vector machine on at most 16 x 16 pixels. The classifier trains in seconds, is deterministic, and is
good enough for small images. Every fifth image is held out to measure the accuracy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from PIL import Image

from heliostat.data.chunks import Chunks, DamagedError
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError

log = logging.getLogger(__name__)

SIDE = 16
LIMIT = 5000  # images; with more, training takes minutes
HELD = 5


class Judge:
    def __init__(self, images: list[np.ndarray], labels: list[str]) -> None:
        """Trains the classifier on the labeled images. Raises ConfigError if the images have fewer than two different labels."""
        from sklearn.svm import SVC

        self.labels = sorted(set(labels) - {""})
        if len(self.labels) < 2:
            raise ConfigError("model.samples.judge: the datasets have no labels. Set columns.label in the pipeline")
        known = [i for i, label in enumerate(labels) if label]
        pixels, names = features([images[i] for i in known]), np.array([labels[i] for i in known])
        is_held_out = np.arange(len(known)) % HELD == 0
        self.machine = SVC(C=10.0, gamma="scale").fit(pixels[~is_held_out], names[~is_held_out])
        self.accuracy = float(np.mean(self._say(pixels[is_held_out]) == names[is_held_out]))

    def says(self, pictures: list[np.ndarray]) -> list[str]:
        """Predicts the label of each image (uint8 [height, width, channels])."""
        return self._say(features(pictures)).tolist()

    def _say(self, pixels: np.ndarray) -> np.ndarray:
        return self.machine.predict(pixels)


def features(pictures: list[np.ndarray]) -> np.ndarray:
    """Flattens images to [n, pixels], with the same scale for all pixels. A scale per pixel doesn't work: pixels that are white
    in every real image are never exactly white in a generated image."""
    return np.stack([small(p).ravel() for p in pictures]).astype(np.float32) / 255


def small(picture: np.ndarray) -> np.ndarray:
    """Scales an image to at most 16 x 16 pixels, uint8 [height, width, channels], or [height, width] if it is gray."""
    image = Image.fromarray(picture.squeeze(2) if picture.ndim == 3 and picture.shape[2] == 1 else picture)
    return np.asarray(image if max(image.size) <= SIDE else image.resize((SIDE, SIDE), Image.Resampling.BOX))


def real_images(
    sources: list[Manifest],
    limit: int = LIMIT,
    progressed: Callable[[], None] = lambda: None,
    shrink: Callable[[np.ndarray], np.ndarray] = lambda image: image,
) -> tuple[list[np.ndarray], list[str]]:
    """Reads at most `limit` images of the datasets, with their labels. The images are in the order of the shards, which is by
    hash. Calls `progressed` for every row group that it reads. `shrink`: scales each image, so that less memory is needed."""
    from heliostat.recipes.images.decoding import decode

    images: list[np.ndarray] = []
    labels: list[str] = []
    chunks = Chunks(sources, None)
    for number, source in enumerate(sources):
        for chunk in range(source.chunks.num_rows):
            if len(images) >= limit:
                break
            try:
                table = chunks.read(number, chunk)
            except DamagedError as e:
                log.warning("%s. The scores leave out the images of this row group", e)
                continue
            finally:
                progressed()
            if isinstance(table, np.ndarray) or "image" not in table.column_names:
                raise ConfigError("model.samples: the datasets contain no images. Remove model.samples.judge")
            images += [shrink(decode(data)) for data in table["image"].to_pylist()]
            labels += table["label"].to_pylist()
    return images[:limit], labels[:limit]
