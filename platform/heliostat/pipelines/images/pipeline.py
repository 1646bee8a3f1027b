"""Turns images with captions into shards with Ray Data jobs. Run: `heliostat prepare pipelines/quickstart-images.yaml`.

Guarantees: the dataset is a pure function of the input's relative paths and bytes and of the configuration. Every image goes
to the shard that its pixels' SHA-256 names; within a shard images lie by hash, an order that no scheduling can change. Of
equal images, and of those that look alike if `duplicates: perceptual` asks for it, the one with the smallest hash and id
stays. What is left out is listed in `quarantine.parquet` (id, reason, detail), and never stops the job. With `buckets` the
dataset is a collection: one part for each size, and every batch is of one of them. Images never pass through the driver.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field
from ray.data.context import ShuffleStrategy

from heliostat import extras
from heliostat.config.schema import Float, Strict
from heliostat.data import versions
from heliostat.data.manifest import FILES
from heliostat.errors import ConfigError
from heliostat.pipelines.images import pictures
from heliostat.pipelines.images import sources as image_sources
from heliostat.pipelines.images import tasks as image_tasks
from heliostat.pipelines.images.latents import Latents, encoded
from heliostat.pipelines.images.sources import Columns, Limits
from heliostat.pipelines.prepare import InputFile, Pipeline, place
from heliostat.pipelines.text import sources, tokens
from heliostat.storage import Location

log = logging.getLogger(__name__)

FOOTERS_PER_TASK = 64
END = "<|endoftext|>"
CLASSES = 1000  # the most labels that the manifest lists


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


class Tokenizer(Strict):
    """Configures a byte-level BPE trained on the captions, for text encoders that are trained with the model."""

    vocab_size: int = Field(1024, ge=257)
    """Tokens: 256 bytes, the end of a document, and what merges make."""


class ImagePipeline(Pipeline):
    """Defines the keys of an image pipeline's YAML; `heliostat.pipelines.images.sources` describes `input`."""

    later = frozenset({"max_file_bytes", "max_image_bytes"})

    input: str = Field(min_length=1)
    """What is read: `sklearn:digits`, a folder with a metadata file, `*.parquet` or `*.tar` (WebDataset). See
    docs/diffusion.md#images"""
    columns: ColumnNames = ColumnNames()
    """Which columns hold what, in tables and in the JSON of WebDataset."""
    resolution: int = Field(gt=0)
    """Side of a square image in pixels; with buckets, the root of their area."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""
    buckets: Buckets | None = None
    """Sizes of the same area and different aspects, which make the dataset a collection. Unset: every image becomes a square."""
    encoding: pictures.Encoding = "png"
    """How images are stored."""
    quality: int = Field(95, ge=1, le=100)
    """Of `jpeg` and `webp`."""
    min_side: int = Field(1, ge=1)
    """Images with a side of fewer pixels are left out (`too_small`)."""
    max_aspect: Float | None = Field(None, ge=1)
    """Images whose longer side is more than so many shorter ones are left out (`aspect`). Unset: no limit."""
    max_file_bytes: int = Field(Limits.file, ge=1)
    """Input files of more bytes are left out (`too_large`)."""
    max_image_bytes: int = Field(Limits.image, ge=1)
    """Images of more bytes, as they are stored, are left out (`too_large`)."""
    min_caption: int = Field(1, ge=1)
    """Images with captions of fewer characters are left out (`caption_short`)."""
    max_caption: int | None = Field(None, ge=1)
    """Images with captions of more characters are left out (`caption_long`). Unset: no limit."""
    duplicates: Literal["keep", "exact", "perceptual"] = "exact"
    """`keep` all; `exact`: of images with equal pixels one stays; `perceptual`: of those that look alike, too."""
    distance: int = Field(3, ge=0, le=16)
    """Bits of 64 in which the perceptual hashes of two images that look alike may differ."""
    tokenizer: Tokenizer | None = None
    """Trained on the captions, for a text encoder that is trained with the model. Unset: no tokenizer."""
    latents: Latents | None = None
    """What frozen encoders make of images and captions, computed once. Unset: pixels and captions are stored."""
    chunk_images: int = Field(256, gt=0)
    """Images of a chunk, about."""
    shard_images: int = Field(8192, gt=0)
    """Images of a shard, about."""

    @property
    def rules(self) -> pictures.Rules:
        return pictures.Rules(self.sizes, self.channels, self.encoding, self.quality, self.min_side, self.max_aspect,
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
        if self.latents:
            self.latents.check(self.sizes, self.channels)
        if self.input == image_sources.DIGITS:
            extras.require("images", "sklearn", what=f"input: {self.input}")
            return
        here, there = f"{sources.root(self.input).path}/", f"{place(self.output).path}/"
        if here.startswith(there) or there.startswith(here):
            raise ConfigError(f"output: {self.output!r} and the input {self.input!r} lie in one another; move the output away")

    def inputs(self) -> list[InputFile]:
        return image_sources.listing(self.input)

    def identity(self) -> dict[str, Any]:
        config = super().identity()
        if self.latents:
            config["latents"] = self.latents.identity()  # what the models are, not where they lie
        return config

    def write(self, output: Location, inputs: list[InputFile]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        with ray_data():
            return self._write(output, inputs)

    def _write(self, output: Location, inputs: list[InputFile]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        columns = Columns(**self.columns.model_dump())
        tasks = [{"task": json.dumps(t)} for t in image_sources.tasks(self.input, inputs, columns, self.max_file_bytes)]
        rows = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            partial(image_tasks.extract, input=self.input, columns=columns, rules=self.rules,
                    limits=Limits(self.max_file_bytes, self.max_image_bytes)),
            batch_size=1, batch_format="pyarrow",
        )  # fmt: skip
        rows = rows.materialize()  # read once: a second reading could differ
        index = Index(rows, self.duplicates, self.distance)
        shards = {bucket: max(1, round(count / self.shard_images)) for bucket, count in index.buckets.items()}
        assigned = rows.map_batches(
            image_tasks.assign, batch_size=None, batch_format="pyarrow",
            fn_kwargs={"duplicates": ray.put(index.duplicates), "shards": shards},
        )  # fmt: skip
        told: dict[str, Any] = {"content": "images"}
        if self.latents:
            assigned, told = encoded(assigned, self.latents, output, [b for b in index.buckets if self.buckets])
        write_group = partial(
            image_tasks.write_group, output=output.uri, chunk_images=self.chunk_images, parts=self.buckets is not None
        )
        counts, dropped, paths, listed = 0, Counter[str](), dict[str, str](), ""
        for row in assigned.groupby("shard").map_groups(write_group, batch_format="pyarrow").iter_rows():
            counts += row["images"]
            paths |= {row["path"]: row["contents"]} if row["path"] else {}
            listed = row["listed"] or listed
            dropped.update(json.loads(row["dropped"]))
            for reason, examples in json.loads(row["examples"]).items():
                log.warning("dropped: %s, such as %s", pictures.REASONS[reason], sources.examples(examples))
        meta = {"kind": "rows", "dropped": dict(sorted(dropped.items())), "documents": counts, "channels": self.channels}
        if listed:
            meta["listed"] = listed
        if not paths:
            return [], meta
        footers = ray.data.from_items(
            [{"path": p, "contents": c} for p, c in sorted(paths.items())], override_num_blocks=-(-len(paths) // FOOTERS_PER_TASK)
        ).flat_map(partial(image_tasks.footer, output=output.uri))
        sizes = {bucket: {"size": [int(n) for n in bucket.split("x")]} for bucket in index.buckets}
        if self.buckets:
            told["parts"] = sizes
        else:
            told |= sizes.popitem()[1]
        if self.tokenizer:
            made = self._tokenizer(output, index.captions)
            told |= {**made, "files": {**told.get("files", {}), **made["files"]}}
        if 0 < len(index.labels) <= CLASSES:
            told["classes"] = sorted(index.labels)
        return list(footers.iter_rows()), {**meta, **told}

    def _tokenizer(self, output: Location, captions: dict[str, int]) -> dict[str, Any]:
        assert self.tokenizer
        texts = (text for text in sorted(captions) for _ in range(captions[text]))
        definition = tokens.train(texts, self.tokenizer.vocab_size, END)
        folders = [output, *(output.join(f"{w}x{h}") for w, h in self.sizes if self.buckets)]
        (path,) = {versions.store(folder, f"{FILES}/tokenizer-", definition.encode(), ".json") for folder in folders}
        return {
            "files": {"tokenizer.json": path},
            "tokenizer": hashlib.sha256(definition.encode()).hexdigest(),
            "vocab_size": tokens.load(definition).get_vocab_size(),
            "end_of_document": tokens.end_id(tokens.load(definition), END),
        }


class Index:
    """Collects what must be known of all images at once: duplicates, how many each bucket holds, captions and labels."""

    def __init__(self, rows: Any, duplicates: str, distance: int) -> None:
        columns = ["hash", "id", "looks", "width", "height", "caption", "label", "reason"]
        batches = list(rows.select_columns(columns).iter_batches(batch_size=None, batch_format="pyarrow"))
        found = pa.concat_tables(batches).filter(pc.field("reason").is_null())
        found = found.sort_by([("hash", "ascending"), ("id", "ascending")])
        self.duplicates: dict[str, str] = {}  # id -> reason
        if duplicates != "keep":
            hashes = found["hash"].to_numpy()
            found = self._leave_out(found, np.concatenate([[False], hashes[1:] == hashes[:-1]])[: len(found)], "duplicate")
        if duplicates == "perceptual":
            near = pictures.near_duplicates(found["looks"].to_pylist(), distance)
            found = self._leave_out(found, np.array(near, bool), "near_duplicate")
        sizes = zip(found["width"].to_pylist(), found["height"].to_pylist(), strict=True)
        self.buckets = Counter(f"{width}x{height}" for width, height in sizes)
        self.captions = {e["values"]: e["counts"] for e in pc.value_counts(found["caption"]).to_pylist()}
        self.labels = set(pc.unique(found["label"]).to_pylist()) - {""}

    def _leave_out(self, found: pa.Table, which: np.ndarray, reason: str) -> pa.Table:
        self.duplicates |= dict.fromkeys(found["id"].filter(pa.array(which)).to_pylist(), reason)
        return found.filter(pa.array(~which))


@contextmanager
def ray_data() -> Iterator[None]:
    """Sets Ray Data up for these jobs and restores its settings after them: no progress bars, and groups by sorting.

    The hash shuffle starts an actor per partition, which costs more than the whole quickstart (9 s against 3.5 s).
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.shuffle_strategy
    context.enable_progress_bars, context.shuffle_strategy = False, ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    try:
        yield
    finally:
        context.enable_progress_bars, context.shuffle_strategy = before
