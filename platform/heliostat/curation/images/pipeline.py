"""Turns images with captions into shards, on Ray. Run: `heliostat data prepare pipelines/quickstart-images.yaml`.

Guarantees:

- The dataset is a pure function of the configuration, and of the relative paths and bytes of the input files.
- The SHA-256 of an image's pixels selects the image's shard. Within a shard, images are sorted by this hash, so scheduling can't
  change the order.
- Of several equal images, only the image with the smallest hash stays. With `duplicates: perceptual`, the same is true of
  near-duplicates. Of images with equal hashes, the image with the smallest id stays.
- Dropped images are listed in `quarantine.parquet` (id, reason, detail). They never stop the job.
- With `buckets`, the dataset is a collection: one dataset per image size. All images of a batch have the same size.
- Images and ids never pass through the driver. The driver has in memory only the list of input files, and a record of each task.
- Each task uses at most a share of `memory_limit`. One exception: a task that writes a shard has the complete shard in memory.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from heliostat import extras
from heliostat.curation.images import drawings, pictures
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
    """Defines image sizes with about the same area and different aspect ratios. The sides of all sizes are multiples of
    `step`."""

    step: int = Field(64, gt=0)
    """Bucket sides are multiples of this number, in pixels. The number is at most `resolution`."""
    max_aspect: Float = Field(2.0, ge=1)
    """Maximum ratio of a bucket's longer side to its shorter side."""


class ColumnNames(Strict):
    image: str = "image"
    """Column with the encoded image, as bytes or as `{bytes, path}`."""
    caption: str = "caption"
    """Column with the caption."""
    label: str | None = None
    """Column with the class name. `samples.judge` compares generated images with this class. Unset: no labels."""
    others: list[str] = []
    """Further columns, such as `url` and `license`. Stages can read these columns, and the record of each image contains them."""
    captions: list[str] = []
    """Columns of `others` or of stages with further captions. The shards contain these captions, and also their embeddings if
    `latents` has a text encoder. `model.captions` of a job chooses among the captions."""


class Tokenizer(Strict):
    """Configures a byte-level BPE tokenizer trained on the captions, for text encoders that train with the model."""

    vocab_size: int = Field(1024, ge=257)
    """Vocabulary size: 256 bytes, the end-of-document token, and merges."""


class ImagePipeline(StagedPipeline):
    """Defines the keys of an image pipeline's YAML; `heliostat.curation.images.sources` describes `input`."""

    later = frozenset({"max_file_bytes", "max_image_bytes", "stages", "fetch", "record_documents"})

    input: str = Field(min_length=1)
    """Input: `sklearn:digits`, `drawings:openmoji`, a folder with a metadata file, `*.parquet` or `*.tar` (WebDataset), or a
    dataset of the Hugging Face Hub (`hf://datasets/ORG/NAME`, docs/guides/hub.md). See docs/data/images.md"""
    fetch: FetchSettings | None = None
    """Settings for an input of URL lists (`.jsonl`, `.csv`, `.parquet`): heliostat fetches the images by HTTP. Unset: the input
    contains the images."""
    columns: ColumnNames = ColumnNames()
    """Names of the columns in tables, and of the keys in WebDataset's JSON."""
    resolution: int = Field(gt=0)
    """Side of a square image in pixels; with `buckets`, the square root of a bucket's area."""
    channels: Literal[1, 3] = 3
    """Number of channels: 3 for color, 1 for grayscale."""
    buckets: Buckets | None = None
    """Image sizes with the same area and different aspect ratios. The dataset is then a collection. Unset: every image becomes a
    square."""
    encoding: pictures.Encoding = "png"
    """Format of stored images; `webp` doesn't support grayscale (`channels: 1`)."""
    quality: int = Field(95, ge=1, le=100)
    """Encoder quality of stored `jpeg` and `webp` images; higher values make larger files."""
    min_side: int = Field(1, ge=1)
    """Minimum side of an image in pixels; smaller images are dropped (`too_small`)."""
    max_aspect: Float | None = Field(None, ge=1)
    """Maximum ratio of an image's longer side to its shorter side; other images are dropped (`aspect`). Unset: no limit."""
    max_file_bytes: int = Field(ImageLimits.file, ge=1)
    """Maximum bytes of an input file; larger files are dropped (`too_large`)."""
    max_image_bytes: int = Field(ImageLimits.image, ge=1)
    """Maximum bytes of an image in the input; larger images are dropped (`too_large`). In a tar, this is the limit of all parts
    of a sample together."""
    min_caption: int = Field(1, ge=1)
    """Minimum characters of a caption; images with shorter captions are dropped (`caption_short`)."""
    max_caption: int | None = Field(None, ge=1)
    """Maximum characters of a caption; images with longer captions are dropped (`caption_long`). Unset: no limit."""
    duplicates: Literal["keep", "exact", "perceptual"] = "exact"
    """Duplicate removal: `keep` keeps all images; `exact` keeps one of the images with equal pixels; `perceptual` also removes
    near-duplicates."""
    distance: int = Field(3, ge=0, le=16)
    """Maximum Hamming distance of the 64-bit perceptual hashes of near-duplicates."""
    tokenizer: Tokenizer | None = None
    """Tokenizer trained on the captions, for a text encoder that trains with the model. Unset: no tokenizer."""
    latents: Latents | None = None
    """Frozen encoders whose outputs for images and captions are computed once. Unset: the dataset stores pixels and captions."""
    chunk_images: int = Field(256, gt=0)
    """Images per row group, approximately."""
    shard_images: int = Field(8192, gt=0)
    """Images per shard, approximately."""

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
            raise ConfigError(
                f"max_caption: {self.max_caption} is below min_caption {self.min_caption}, so no image can pass. "
                "Raise max_caption, or lower min_caption"
            )
        if self.buckets and self.buckets.step > self.resolution:
            raise ConfigError(
                f"buckets.step: {self.buckets.step} is above resolution {self.resolution}, so no size is possible. "
                "Lower buckets.step"
            )
        if self.buckets and not self.sizes:
            raise ConfigError(f"buckets.max_aspect: {self.buckets.max_aspect:g} allows no size of resolution {self.resolution} "
                f"with sides that are multiples of {self.buckets.step}. "
                "Raise buckets.max_aspect, or lower buckets.step")  # fmt: skip
        if self.channels == 1 and self.encoding == "webp":
            raise ConfigError("encoding: webp doesn't support grayscale (channels: 1). Use png or jpeg")
        if self.latents:
            self.latents.check(self.sizes, self.channels)
        if LABEL in self.columns.others:
            raise ConfigError(
                f"columns.others: {LABEL!r} is the name of the label column. Remove this entry, and set columns.label"
            )
        self._check_stages()
        self._check_captions()
        self.check_columns({LABEL, *self.columns.others}, "columns.others")
        if self.input == image_sources.DIGITS:
            extras.require("images", "sklearn", what=f"input: {self.input}")
        if self.input.startswith(drawings.SCHEME):
            drawings.check(self.input)
        else:
            sources.require_built_in(self.input, [image_sources.DIGITS, f"{drawings.SCHEME}openmoji"])
        self.check_places(self.input, None if image_sources.is_made(self.input) else sources.root(self.input).path)

    def _check_captions(self) -> None:
        """Raises ConfigError for a further caption that isn't a column of the images, or that every image has."""
        known = [*self.columns.others, *(name for stage in self.stages for name in stage.stored())]
        for name in self.columns.captions:
            if name not in known:
                raise ConfigError(
                    f"columns.captions: {name!r} isn't in columns.others, and no stage stores it. "
                    "Add this column to columns.others"
                )

    def _check_stages(self) -> None:
        stored, known = "", {LABEL, *STORED, *self.columns.others}
        for stage in self.stages:
            if stored and isinstance(stage, ImageSize):
                raise ConfigError(f"stages: image_size comes after {stored}. From this stage on, all images have "
                                  f"the dataset's size. Move image_size before {stored}")  # fmt: skip
            stored = stored or (stage.named() if stage.gpu or isinstance(stage, GlobalStage) else "")
            for name in stage.stored():
                if name in known:
                    raise ConfigError(f"stages: {stage.named()}: {name!r} is already a column of the shards, or one of "
                        "columns.others. Choose another name for the stage's column")  # fmt: skip
                known.add(name)
        self.check_stages()

    def inputs(self) -> list[InputFile]:
        if self.fetch:
            return lists.listing(self.input)
        return image_sources.listing(self.input, self.max_file_bytes)

    def identity(self) -> dict[str, Any]:
        config = super().identity()
        if not self.columns.others:
            del config["columns"]["others"]
        if not self.columns.captions:
            del config["columns"]["captions"]
        if self.fetch:
            config["fetch"] = self.fetch.identity()
        if self.stages:
            config["stages"] = [stage.identity() for stage in self.stages]
        if self.latents:
            config["latents"] = self.latents.identity()  # the models' identity, without their location
        return config

    def sampled(self, inputs: list[InputFile], fraction: float) -> SampledParts:
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
            latents=self.latents, captions=tuple(self.columns.captions), every=self.every(sample),
        )  # fmt: skip

    @property
    def last(self) -> Stage | None:
        """Returns the stage that finds duplicates, which runs after all other stages; None if the pipeline keeps duplicates."""
        if self.duplicates == "keep":
            return None
        return SimilarImages(distance=self.distance if self.duplicates == "perceptual" else None)
