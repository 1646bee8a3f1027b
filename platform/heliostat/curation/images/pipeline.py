"""Turns images with captions into shards, on Ray. Run: `heliostat prepare pipelines/quickstart-images.yaml`.

Guarantees: the dataset is a pure function of the input's relative paths and bytes and of the configuration. Every image goes
to the shard that its pixels' SHA-256 names; within a shard images lie by hash, an order that no scheduling can change. Of
equal images, and of those that look the same if `duplicates: perceptual` asks for it, the one with the smallest hash and id
stays. What is left out is listed in `quarantine.parquet` (id, reason, detail), and never stops the job. With `buckets` the
dataset is a collection: one part for each size, and every batch is of one of them. Neither images nor ids pass through the
driver, which holds the input's list of files and a record of each task; a task holds a share of `memory_limit`, a shard's task
its shard.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from heliostat import extras
from heliostat.curation.images import pictures
from heliostat.curation.images import sources as image_sources
from heliostat.curation.images.fetching import Fetching, FetchSettings
from heliostat.curation.images.latents import Latents
from heliostat.curation.images.making import ImageMaking
from heliostat.curation.images.sampling import SampledImages
from heliostat.curation.images.sources import ImageColumns, ImageLimits
from heliostat.curation.images.tasks import LABEL, STORED, ImageSource
from heliostat.curation.prepare import InputFile
from heliostat.curation.sampled import SampledParts
from heliostat.curation.stage import GlobalStage, Stage
from heliostat.curation.staged import StagedPipeline
from heliostat.curation.stages.image_size import ImageSize
from heliostat.curation.stages.similar_images import SimilarImages
from heliostat.curation.text import sources
from heliostat.curation.web import lists
from heliostat.errors import ConfigError
from heliostat.schema import Float, Strict
from heliostat.storage.locations import Location
from heliostat.tasks.flow import Flow


class Buckets(Strict):
    """Defines sizes of the same area and different aspects, all sides multiples of `step`."""

    step: int = Field(64, gt=0)
    """All sides are multiples of it; at most `resolution`."""
    max_aspect: Float = Field(2.0, ge=1)
    """The longest side of a bucket, in shortest ones."""


class ColumnNames(Strict):
    image: str = "image"
    """Holds the encoded image, as bytes or as `{bytes, path}`."""
    caption: str = "caption"
    """Holds the caption."""
    label: str | None = None
    """Holds a class name, which `samples.judge` compares with. Unset: no labels."""
    others: list[str] = []
    """Others (`url`, `license`) that go with each image through the stages, and are kept with the record of what became of it."""


class Tokenizer(Strict):
    """Configures a byte-level BPE trained on the captions, for text encoders that are trained with the model."""

    vocab_size: int = Field(1024, ge=257)
    """Tokens: 256 bytes, the end of a document, and what merges make."""


class ImagePipeline(StagedPipeline):
    """Defines the keys of an image pipeline's YAML; `heliostat.curation.images.sources` describes `input`."""

    later = frozenset({"max_file_bytes", "max_image_bytes", "stages", "fetch"})
    beside = frozenset({"work", "keep_work", "memory_limit"})

    input: str = Field(min_length=1)
    """What is read: `sklearn:digits`, a folder with a metadata file, `*.parquet` or `*.tar` (WebDataset), or a dataset of the
    Hugging Face Hub (`hf://datasets/ORG/NAME`, docs/guides/hub.md). See docs/diffusion.md#images"""
    fetch: FetchSettings | None = None
    """The input is lists of URLs (`.jsonl`, `.csv`, `.parquet`), whose images are fetched. Unset: the input holds images."""
    columns: ColumnNames = ColumnNames()
    """Which columns hold what, in tables and in the JSON of WebDataset."""
    resolution: int = Field(gt=0)
    """Side of a square image in pixels; with buckets, the root of their area."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""
    buckets: Buckets | None = None
    """Sizes of the same area and different aspects, which make the dataset a collection. Unset: every image becomes a square."""
    encoding: pictures.Encoding = "png"
    """How images are stored; `webp` has no grey, so not with `channels: 1`."""
    quality: int = Field(95, ge=1, le=100)
    """Of `jpeg` and `webp`."""
    min_side: int = Field(1, ge=1)
    """Images with a side of fewer pixels are left out (`too_small`)."""
    max_aspect: Float | None = Field(None, ge=1)
    """Images whose longer side is more than so many shorter ones are left out (`aspect`). Unset: no limit."""
    max_file_bytes: int = Field(ImageLimits.file, ge=1)
    """Input files of more bytes are left out (`too_large`)."""
    max_image_bytes: int = Field(ImageLimits.image, ge=1)
    """Images of more bytes, as they are stored, are left out (`too_large`); in a tar, with the other parts of their sample."""
    min_caption: int = Field(1, ge=1)
    """Images with captions of fewer characters are left out (`caption_short`)."""
    max_caption: int | None = Field(None, ge=1)
    """Images with captions of more characters are left out (`caption_long`). Unset: no limit."""
    duplicates: Literal["keep", "exact", "perceptual"] = "exact"
    """`keep` all; `exact`: of images with equal pixels one stays; `perceptual`: of those that look the same, too."""
    distance: int = Field(3, ge=0, le=16)
    """Bits of 64 in which the perceptual hashes of two images that look the same may differ."""
    tokenizer: Tokenizer | None = None
    """Trained on the captions, for a text encoder that is trained with the model. Unset: no tokenizer."""
    latents: Latents | None = None
    """What frozen encoders make of images and captions, computed once. Unset: pixels and captions are stored."""
    chunk_images: int = Field(256, gt=0)
    """Images of a chunk, about."""
    shard_images: int = Field(8192, gt=0)
    """Images of a shard, about."""

    @property
    def rules(self) -> pictures.ImageRules:
        return pictures.ImageRules(self.sizes, self.channels, self.encoding, self.quality, self.min_side, self.max_aspect,
                              self.min_caption, self.max_caption)  # fmt: skip

    @property
    def sizes(self) -> tuple[pictures.Size, ...]:
        if self.buckets is None:
            return ((self.resolution, self.resolution),)
        return pictures.buckets(self.resolution, self.buckets.max_aspect, self.buckets.step)

    def check(self) -> None:
        if self.max_caption is not None and self.max_caption < self.min_caption:
            raise ConfigError(f"max_caption: {self.max_caption} is below min_caption {self.min_caption}; nothing would be kept")
        if self.buckets and self.buckets.step > self.resolution:
            raise ConfigError(f"buckets.step: {self.buckets.step} is above resolution {self.resolution}; no size is a multiple")
        if self.buckets and not self.sizes:
            raise ConfigError(f"buckets.max_aspect: {self.buckets.max_aspect:g} allows no size of resolution {self.resolution} "
                              f"whose sides are multiples of {self.buckets.step}; raise max_aspect or lower step")  # fmt: skip
        if self.channels == 1 and self.encoding == "webp":
            raise ConfigError("encoding: webp stores no grey, and channels is 1; take png or jpeg")
        if self.latents:
            self.latents.check(self.sizes, self.channels)
        if LABEL in self.columns.others:
            raise ConfigError(f"columns.others: {LABEL!r} is the name of the label's; name that column by columns.label")
        self._check_stages()
        self.check_columns({LABEL, *self.columns.others}, "columns.others")
        digits = self.input == image_sources.DIGITS
        if digits:
            extras.require("images", "sklearn", what=f"input: {self.input}")
        self.check_places(self.input, None if digits else sources.root(self.input).path)

    def _check_stages(self) -> None:
        stored, known = "", {LABEL, *STORED, *self.columns.others}
        for stage in self.stages:
            if stored and isinstance(stage, ImageSize):
                raise ConfigError(f"stages: image_size is after {stored}, where images have the size that they are stored "
                                  "in; put it before")  # fmt: skip
            stored = stored or (stage.named() if stage.gpu or isinstance(stage, GlobalStage) else "")
            for name in stage.stored():
                if name in known:
                    raise ConfigError(f"stages: {stage.named()}: {name!r} is a column of the shards, or one of columns.others, "
                                      "already; give another name")  # fmt: skip
                known.add(name)
            stage.check()

    def inputs(self) -> list[InputFile]:
        if self.fetch:
            return lists.listing(self.input)
        return image_sources.listing(self.input, self.max_file_bytes)

    def identity(self) -> dict[str, Any]:
        config = super().identity()
        if not self.columns.others:
            del config["columns"]["others"]
        if self.fetch:
            config["fetch"] = self.fetch.identity()
        if self.stages:
            config["stages"] = [stage.identity() for stage in self.stages]
        if self.latents:
            config["latents"] = self.latents.identity()  # what the models are, not where they lie
        return config

    def sampled(self, inputs: list[InputFile], fraction: float) -> SampledParts:
        if self.fetch:
            raise ConfigError(
                "--sample: a dry run would fetch images only to throw them away; fetch a part of the list as a dataset"
            )
        return SampledParts(fraction)

    def making(self, flow: Flow, output: Location, sample: SampledParts | None = None) -> ImageMaking:
        fetching = Fetching(self.fetch, self.max_image_bytes) if self.fetch else None
        columns = ImageColumns(self.columns.image, self.columns.caption, self.columns.label, tuple(self.columns.others))
        limits = ImageLimits(self.max_file_bytes, self.max_image_bytes)
        reads = SampledImages if sample else ImageSource
        return ImageMaking(
            flow=flow, source=reads(self.input, columns, self.rules, limits, flow.work.spill, fetching), output=output,
            stages=self.stages, last=self.last, memory_limit=self.memory_limit, sample=sample,
            shard_images=self.shard_images, chunk_images=self.chunk_images, channels=self.channels,
            buckets=self.buckets is not None, tokenizer=self.tokenizer.vocab_size if self.tokenizer else None,
            latents=self.latents,
        )  # fmt: skip

    @property
    def last(self) -> Stage | None:
        """Returns the stage after all others: the one that finds duplicates."""
        if self.duplicates == "keep":
            return None
        return SimilarImages(distance=self.distance if self.duplicates == "perceptual" else None)
