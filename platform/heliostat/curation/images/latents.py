"""Computes latents and text embeddings once, before training, in a pool of actors. So training needs no frozen encoders, which
ZeRO would shard.

Each actor loads the encoders once, on a GPU if the actor has one. For each image, the dataset stores the distribution of the
latents (mean and log variance, float16). In every epoch, training draws new latents from this distribution. For each caption, the
dataset stores the last layer of the text encoder. `empty_caption.bin` contains the text encoder's output for the empty caption.
The last bits of latents and embeddings depend on the machine and the batch. So the dataset's digest may differ on other hardware.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from heliostat.curation.images.pictures import Size
from heliostat.errors import ConfigError
from heliostat.schema import Float, Strict
from heliostat.storage.locations import Location
from heliostat.tasks import shipping
from heliostat.tasks.shipping import Shipment

EMPTY = "empty_caption.bin"


class Latents(Strict):
    """Configures the frozen encoders: their folders, their batch size, and their actors. Without `text_encoder`, captions stay
    text."""

    autoencoder: str
    """Frozen `AutoencoderKL`: a folder, or a name on the Hugging Face Hub (docs/guides/hub.md)."""
    text_encoder: str | None = None
    """Frozen text encoder (CLIP, T5): a folder, or a name on the Hugging Face Hub. Unset: captions stay text."""
    length: int = Field(77, gt=1)
    """Maximum tokens of a caption."""
    workers: int = Field(1, gt=0)
    """Number of encoding actors."""
    gpus: Float = Field(0.0, ge=0)
    """GPUs per actor; 0 encodes on CPUs."""
    batch: int = Field(16, gt=0)
    """Batch size of an actor, in images."""

    def check(self, sizes: tuple[Size, ...], channels: int) -> None:
        from heliostat.recipes.images import config as diffusion_config

        config = diffusion_config.folder_config("latents.autoencoder", self.autoencoder)
        diffusion_config.require_weights("latents.autoencoder", self.autoencoder)
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
        if self.text_encoder:
            diffusion_config.folder_config("latents.text_encoder", self.text_encoder)
            diffusion_config.require_weights("latents.text_encoder", self.text_encoder)

    def identity(self) -> dict[str, Any]:
        """Returns the settings and file digests that determine the latents and embeddings.

        This includes the tokenizer's digest if the models' digests don't cover the tokenizer's files.
        """
        from heliostat.recipes.images import config as diffusion_config

        tokenizer = diffusion_config.tokenizer_digest(self.text_encoder) if self.text_encoder else None
        return {"models": self.models(), "length": self.length, **({"tokenizer": tokenizer} if tokenizer else {})}

    def shipments(self) -> list[Shipment]:
        """Lists the files that heliostat sends to the tasks: the models, and the text encoder's tokenizer."""
        from heliostat.recipes.images import config as diffusion_config

        described = [shipping.describe("latents.autoencoder", self.autoencoder)]
        if self.text_encoder:
            folder, tokenizer = Path(self.text_encoder), diffusion_config.tokenizer_folder(self.text_encoder)
            apart = tokenizer != folder and tokenizer.is_dir()
            within = (folder.name, tokenizer.name) if apart else ()
            described.append(shipping.describe("latents.text_encoder", str(folder.parent if apart else folder), within))
        return described

    def located(self, folder: Location, shipments: list[Shipment]) -> Latents:
        """Returns a copy of the settings in which the models' paths are this node's paths to the files in `shipments`."""
        autoencoder, *text = [shipping.here(folder, one) for one in shipments]
        parts = [Path(self.text_encoder or "").name] if text and shipments[1].within else []
        return self.model_copy(update={"autoencoder": autoencoder, "text_encoder": str(Path(text[0], *parts)) if text else None})

    def models(self) -> dict[str, str]:
        from heliostat.recipes.images import config as diffusion_config

        folders = {"autoencoder": self.autoencoder, **({"text": self.text_encoder} if self.text_encoder else {})}
        return {name: diffusion_config.folder_digest(folder) for name, folder in folders.items()}


class Encoder:
    """Encodes images and captions in an actor. Input: tables with images; output: tables with latents and embeddings."""

    def __init__(self, config: dict[str, Any]) -> None:
        import torch

        from heliostat.recipes.images import config as diffusion_config

        torch.set_num_threads(1)
        self.config = Latents(**config)
        self.device = "cuda" if self.config.gpus else "cpu"
        self.vae = diffusion_config.frozen_autoencoder(self.config.autoencoder).to(self.device)
        self.text = self.tokenizer = None
        if self.config.text_encoder:
            self.text = diffusion_config.frozen_text_encoder(self.config.text_encoder).to(self.device)
            self.tokenizer = diffusion_config.frozen_tokenizer(self.config.text_encoder, self.config.length)

    def __call__(self, table: pa.Table) -> pa.Table:
        latents: list[bytes | None] = [None] * len(table)
        embeddings: list[bytes | None] = [None] * len(table)
        sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
        for size in sorted(set(sizes)):
            mine = [i for i, one in enumerate(sizes) if one == size]
            for first in range(0, len(mine), self.config.batch):
                rows = mine[first : first + self.config.batch]
                part = table.take(pa.array(rows))
                for i, latent in zip(rows, self.latents(part), strict=True):
                    latents[i] = latent.tobytes()
                if self.text is not None:
                    for i, embedding in zip(rows, self.embeddings(part["caption"].to_pylist()), strict=True):
                        embeddings[i] = embedding.tobytes()
        out = table.drop_columns(["image"]).append_column("latent", pa.array(latents, pa.large_binary()))
        return out if self.text is None else out.append_column("embedding", pa.array(embeddings, pa.large_binary()))

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
            vectors = embed(self.text, tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device))
        return vectors.cpu().numpy().astype(np.float16)
