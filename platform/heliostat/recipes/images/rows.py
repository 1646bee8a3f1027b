"""Converts rows of a prepared image dataset to tensors, and draws the random numbers of each row.

The random numbers of a sample (noise, timestep, caption dropout) depend only on train.seed and the sample's key. These numbers
come from Philox, a counter-based generator without state. The numbers don't depend on the worker, the micro-batch, or earlier
draws.

The engine gives every position of every step its own key, so a sample gets different noise in every epoch. `draw` draws on the
device (`train.recipe_version: 2`), and `draw_on_host` in NumPy (`train.recipe_version: 1`).
"""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from heliostat.data import shard
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.recipes.counter_random import WORD, normals, uniform, words
from heliostat.recipes.images.decoding import decoded
from heliostat.recipes.images.stored_arrays import AREA, ArrayFormat, StoredType
from heliostat.recipes.images.stored_features import FeatureFormat
from heliostat.storage.locations import Location

SCALARS, NOISE, OFFSET, POSTERIOR = range(4)  # streams of a sample's random numbers


def footer(place: Location) -> pq.FileMetaData:
    """Reads the footer of a shard. Raises DataError if the shard is missing."""

    def get() -> pq.FileMetaData:
        with place.fs.open_input_file(place.path) as file:
            return shard.read_footer(file).parquet

    try:
        return place.attempt(get)
    except FileNotFoundError as e:
        raise DataError(f"{place}: the shard is missing. Restore it, or prepare the dataset again") from e


@dataclass(frozen=True)
class StoredText:
    """Describes the stored embeddings of one text encoder of a list: the digest of the encoder, its settings, and the shapes.
    `pooled`: the width of the pooled embedding, or None."""

    digest: str
    tokens: int
    width: int
    pooled: int | None
    pooling: str | None
    layer: str
    padding: str
    dtype: StoredType = "float16"

    def named(self) -> dict[str, Any]:
        """Returns the description as an entry of a manifest. Earlier versions of heliostat wrote no type, which is float16."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("dtype", "float16")}

    @property
    def settings(self) -> dict[str, str | None]:
        return {"pooling": self.pooling, "layer": self.layer, "padding": self.padding}

    @property
    def columns(self) -> dict[str, tuple[str, ArrayFormat]]:
        """Returns the dataset's column and its format, of the tokens (`text`) and the pooled embedding (`pooled`)."""
        out = {"text": (f"embedding-{self.digest[:12]}", ArrayFormat((self.tokens, self.width), self.dtype))}
        return out | ({"pooled": (f"pooled-{self.digest[:12]}", ArrayFormat((self.pooled,), self.dtype))} if self.pooled else {})


@dataclass(frozen=True)
class DatasetFacts:
    """Contains the common properties of a job's datasets. `size`: the image size (width, height) of the first dataset."""

    content: str  # "images" or "latents"
    channels: int  # channels of an image
    size: tuple[int, int]  # width, height in pixels
    tokenizer: str | None
    vocabulary: int
    end: int
    text: tuple[int, int] | None  # tokens and width of the stored embeddings of one text encoder
    models: dict[str, str]  # digests of the frozen models that computed latents and embeddings
    texts: tuple[StoredText, ...] = ()  # stored embeddings of a list of text encoders
    features: FeatureFormat | None = None  # of stored features of an image model
    latent_dtype: StoredType = "float16"

    def latents(self, shape: tuple[int, int, int]) -> ArrayFormat:
        """Returns the format of stored latents with this shape, [channels, height, width]."""
        return ArrayFormat(shape, self.latent_dtype, AREA)


def facts(sources: list[Manifest], one_source: bool) -> DatasetFacts:
    """Reads the properties that all datasets have in common, such as channels and tokenizer. Raises ConfigError if a job can't
    train on these datasets together."""
    each = [_facts(m) for m in sources]
    names = {"content": "contain different kinds of content", "channels": "have different numbers of channels",
             "tokenizer": "have different tokenizers",
             "texts": "contain embeddings of different text encoders or types", "models": "were computed by different encoders",
             "features": "have different stored features", "latent_dtype": "contain latents of different types"}  # fmt: skip
    for key, what in names.items():
        if len({str(getattr(f, key)) for f in each}) > 1:
            raise ConfigError(f"data.sources: the datasets {what}. Prepare all of them with one pipeline")
    if len({f.size for f in each}) > 1 and not one_source:
        raise ConfigError(
            "data.one_source_batches: required, because the datasets contain images of different sizes. Set this key to true"
        )
    return each[0]


def _facts(m: Manifest) -> DatasetFacts:
    if m.meta.get("content") not in ("images", "latents"):
        raise ConfigError(
            f"data.sources: {m.location} contains no images. Prepare this dataset with heliostat.pipelines:ImagePipeline"
        )
    text = m.meta.get("text")
    return DatasetFacts(
        m.meta["content"], m.meta["channels"], (m.meta["size"][0], m.meta["size"][1]), m.meta.get("tokenizer"),
        m.meta.get("vocab_size", 0), m.meta.get("end_of_document", 0), (text[0], text[1]) if text else None,
        m.meta.get("models", {}), tuple(StoredText(**one) for one in m.meta.get("texts", ())),
        FeatureFormat.of(m.meta.get("features")), m.meta.get("latent_dtype", "float16"),
    )  # fmt: skip


def pixels(content: pa.Table) -> torch.Tensor:
    """Decodes a table's images to fp32 [n, channels, height, width] in [-1, 1]."""
    return scaled(torch.from_numpy(decoded(content["image"].to_pylist())))


def scaled(images: torch.Tensor) -> torch.Tensor:
    """Converts decoded images, uint8 [n, height, width, channels], to fp32 [n, channels, height, width] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def blank(facts: DatasetFacts, shape: tuple[int, int, int], count: int) -> pa.Table:
    """Makes `count` placeholder rows of a dataset: black images, or zero latents of the stored `shape` [channels, height, width].
    Text embeddings, if the dataset has any, are zero."""
    width, height = facts.size
    columns: dict[str, list[object]] = {"width": [width] * count, "height": [height] * count}
    if facts.content == "latents":
        columns["latent"] = [bytes(facts.latents(shape).row_bytes)] * count
    else:
        file = io.BytesIO()
        Image.new("L" if facts.channels == 1 else "RGB", (width, height)).save(file, "png")
        columns["image"] = [file.getvalue()] * count
    if facts.text:
        columns["embedding"] = [bytes(2 * math.prod(facts.text))] * count
    for column, form in (column for one in facts.texts for column in one.columns.values()):
        columns[column] = [bytes(form.row_bytes)] * count
    if facts.features:
        columns["features"] = [bytes(facts.features.arrays.row_bytes)] * count
    return pa.table(columns)


@dataclass(frozen=True)
class SampleDraws:
    """Contains the random numbers of a batch's samples."""

    time: torch.Tensor  # [n], uniform in [0, 1)
    dropped: torch.Tensor  # [n], bool: whether the caption is dropped
    noise: torch.Tensor  # [n, *shape]
    posterior: torch.Tensor | None  # [n, *shape], for sampling latents from their distribution

    def named(self) -> dict[str, torch.Tensor]:
        """Returns the numbers by name, without fields that are None."""
        return {name: values for name, values in vars(self).items() if values is not None}


def draw(seed: int, keys: torch.Tensor, shape: tuple[int, ...], dropout: float, offset: float, posterior: bool) -> SampleDraws:
    """Draws the samples' random numbers on the keys' device, with the same bits on every device. `keys`: int64 [n]. `shape`: the
    shape of one sample's noise.

    `dropout`: the fraction of captions to drop. `offset`: the fraction of noise that is constant over each channel.
    """
    noise = _normal(seed, keys, NOISE, shape)
    if offset:
        noise += offset * _normal(seed, keys, OFFSET, (shape[0], *[1] * (len(shape) - 1)))
    other = _normal(seed, keys, POSTERIOR, shape) if posterior else None
    return SampleDraws(*scalars(seed, keys, dropout), noise, other)


def scalars(seed: int, keys: torch.Tensor, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the `time` and the `dropped` of samples. For the arguments, see `draw`."""
    each = words(seed, keys, SCALARS, 2)
    return uniform(each[:, 0]), each[:, 1] < round(dropout * (WORD + 1))


def _normal(seed: int, keys: torch.Tensor, stream: int, shape: tuple[int, ...]) -> torch.Tensor:
    return normals(seed, keys, stream, math.prod(shape)).view(len(keys), *shape)


def draw_on_host(
    seed: int, keys: np.ndarray, shape: tuple[int, ...], dropout: float, offset: float, posterior: bool
) -> SampleDraws:
    """Draws the samples' random numbers with NumPy, as `train.recipe_version: 1` requires. For the arguments, see `draw`."""
    rows = []
    for key in keys.tolist():
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))
        time, dropped = rng.random(), rng.random() < dropout
        noise = rng.standard_normal(shape, np.float32)
        if offset:
            noise += np.float32(offset) * rng.standard_normal((shape[0], 1, 1), np.float32)
        rows.append((time, dropped, noise, rng.standard_normal(shape, np.float32) if posterior else None))
    times, drops, noises, others = zip(*rows, strict=True)
    return SampleDraws(
        torch.tensor(times, dtype=torch.float32).clamp_(max=1 - 2**-24),
        torch.tensor(drops),
        torch.from_numpy(np.stack(noises)),
        torch.from_numpy(np.stack(others)) if posterior else None,
    )
