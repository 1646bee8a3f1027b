"""Draws the pictures of a held-out dataset from their captions, and compares them with the real pictures.

`model.samples.held_out` names a dataset that isn't in the job's `data`. Its captions are the prompts. `PictureJudge` learns from
the training pictures, and recognizes the subject and the style of each drawn picture. Scores of the real held-out pictures show
what the judge itself can reach. The nearest training pictures show whether the model copies (`neighbors`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from heliostat.data import manifest
from heliostat.data.chunks import Chunks
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.recipes.images import diffusers_folder, neighbors, rows
from heliostat.recipes.images.decoding import decoded
from heliostat.recipes.images.extractors import thumbnails
from heliostat.recipes.images.gallery import DrawingRecipe, PromptGallery, grid, png
from heliostat.recipes.images.picture_judge import LabeledPictures, PictureJudge
from heliostat.recipes.images.pipeline import generators
from heliostat.recipes.images.quality import PIXELS
from heliostat.storage.locations import Location

KEY = "model.samples.held_out"
SCORES = ("top1", "top5", "style")
MEMORIZED = "memorized_pixels"
NAMES = (*SCORES, *(f"real_{name}" for name in SCORES), MEMORIZED, f"{MEMORIZED}_low", f"{MEMORIZED}_high")
COLUMNS = 16  # pictures per row of the grid
SHOWN = 4  # pictures that the exported model draws


class HeldOutGallery(PromptGallery):
    def __init__(self, recipe: DrawingRecipe) -> None:
        super().__init__(recipe)
        self.real = labeled([held_out(str(self.samples.held_out), recipe.sources)])
        self.prompts = self.real.captions
        self.count = len(self.prompts)
        self._learned: tuple[LabeledPictures, PictureJudge, np.ndarray] | None = None

    def item(self, number: int) -> tuple[str, int]:
        """Returns an image's prompt and seed."""
        return self.prompts[number], self.samples.seed + number

    def judge(
        self, pictures: list[np.ndarray], progressed: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, float], dict[str, bytes]]:
        """Scores the drawn pictures, and the real ones (`real_`). In the grid, each row of real pictures has the drawn row below
        it, and below that, the nearest training picture of each drawn picture."""
        training, known, small = self._training(progressed)
        drawn, real = (known.accuracy(self.real, one) for one in (np.stack(pictures), self.real.pictures))
        scores = {name: drawn[name] for name in SCORES} | {f"real_{name}": real[name] for name in SCORES}
        near, usual = (neighbors.nearest(thumbnails(one, PIXELS), small) for one in (pictures, list(self.real.pictures)))
        scores |= neighbors.memorized(near.distance, usual.distance).named(MEMORIZED)
        return scores, {"held_out": png(in_rows([list(self.real.pictures), pictures, list(training.pictures[near.index])]))}

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        """Draws the first SHOWN captions with the exported model. Returns each caption with the subject that the judge
        recognizes."""
        pipeline, samples, prompts = diffusers_folder.load(folder), self.samples, self.prompts[:SHOWN]
        draws = generators([samples.seed + i for i in range(len(prompts))])
        drawn = pipeline(prompts, num_inference_steps=samples.steps, generator=draws, **self.guidance).images
        ranked = self._training()[1].ranked(np.stack([np.asarray(image) for image in drawn]))
        return [(prompt, f"  (the judge sees: {one[0]})") for prompt, one in zip(prompts, ranked, strict=True)]

    def _training(self, progressed: Callable[[], None] = lambda: None) -> tuple[LabeledPictures, PictureJudge, np.ndarray]:
        """Returns the training pictures with the size of the held-out pictures (`of_size`), the judge that has learned from them,
        and their thumbnails. All evaluations of a run use the same objects."""
        if self._learned is None:
            training = labeled(of_size(self.recipe.sources), progressed)
            self._learned = training, PictureJudge(training), thumbnails(list(training.pictures), PIXELS)
        return self._learned


def held_out(folder: str, sources: list[Manifest]) -> Manifest:
    """Opens the held-out dataset. Reads the footers of the shards. Raises ConfigError if the dataset is missing, if the job
    trains on it, if its images don't have the size of the first dataset's, or if it or a dataset from which the judge learns has
    images without a label or a style."""
    try:
        opened = manifest.read(Location(folder))
    except DataError as e:
        raise ConfigError(f"{KEY}: {e}") from e
    if opened.digest in {source.digest for source in sources}:
        raise ConfigError(f"{KEY}: the job trains on this dataset ({folder}). Use another dataset")
    learned = of_size(sources)
    for source in (opened, *learned):
        if source.meta.get("content") != "images" or source.meta["size"] != sources[0].meta["size"]:
            raise ConfigError(
                f"{KEY}: needs images of one size ({source.location}). "
                "Prepare it with the same pipeline as the training dataset, without an autoencoder"
            )
    texts = [extremes(source, ("label", "style")) for source in (opened, *learned)]
    for column in ("label", "style"):
        for source, least_and_greatest in zip((opened, *learned), texts, strict=True):
            if not all(least_and_greatest[column]):
                raise ConfigError(
                    f"{KEY}: needs a {column} for every image, but {source.location} has images without one. "
                    "Prepare the datasets from drawings:openmoji, or remove this key"
                )
    if len(set[str | None]().union(*(one["style"] for one in texts[1:]))) == 1:
        raise ConfigError(f"{KEY}: needs at least two styles, but the job's datasets have one. Add data in another style")
    return opened


def of_size(sources: list[Manifest]) -> list[Manifest]:
    """Lists the training datasets from which the judge learns: those whose images have the size of the first dataset's, which
    the model draws."""
    return [one for one in sources if one.meta["size"] == sources[0].meta["size"]]


def extremes(source: Manifest, columns: tuple[str, ...]) -> dict[str, set[str | None]]:
    """Returns the least and the greatest text of each row group, for each column, from the statistics in the footers. Contains
    None if a text is null, or if a shard lacks the column. Row groups without statistics add nothing."""
    out: dict[str, set[str | None]] = {column: set() for column in columns}
    for path in source.paths:
        parquet = rows.footer(source.location.join(path))
        names = parquet.schema.names
        for column in columns:
            if column not in names:
                out[column].add(None)
                continue
            for group in range(parquet.num_row_groups):
                if limits := parquet.row_group(group).column(names.index(column)).statistics:
                    out[column] |= {None} if limits.null_count else set()
                    out[column] |= {limits.min, limits.max} if limits.has_min_max else set()
    return out


def labeled(sources: list[Manifest], progressed: Callable[[], None] = lambda: None) -> LabeledPictures:
    """Reads all pictures of datasets, in the order of the shards. Calls `progressed` for every row group."""
    chunks, tables = Chunks(sources, None), list[Any]()
    for number, source in enumerate(sources):
        for chunk in range(source.chunks.num_rows):
            tables.append(chunks.read(number, chunk))
            progressed()

    def column(name: str) -> list[str]:
        return [one for table in tables for one in (table[name].to_pylist() if name in table.column_names else [""] * len(table))]

    pictures = decoded([image for table in tables for image in table["image"].to_pylist()])
    return LabeledPictures(pictures, column("caption"), column("label"), column("style"))


def in_rows(kinds: list[list[np.ndarray]]) -> np.ndarray:
    """Arranges kinds of pictures in rows: COLUMNS pictures of the first kind, below them those of the next kinds with the same
    captions. Returns uint8 [height, width, channels]."""
    white, filled = np.full_like(kinds[0][0], 255), list[np.ndarray]()
    for first in range(0, len(kinds[0]), COLUMNS):
        for pictures in kinds:
            part = pictures[first : first + COLUMNS]
            filled += [*part, *[white] * (COLUMNS - len(part))]
    return grid(filled, COLUMNS)
