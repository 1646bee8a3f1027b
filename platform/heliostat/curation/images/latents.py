"""Computes latents and text embeddings once, before training, in a pool of actors. So training needs no frozen encoders, which
ZeRO would shard.

Each actor loads the encoders once, on a GPU if the actor has one. For each image, the dataset stores the distribution of the
latents (mean and log variance, float16). In every epoch, training draws new latents from this distribution. Without an
autoencoder, the dataset stores the image. For each caption, the dataset stores the last layer of the text encoder, or this
layer's mean over the caption's tokens. `empty_caption.bin` contains the text encoder's output for the empty caption.
The last bits of latents and embeddings depend on the machine and the batch. So the dataset's digest may differ on other hardware.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from heliostat.curation.images.features import FEATURES, FeatureEncoder, StoredFeatures
from heliostat.curation.images.pictures import Size
from heliostat.errors import ConfigError
from heliostat.schema import Float, Strict
from heliostat.storage.locations import Location
from heliostat.tasks import shipping
from heliostat.tasks.shipping import Shipment

EMPTY = "empty_caption.bin"


class Latents(Strict):
    """Configures the frozen encoders: their folders, their batch size, and their actors. At least one encoder is required."""

    autoencoder: str | None = None
    """Frozen `AutoencoderKL`: a folder, or a name on the Hugging Face Hub (docs/guides/hub.md). Unset: images stay pixels."""
    text_encoder: str | None = None
    """Frozen text encoder (CLIP, T5, BERT): a folder, or a name on the Hugging Face Hub. Unset: captions stay text."""
    pooling: Literal["mean"] | None = None
    """`mean`: stores one embedding per caption, the mean over the caption's tokens. Unset: stores one embedding per token."""
    features: StoredFeatures | None = None
    """Features of a frozen image model, for `model.repa`. Unset: no features."""
    length: int = Field(77, gt=1)
    """Maximum tokens of a caption."""
    workers: int = Field(1, gt=0)
    """Number of encoding actors."""
    gpus: Float = Field(0.0, ge=0)
    """GPUs per actor; 0 encodes on CPUs."""
    batch: int = Field(16, gt=0)
    """Batch size of an actor, in images."""

    def check(self, sizes: tuple[Size, ...], channels: int) -> None:
        """Raises ConfigError if an encoder can't be loaded, or if the autoencoder doesn't fit the images."""
        from transformers import AutoConfig

        from heliostat.recipes.images import config as diffusion_config
        from heliostat.recipes.images import text_encoders
        from heliostat.recipes.pretrained import from_folder

        if not self.folders():
            raise ConfigError("latents: has no encoder. Set latents.autoencoder, latents.text_encoder, or both")
        if self.pooling and not self.text_encoder:
            raise ConfigError("latents.pooling: needs a text encoder. Set latents.text_encoder, or remove this key")
        for name, folder in self.folders().items():
            config = diffusion_config.folder_config(name, folder)
            diffusion_config.require_weights(name, folder)
            if name == "latents.autoencoder":
                self._check_sizes(config, sizes, channels)
            elif name == "latents.text_encoder":
                text_encoders.kind(name, from_folder(name, AutoConfig, folder))
            elif self.features:
                self.features.check()

    @staticmethod
    def _check_sizes(config: dict[str, Any], sizes: tuple[Size, ...], channels: int) -> None:
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        for size in sizes:
            if size[0] % factor or size[1] % factor:
                raise ConfigError(
                    f"latents.autoencoder: image sides must be multiples of {factor}, not {size[0]}x{size[1]}. "
                    "Change resolution, or buckets.step"
                )
        if config["in_channels"] != channels:
            raise ConfigError(
                f"channels: is {channels}, but latents.autoencoder has {config['in_channels']} input channels (in_channels). "
                "Set channels to in_channels"
            )

    def folders(self) -> dict[str, str]:
        """Returns the folder of each encoder, by the name of its key."""
        features = self.features.encoder if self.features else None
        named = {"latents.autoencoder": self.autoencoder, FEATURES: features, "latents.text_encoder": self.text_encoder}
        return {name: folder for name, folder in named.items() if folder}

    def identity(self) -> dict[str, Any]:
        """Returns the settings and file digests that determine the latents and embeddings.

        This includes the tokenizer's digest if the models' digests don't cover the tokenizer's files.
        """
        from heliostat.recipes.images import config as diffusion_config

        tokenizer = diffusion_config.tokenizer_digest(self.text_encoder) if self.text_encoder else None
        pooled = {"pooling": self.pooling} if self.pooling else {}
        featured = {"features": self.features.identity()} if self.features else {}
        others = {**pooled, **featured, **({"tokenizer": tokenizer} if tokenizer else {})}
        return {"models": self.models(), "length": self.length, **others}

    def shipments(self) -> list[Shipment]:
        """Lists the files that heliostat sends to the tasks: the models, and the text encoder's tokenizer."""
        from heliostat.recipes.images import config as diffusion_config

        described = [shipping.describe("latents.autoencoder", self.autoencoder)] if self.autoencoder else []
        described += [shipping.describe(FEATURES, self.features.encoder)] if self.features else []
        if self.text_encoder:
            folder, tokenizer = Path(self.text_encoder), diffusion_config.tokenizer_folder(self.text_encoder)
            apart = tokenizer != folder and tokenizer.is_dir()
            within = (folder.name, tokenizer.name) if apart else ()
            described.append(shipping.describe("latents.text_encoder", str(folder.parent if apart else folder), within))
        return described

    def located(self, folder: Location, shipments: list[Shipment]) -> Latents:
        """Returns a copy of the settings in which the models' paths are this node's paths to the files in `shipments`."""
        places = dict(zip(self.folders(), [shipping.here(folder, one) for one in shipments], strict=True))
        text = places.get("latents.text_encoder")
        if text and self.text_encoder and shipments[-1].within:
            text = str(Path(text, Path(self.text_encoder).name))
        features = self.features.model_copy(update={"encoder": places[FEATURES]}) if self.features else None
        return self.model_copy(
            update={"autoencoder": places.get("latents.autoencoder"), "text_encoder": text, "features": features}
        )

    def models(self) -> dict[str, str]:
        from heliostat.recipes.images import config as diffusion_config

        folders = {"autoencoder": self.autoencoder, "text": self.text_encoder}
        return {name: diffusion_config.folder_digest(folder) for name, folder in folders.items() if folder}


class Encoded(NamedTuple):
    """Holds an encoded table, and facts about its stored features; None without features."""

    table: pa.Table
    features: dict[str, Any] | None


class Encoder:
    """Encodes images and captions in an actor. Input: tables with images. Output: tables with latents, embeddings, or features.
    With latents, the output has no images."""

    def __init__(self, config: dict[str, Any]) -> None:
        import torch

        from heliostat.recipes.images import config as diffusion_config

        torch.set_num_threads(1)
        self.config = Latents(**config)
        self.device = "cuda" if self.config.gpus else "cpu"
        self.vae = self.text = self.tokenizer = None
        self.features = FeatureEncoder(self.config.features, self.device) if self.config.features else None
        if self.config.autoencoder:
            self.vae = diffusion_config.frozen_autoencoder(self.config.autoencoder).to(self.device)
        if self.config.text_encoder:
            self.text = diffusion_config.frozen_text_encoder(self.config.text_encoder).to(self.device)
            self.tokenizer = diffusion_config.frozen_tokenizer(self.config.text_encoder, self.config.length)

    def __call__(self, table: pa.Table, captions: tuple[str, ...] = ()) -> Encoded:
        """Encodes a table. Also returns the facts about its features, if the settings have features. `captions`: names of further
        captions in the column `columns`. An empty caption has no embedding."""
        from heliostat.recipes.images.rows import pixels
        from heliostat.recipes.images.stored_features import FeatureError

        latents: list[bytes | None] = [None] * len(table)
        embeddings: list[bytes | None] = [None] * len(table)
        features: list[bytes | None] = [None] * len(table)
        error = FeatureError()
        sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
        for size in sorted(set(sizes)):
            mine = [i for i, one in enumerate(sizes) if one == size]
            for first in range(0, len(mine), self.config.batch):
                rows = mine[first : first + self.config.batch]
                part = table.take(pa.array(rows))
                if self.vae is not None:
                    for i, latent in zip(rows, self.latents(part), strict=True):
                        latents[i] = latent.tobytes()
                if self.features is not None:
                    packed, lost = self.features(pixels(part))
                    error += lost
                    for i, one in zip(rows, packed, strict=True):
                        features[i] = one
                if self.text is not None:
                    for i, embedding in zip(rows, self.embeddings(part["caption"].to_pylist()), strict=True):
                        embeddings[i] = embedding.tobytes()
        out = table
        if self.vae is not None:
            out = table.drop_columns(["image"]).append_column("latent", pa.array(latents, pa.large_binary()))
        if self.text is not None:
            out = out.append_column("embedding", pa.array(embeddings, pa.large_binary()))
        for name in captions if self.text is not None else ():
            texts = [str(json.loads(columns).get(name, "")) if columns else "" for columns in table["columns"].to_pylist()]
            out = out.append_column(f"embedding_{name}", pa.array(self._each_embedding(texts), pa.large_binary()))
        if self.features is None:
            return Encoded(out, None)
        out = out.append_column("features", pa.array(features, pa.large_binary()))
        return Encoded(out, {"format": self.features.format.named(), "error": vars(error)})

    def _each_embedding(self, texts: list[str]) -> list[bytes]:
        """Embeds texts in batches; b"" for an empty text."""
        out, filled = [b""] * len(texts), [i for i, text in enumerate(texts) if text]
        for first in range(0, len(filled), self.config.batch):
            rows = filled[first : first + self.config.batch]
            for i, embedding in zip(rows, self.embeddings([texts[i] for i in rows]), strict=True):
                out[i] = embedding.tobytes()
        return out

    def latents(self, table: pa.Table) -> np.ndarray:
        import torch

        from heliostat.recipes.images.rows import pixels

        with torch.no_grad():
            return self.vae.encode(pixels(table).to(self.device)).latent_dist.parameters.cpu().numpy().astype(np.float16)

    def embeddings(self, captions: list[str]) -> np.ndarray:
        import torch

        from heliostat.recipes.images.pipeline import embed, tokenize

        tokens = tokenize(self.tokenizer, captions)
        with torch.no_grad():
            ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
            vectors = embed(self.text, ids, mask, self.config.pooling)
        return vectors.cpu().numpy().astype(np.float16)
