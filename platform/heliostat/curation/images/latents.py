"""Computes latents and text embeddings once, before training, in a pool of actors. So training needs no frozen encoders, which
ZeRO would shard.

Each actor loads the encoders once, on a GPU if the actor has one (`stream`). For each image, the dataset stores the
distribution of the latents (mean and log variance). In every epoch, training draws new latents from this distribution.
Without an autoencoder, the dataset stores the image. For each caption, the dataset stores the last layer of the text encoder,
or this layer's mean over the caption's tokens. `empty_caption.bin` contains the text encoder's output for the empty caption.
The last bits of latents and embeddings depend on the machine and the batch. So the dataset's digest may differ on other
hardware.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from heliostat.config.fields import ActorGpus
from heliostat.curation.images.batches import PIXELS, further, pixels
from heliostat.curation.images.features import FEATURES, FeatureEncoder, StoredFeatures
from heliostat.curation.images.pictures import Size
from heliostat.errors import ConfigError
from heliostat.schema import Strict
from heliostat.storage.locations import Location
from heliostat.tasks import shipping
from heliostat.tasks.shipping import Shipment

if TYPE_CHECKING:
    import torch

    from heliostat.recipes.images.stored_arrays import ArrayFormat, StoredErrors

EMPTY = "empty_caption.bin"


class TextEncoding(Strict):
    """Describes a frozen text encoder of a list, and the embeddings that it computes. The keys are those of `model.text` in a
    job, where they must be the same."""

    text_encoder: str
    """Frozen text encoder (CLIP, T5, BERT, Gemma): a folder, or a name on the Hugging Face Hub."""
    length: int = Field(77, gt=1)
    """Maximum tokens of a caption."""
    pooling: Literal["mean"] | None = None
    """`mean`: stores one embedding per caption, the mean over the caption's tokens. Unset: stores one embedding per token."""
    layer: Literal["last", "penultimate"] = "last"
    """Layer that gives the embeddings. SD3 and U-Nets with two CLIP encoders take the `penultimate` layer of CLIP, and Lumina the
    `penultimate` layer of Gemma."""
    padding: Literal["seen", "kept", "zero"] | None = None
    """Padding of short captions. `seen`: the text encoder attends to it, as in SD3 and FLUX. `kept`: the text encoder masks it,
    but the dataset stores its embeddings. `zero`: these embeddings are zero, so that a job can mask them. Unset: `seen` for CLIP,
    `kept` for T5, else `zero`."""
    dtype: Literal["float16", "int8"] = "float16"
    """Type of stored embeddings. `int8` needs half of the space, with a scale per embedding."""

    @property
    def settings(self) -> dict[str, str | None]:
        """Returns the arguments of `pipeline.encode`."""
        return {"pooling": self.pooling, "layer": self.layer, "padding": self.padding}


class Latents(Strict):
    """Configures the frozen encoders: their folders, their batch size, and their actors. At least one encoder is required."""

    autoencoder: str | None = None
    """Frozen `AutoencoderKL` or `AutoencoderDC`: a folder, or a name on the Hugging Face Hub (docs/guides/hub.md). Unset: images
    stay pixels."""
    latent_dtype: Literal["float16", "int8"] = "float16"
    """Type of stored latents. `int8` needs half of the space, with a scale per channel of each image."""
    text_encoder: str | None = None
    """Frozen text encoder (CLIP, T5, BERT): a folder, or a name on the Hugging Face Hub. Unset: captions stay text."""
    pooling: Literal["mean"] | None = None
    """`mean`: stores one embedding per caption, the mean over the caption's tokens. Unset: stores one embedding per token."""
    features: StoredFeatures | None = None
    """Features of a frozen image model, for `model.repa`. Unset: no features."""
    length: int = Field(77, gt=1)
    """Maximum tokens of a caption."""
    text_encoders: list[TextEncoding] = Field([], max_length=3)
    """Several frozen text encoders, for SD3, FLUX, or a U-Net with two CLIP encoders. Also for one text encoder with keys that
    `text_encoder` doesn't have. Use either `text_encoder` or this key."""
    workers: int = Field(1, gt=0)
    """Number of encoding actors."""
    gpus: ActorGpus = 0.0
    """GPUs per actor; 0 encodes on CPUs. With GPUs, CPUs read and decode images while the actors encode."""
    batch: int = Field(16, gt=0)
    """Batch size of an actor, in images."""

    def check(self, sizes: tuple[Size, ...], channels: int) -> None:
        """Raises ConfigError if an encoder can't be loaded, or if the autoencoder doesn't fit the images."""
        from transformers import AutoConfig

        from heliostat.recipes.images import config as diffusion_config
        from heliostat.recipes.images import frozen_autoencoders, text_encoders
        from heliostat.recipes.pretrained import from_folder

        if not self.folders():
            keys = "autoencoder, text_encoder, text_encoders, features"
            raise ConfigError(f"latents: has no encoder. Set at least one of these keys: {keys}")
        if self.text_encoder and self.text_encoders:
            raise ConfigError("latents.text_encoder: can't be combined with latents.text_encoders. Move it into the list")
        if self.latent_dtype != "float16" and not self.autoencoder:
            raise ConfigError("latents.latent_dtype: needs an autoencoder. Set latents.autoencoder, or remove this key")
        if self.pooling and not self.text_encoder:
            raise ConfigError("latents.pooling: needs a text encoder. Set latents.text_encoder, or remove this key")
        for name, folder in self.folders().items():
            config = diffusion_config.folder_config(name, folder)
            diffusion_config.require_weights(name, folder)
            if name == "latents.autoencoder":
                frozen_autoencoders.kind(name, config)
                self._check_sizes(config, sizes, channels)
            elif name.endswith("text_encoder"):
                text_encoders.kind(name, from_folder(name, AutoConfig, folder))
            elif self.features:
                self.features.check()

    @staticmethod
    def _check_sizes(config: dict[str, Any], sizes: tuple[Size, ...], channels: int) -> None:
        from heliostat.recipes.images import frozen_autoencoders

        factor = frozen_autoencoders.factor(config)
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
        named = {"latents.autoencoder": self.autoencoder, FEATURES: self.features.encoder if self.features else None}
        named["latents.text_encoder"] = self.text_encoder
        each = {f"latents.text_encoders.{n}.text_encoder": one.text_encoder for n, one in enumerate(self.text_encoders)}
        return {name: folder for name, folder in {**named, **each}.items() if folder}

    @property
    def texts(self) -> list[TextEncoding]:
        """Returns the text encoders of either key."""
        if self.text_encoder:
            return [TextEncoding(text_encoder=self.text_encoder, length=self.length, pooling=self.pooling)]
        return self.text_encoders

    @property
    def needs_pixels(self) -> bool:
        """Returns whether an encoder needs decoded images."""
        return bool(self.autoencoder or self.features)

    def identity(self) -> dict[str, Any]:
        """Returns the settings and file digests that determine the latents and embeddings.

        This includes the tokenizer's digest if the models' digests don't cover the tokenizer's files.
        """
        from heliostat.recipes.images import config as diffusion_config

        tokenizer = diffusion_config.tokenizer_digest(self.text_encoder) if self.text_encoder else None
        pooled = {"pooling": self.pooling} if self.pooling else {}
        several = [
            {**one.model_dump(exclude={"text_encoder"} | ({"dtype"} if one.dtype == "float16" else set())),
             "digest": diffusion_config.folder_digest(one.text_encoder),
             "tokenizer": diffusion_config.tokenizer_digest(one.text_encoder)} for one in self.text_encoders
        ]  # fmt: skip
        featured = {"features": self.features.identity()} if self.features else {}
        more = {"tokenizer": tokenizer} if tokenizer else {"texts": several} if several else {}
        return {"models": self.models(), "length": self.length, **pooled, **featured, **more, **self.stored_type()}

    def stored_type(self) -> dict[str, str]:
        """Returns the manifest's entry about the type of latents. Datasets in float16 have no entry."""
        return {"latent_dtype": self.latent_dtype} if self.latent_dtype != "float16" else {}

    def shipments(self) -> list[Shipment]:
        """Lists the files that heliostat sends to the tasks: the models, and the text encoder's tokenizer."""
        from heliostat.recipes.images import config as diffusion_config

        described = [shipping.describe("latents.autoencoder", self.autoencoder)] if self.autoencoder else []
        described += [shipping.describe(FEATURES, self.features.encoder)] if self.features else []
        for name, text_encoder in self.folders().items():
            if not name.endswith("text_encoder"):
                continue
            folder, tokenizer = Path(text_encoder), diffusion_config.tokenizer_folder(text_encoder)
            apart = tokenizer != folder and tokenizer.is_dir()
            within = (folder.name, tokenizer.name) if apart else ()
            described.append(shipping.describe(name, str(folder.parent if apart else folder), within))
        return described

    def located(self, folder: Location, shipments: list[Shipment]) -> Latents:
        """Returns a copy of the settings in which the models' paths are this node's paths to the files in `shipments`."""
        places = dict[str, str]()
        for (name, model), one in zip(self.folders().items(), shipments, strict=True):
            place = shipping.here(folder, one)
            places[name] = str(Path(place, Path(model).name)) if one.within else place
        each = [
            one.model_copy(update={"text_encoder": places[f"latents.text_encoders.{n}.text_encoder"]})
            for n, one in enumerate(self.text_encoders)
        ]
        features = self.features.model_copy(update={"encoder": places[FEATURES]}) if self.features else None
        single = {key: places.get(f"latents.{key}") for key in ("autoencoder", "text_encoder")}
        return self.model_copy(update={**single, "text_encoders": each, "features": features})

    def models(self) -> dict[str, str]:
        from heliostat.recipes.images import config as diffusion_config

        folders = {"autoencoder": self.autoencoder, "text": self.text_encoder}
        return {name: diffusion_config.folder_digest(folder) for name, folder in folders.items() if folder}


class EncodedImages(NamedTuple):
    """Holds an encoded batch, facts about its stored features (None without features), and the errors of its other columns."""

    table: pa.Table
    features: dict[str, Any] | None
    errors: StoredErrors


def packed(key: str, form: ArrayFormat, values: torch.Tensor, names: tuple[str, ...]) -> tuple[list[bytes], StoredErrors]:
    """Packs an encoder's outputs, fp32 [n, *shape]. Returns the rows, and the errors that packing adds. Raises ConfigError, with
    `key` at its beginning, if a stored value isn't finite, such as of the layer before the final norm of a large T5.

    `names`: of the quantities that the outputs have one after the other along the first axis of `shape`. Each has an error of its
    own, because quantities may differ in size.
    """
    from heliostat.recipes.images.stored_arrays import StoredError

    rows, stored = form.pack(values)
    pairs = zip(names, values.chunk(len(names), 1), stored.chunk(len(names), 1), strict=True)
    errors = {name: StoredError.between(form.dtype, exact, restored) for name, exact, restored in pairs}
    if not all(math.isfinite(error.missed) for error in errors.values()):
        raise ConfigError(
            f"{key}: outputs aren't finite in {form.dtype}, in which datasets store them (largest: {values.abs().max():g}). "
            "Set layer: last, or use another model"
        )
    return rows, errors


class EmbeddedTexts(NamedTuple):
    """Holds the outputs of a text encoder for some texts, fp32 [n, *shape], and their format. `key`: of the text encoder."""

    key: str
    form: ArrayFormat
    values: torch.Tensor


class Encoder:
    """Encodes batches (`encoding`) in an actor. Adds columns with latents, embeddings, or features. With latents, the result has
    no images."""

    def __init__(self, config: Latents) -> None:
        import torch

        from heliostat.recipes.images import config as diffusion_config

        torch.set_num_threads(1)
        self.config = config
        self.device = "cuda" if self.config.gpus else "cpu"
        self.vae, self.texts = None, list[tuple[TextEncoding, Any, Any]]()
        self.features = FeatureEncoder(self.config.features, self.device) if self.config.features else None
        if self.config.autoencoder:
            self.vae = diffusion_config.frozen_autoencoder(self.config.autoencoder).to(self.device)
        for one in self.config.texts:
            encoder = diffusion_config.frozen_text_encoder(one.text_encoder).to(self.device)
            self.texts.append((one, encoder, diffusion_config.frozen_tokenizer(one.text_encoder, one.length)))

    def __call__(self, batch: pa.Table, captions: tuple[str, ...] = ()) -> EncodedImages:
        """Encodes a batch. `captions`: names of further captions in the column `columns`. An empty caption has no embedding."""
        from heliostat.recipes.images.captions import CAPTION, embedding_column
        from heliostat.recipes.images.stored_arrays import summed

        out = batch.drop_columns([c for c in (PIXELS, *(["image"] if self.vae is not None else [])) if c in batch.column_names])
        columns, facts, error = self._of_pixels(batch) if self.config.needs_pixels else ({}, None, {})
        errors = [error]
        for name in (CAPTION, *captions):
            texts = batch[CAPTION].to_pylist() if name == CAPTION else further(batch, name)
            embedded, error = self._each_embedding(texts)
            columns |= {embedding_column(stored, name): values for stored, values in embedded.items()}
            errors.append(error)
        for name, column in columns.items():
            out = out.append_column(name, pa.array(column, pa.large_binary()))
        return EncodedImages(out, facts, summed(errors))

    def _of_pixels(self, batch: pa.Table) -> tuple[dict[str, list[bytes]], dict[str, Any] | None, StoredErrors]:
        """Encodes a batch's images. Returns the values of each column, the facts about features, and the errors of latents."""
        import torch

        from heliostat.recipes.images import frozen_autoencoders
        from heliostat.recipes.images.rows import scaled
        from heliostat.recipes.images.stored_arrays import AREA, ArrayFormat

        images, columns = scaled(torch.from_numpy(pixels(batch)).to(self.device)), dict[str, list[bytes]]()
        errors: StoredErrors = {}
        if self.vae is not None:
            latents = self.latents(images)
            form = ArrayFormat(latents.shape[1:], self.config.latent_dtype, AREA)
            names = frozen_autoencoders.quantities(self.vae.config)
            columns["latent"], errors = packed("latents.autoencoder", form, latents, names)
        if self.features is None:
            return columns, None, errors
        columns["features"], error = self.features(images)
        return columns, {"format": self.features.format.named(), "error": vars(error)}, errors

    def _each_embedding(self, texts: list[str]) -> tuple[dict[str, list[bytes]], StoredErrors]:
        """Embeds texts with each text encoder. Returns the values of each column (b"" for an empty text), and their error."""
        out = {name: [b""] * len(texts) for name in self.embedded()}
        rows = [i for i, text in enumerate(texts) if text]
        errors: StoredErrors = {}
        for name, one in self.embeddings([texts[i] for i in rows]).items() if rows else ():
            values, error = packed(*one, (name,))
            errors |= error
            for i, value in zip(rows, values, strict=True):
                out[name][i] = value
        return out, errors

    def embedded(self) -> list[str]:
        """Returns the names of the columns with embeddings."""
        if self.config.text_encoder:
            return ["embedding"]
        return [column for one in self.stored() for column, _ in one.columns.values()]

    def stored(self) -> list[Any]:
        """Describes the stored embeddings of a list of text encoders (`rows.StoredText`)."""
        from heliostat.recipes.images import config as diffusion_config
        from heliostat.recipes.images import text_encoders
        from heliostat.recipes.images.pipeline import padding_of
        from heliostat.recipes.images.rows import StoredText

        out = []
        for one, encoder, _ in self.texts:
            width, pooled = text_encoders.widths(encoder.config)
            settings: dict[str, Any] = {**one.settings, "padding": one.padding or padding_of(encoder.config.model_type)}
            tokens = 1 if one.pooling else one.length
            digest = diffusion_config.folder_digest(one.text_encoder)
            out.append(StoredText(digest, tokens, width, pooled, **settings, dtype=one.dtype))
        return out

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Encodes images in [-1, 1], [n, channels, height, width]."""
        import torch

        from heliostat.recipes.images import frozen_autoencoders

        with torch.no_grad():
            return frozen_autoencoders.encode(self.vae, images)

    def embeddings(self, captions: list[str]) -> dict[str, EmbeddedTexts]:
        """Embeds captions with each text encoder. Returns the values of each column."""
        import torch

        from heliostat.recipes.images.pipeline import encode, tokenize
        from heliostat.recipes.images.stored_arrays import ArrayFormat

        out: dict[str, EmbeddedTexts] = {}
        several = [] if self.config.text_encoder else self.stored()
        for number, (one, encoder, tokenizer) in enumerate(self.texts):
            tokens = tokenize(tokenizer, captions)
            with torch.no_grad():
                ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
                encoded = encode(encoder, ids, mask, one.pooling, one.layer, one.padding)
            key = f"latents.text_encoders.{number}" if several else "latents.text_encoder"
            single = {"text": ("embedding", ArrayFormat(encoded.tokens.shape[1:]))}
            for name, (column, form) in (several[number].columns if several else single).items():
                value = encoded.tokens if name == "text" else encoded.pooled
                assert value is not None
                out[column] = EmbeddedTexts(key, form, value)
        return out
