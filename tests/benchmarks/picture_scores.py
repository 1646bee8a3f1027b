"""Scores the pictures that runs of `jobs/drawings.yaml` drew of the held-out combinations, by features of EfficientNet-Lite0.

    python -m tests.benchmarks.picture_scores TRAINING HELD_OUT --grids NAME=GRID.png ...

TRAINING and HELD_OUT are the datasets of `pipelines/drawings.yaml`. A grid is the image `held_out` in MLflow, which contains the
drawn pictures exactly. The upper reference is as many training pictures with the same styles, which the comparison then leaves
out of the training pictures. Memorization is measured by pixels only, so that only some training pictures need features.
`rbf_mmd` is CMMD's formula, with these features instead of CLIP's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from heliostat.data import manifest
from heliostat.recipes.images import distances, extractors, grids, neighbors
from heliostat.recipes.images.held_out import COLUMNS, labeled
from heliostat.recipes.images.picture_judge import LabeledPictures
from heliostat.recipes.intervals import Estimate
from heliostat.storage.locations import Location
from PIL import Image

from tests.benchmarks import harness

SCORES = ("kid", "rbf_mmd", "fid", "precision", "recall", "density", "coverage", "memorized_pixels")


class Measured(NamedTuple):
    """Contains the features of pictures, fp32 [n, width], and their thumbnails, fp32 [n, pixels]. `training`: thumbnails of the
    training pictures that the pictures are compared with."""

    features: np.ndarray
    pixels: np.ndarray
    training: np.ndarray


def drawn(grid: Path, like: np.ndarray) -> np.ndarray:
    """Cuts the drawn pictures out of the grid of a run: the second of each three rows. `like`: the real pictures, uint8 [n, side,
    side, 3]."""
    count, side = len(like), like.shape[1]
    scale = grids.SHOWN_SIDE // side
    step = side * scale + grids.GAP
    pixels = np.asarray(Image.open(grid).convert("RGB"))

    def row(number: int, line: int) -> Iterator[np.ndarray]:
        for column in range(min(COLUMNS, count - number * COLUMNS)):
            y, x = line * step, column * step
            yield pixels[y : y + side * scale : scale, x : x + side * scale : scale]

    rows = range(-(-count // COLUMNS))
    if not np.array_equal(np.stack([one for n in rows for one in row(n, 3 * n)]), like):
        raise SystemExit(f"{grid}: the real pictures aren't those of HELD_OUT. Pass the dataset of the run")
    return np.stack([one for n in rows for one in row(n, 3 * n + 1)])


def same_styles(training: LabeledPictures, real: LabeledPictures) -> np.ndarray:
    """Chooses random training pictures with the styles of the real pictures: their rows, int64 [n]."""
    generator, styles = np.random.default_rng(0), np.array(training.styles)
    counts = sorted(Counter(real.styles).items())
    return np.concatenate([generator.choice(np.flatnonzero(styles == style), count, replace=False) for style, count in counts])


def scores(made: Measured, real: Measured) -> dict[str, Estimate]:
    out = {"kid": distances.kid(made.features, real.features), "rbf_mmd": distances.cmmd(made.features, real.features)}
    out |= {"fid": Estimate(distances.fid(made.features, real.features))}
    out |= neighbors.manifold(real.features, made.features)
    near, usual = (neighbors.nearest(one.pixels, made.training).distance for one in (made, real))
    return out | {"memorized_pixels": neighbors.memorized(near, usual)}


def cell(one: Estimate) -> str:
    if one.low is None or one.high is None:
        return f"{one.value:.4g}"
    return f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"


def main() -> None:
    options = harness.arguments(__doc__, training=Path, held_out=Path, grids={"nargs": "*", "default": []})
    torch.set_num_threads(1)
    extractor = extractors.load(extractors.LITE0)

    def measured(pictures: np.ndarray, training: np.ndarray) -> Measured:
        parts = [list(pictures[first : first + extractors.AT_ONCE]) for first in range(0, len(pictures), extractors.AT_ONCE)]
        with torch.no_grad():
            features = np.concatenate([extractor(part) for part in parts])
        return Measured(features, thumbnails(pictures), training)

    def thumbnails(pictures: np.ndarray) -> np.ndarray:
        return extractors.thumbnails(list(pictures), 16)

    known, real = (labeled([manifest.read(Location(str(folder)))]) for folder in (options.training, options.held_out))
    training, chosen = thumbnails(known.pictures), same_styles(known, real)
    held = measured(real.pictures, training)
    cases = {"real training pictures": measured(known.pictures[chosen], np.delete(training, chosen, axis=0))}
    for name, _, file in (one.partition("=") for one in options.grids):
        cases[name] = measured(drawn(Path(file), real.pictures), training)
    print(f"{len(real.pictures)} pictures of each kind, {len(known.pictures)} training pictures")
    harness.head("pictures", *SCORES)
    for name, made in cases.items():
        found = scores(made, held)
        harness.row(name, *(cell(found[score]) for score in SCORES))


if __name__ == "__main__":
    main()
