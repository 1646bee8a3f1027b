"""Builds the trained models and loads the frozen models of a text-to-image job. Checks that the models fit the data and each
other.

heliostat loads frozen encoders at their first use, so ZeRO never shards frozen encoders.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from heliostat.data.device_streams import Arrival
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes.constants import Constant
from heliostat.recipes.images import config, diffusers_folder, patches, rows, training_aids, whitening
from heliostat.recipes.images.config import Model
from heliostat.recipes.images.pipeline import embed, predict, tokenize
from heliostat.recipes.images.training_aids import TrainingAids
from heliostat.recipes.protocol import Companion
from heliostat.recipes.text import masks


class Denoiser(nn.Module):
    """Contains all models that are trained: the backbone and, unless it is frozen, the text encoder. The models have the names
    that a diffusers pipeline uses. `aids`: what only training uses, such as the projector of `model.repa`."""

    def __init__(self, part: str, backbone: nn.Module, text_encoder: nn.Module | None, aids: TrainingAids | None = None) -> None:
        super().__init__()
        self.part = part
        self.add_module(part, backbone)
        if text_encoder is not None:
            self.text_encoder = text_encoder
        self._aids = aids or TrainingAids()
        if self._aids.projector is not None:
            self.projector = self._aids.projector

    def forward(
        self,
        noisy: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        keys: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> Any:
        """Runs the backbone. `text`: token ids if the text encoder is also trained, else embeddings.

        `keys`: the samples' keys, with which tokens skip blocks (`model.tread`). `features`: stored features [n, rows, columns,
        channels]; with features, returns the prediction and the samples' similarity to the features [n] (`model.repa`).
        """
        if not text.is_floating_point():
            text = self.text_encoder(input_ids=text)[0]
        self._aids.begin(keys, features)
        prediction = predict(getattr(self, self.part), noisy, t, text.to(noisy.dtype))
        if features is None:
            return prediction
        return prediction, self.projector(self._aids.hidden(noisy.shape[2:]), features)


class Parts:
    def __init__(self, model: Model, checkpointing: bool, frozen_type: torch.dtype = torch.float32, seed: int = 0) -> None:
        """Prepares the models without weights. `frozen_type`: the dtype of the frozen encoders. `seed`: of `model.tread`."""
        self.model, self.checkpointing, self.frozen_type, self.seed = model, checkpointing, frozen_type, seed
        self._places: dict[str, tuple[torch.device, Arrival]] = {}  # devices of the frozen encoders
        self.arch, self.family = config.backbone_family(model.backbone)
        self.name = self.family.part  # a pipeline's name for the backbone
        self.facts: rows.DatasetFacts | None = None
        self.sources: list[Manifest] = []

    def bind(self, sources: list[Manifest], one_source: bool) -> None:
        """Reads channels, sizes, and tokenizer from the datasets. Raises ConfigError if the datasets don't fit the models, or if
        the models don't fit each other."""
        self.sources, self.facts = sources, rows.facts(sources, one_source)
        f = self.facts
        if f.content == "latents" and self.vae_config is None:
            raise ConfigError(
                "model.autoencoder: required, because the datasets contain latents. Set this key to the autoencoder that "
                "computed the latents"
            )
        folders = {"autoencoder": self.model.autoencoder, "text": self.model.text if self.model.text.pretrained else None}
        for name, digest in f.models.items():
            folder = folders[name]
            if folder is None or config.folder_digest(str(folder.pretrained)) != digest:
                raise ConfigError(
                    f"model.{name}.pretrained: the datasets were prepared with another model. Set this key to the "
                    "other model's folder"
                )
        if f.text and f.text != (self.model.text.embeddings, self.width):
            key = "pooling" if 1 in (f.text[0], self.model.text.embeddings) else "length"
            raise ConfigError(
                f"model.text.{key}: captions have {self.model.text.embeddings} embeddings of width {self.width}, but "
                f"{f.text[0]} of width {f.text[1]} in the datasets. Set this key as in the pipeline's latents.{key}"
            )
        if not self.model.text.pretrained and f.tokenizer is None:
            raise ConfigError(
                "model.text: the datasets have no tokenizer. Prepare the datasets with a tokenizer, or set model.text.pretrained"
            )
        sizes = [(m.meta["size"][0], m.meta["size"][1]) for m in sources]
        patches.check(self.model.patch, sizes, self.vae_config is not None)
        keys, channels = self._given(), self.shape()[0]
        if self.family.channels(keys, channels) != channels:
            raise ConfigError(
                f"model.backbone.in_channels: {keys['in_channels']} given, but the data has {channels} channels. "
                f"Set this key to {channels * self.family.packed}, or use another backbone"
            )
        if (said := self._answers(keys)) != channels:
            more = ". The backbone also predicts the variance, which heliostat doesn't train" if said == 2 * channels else ""
            raise ConfigError(
                f"model.backbone.out_channels: {said} given, but the prediction target has {channels} channels{more}. "
                f"Set this key to {channels}, or use another backbone"
            )
        if fault := self.family.fault(keys, "pretrained" in self.model.backbone):
            raise ConfigError(f"model.backbone.{fault}")
        for key in self.family.widths(keys):
            if keys.get(key, self.width) != self.width:
                raise ConfigError(
                    f"model.backbone.{key}: {keys[key]} given, but the text encoder's width is {self.width}. "
                    f"Set this key to {self.width}, or use another text encoder"
                )
        self._divide(keys)
        if self.model.text.whiten:
            whitening.check(keys, self.model.text.pooling, f.text is not None)
        _, height, width = self.shape()
        training_aids.require(self.model, f.features, height * width // int(keys.get("patch_size") or 2) ** 2)
        for name, weights in folders.items():
            if weights:
                config.require_weights(f"model.{name}.pretrained", str(weights.pretrained))
        with torch.device("meta"):
            self.build()  # fails if the keys don't fit together
            if "pretrained" in self.model.backbone:
                self._try(self.family.cls.from_config(keys))

    def _divide(self, keys: config.Keys) -> None:
        """Raises ConfigError if the backbone can't cut the images of a dataset into patches."""
        step = self.family.step(keys)
        for size in {(m.meta["size"][0], m.meta["size"][1]) for m in self.sources}:
            _, height, width = self.shape(size)
            if height % step or width % step:
                pixels = step * size[0] // width
                raise ConfigError(
                    f"data.sources: images of {size[0]}x{size[1]} pixels given, but the backbone needs sides that are multiples "
                    f"of {pixels} pixels. Change `resolution` in the pipeline, or use another backbone"
                )

    def presume(self, count: int) -> pa.Table | None:
        """Returns placeholder samples for datasets that don't exist yet, in sizes from the backbone. The samples are latents if
        the job has an autoencoder, otherwise images, together with text embeddings.

        Returns None if the job doesn't set sizes, or if the job trains its own text encoder, because then the vocabulary comes
        from the dataset.
        """
        if not self.model.text.pretrained or "sample_size" not in self._given() or (self.model.repa and not self.facts):
            return None
        if self.facts is None:
            channels, height, width = self.shape()
            latents, text = self.vae_config is not None, (self.model.text.embeddings, self.width)
            factor = 2 ** (len(self.vae_config["block_out_channels"]) - 1) if self.vae_config else self.model.patch
            size = width * factor, height * factor
            content, of_image = ("latents", 3) if latents else ("images", channels // self.model.patch**2)
            self.facts = rows.DatasetFacts(content, of_image, size, None, 0, 0, text, {})
            self.empty = {"text": torch.zeros(text)}
        return rows.blank(self.facts, self.shape(), count)

    @cached_property
    def vae_config(self) -> config.Keys | None:
        folder = self.model.autoencoder
        return config.folder_config("model.autoencoder.pretrained", folder.pretrained) if folder else None

    @cached_property
    def width(self) -> int:
        """Returns the width of the text embeddings."""
        return config.text_width(self.model.text)

    def text_width(self) -> int:
        """Returns the width of the text embeddings.

        Without datasets, uses the backbone's key for this width if the job sets this key, because the encoder's folder may be
        missing.
        """
        width = self._given().get(self.family.widths(self._given())[0])
        return width if self.facts is None and width else self.width

    def _given(self) -> config.Keys:
        """Returns the backbone's keys from the job, or the configuration in the pretrained backbone's folder."""
        keys = self.model.backbone
        return config.folder_config(config.PRETRAINED, keys["pretrained"]) | keys if "pretrained" in keys else keys

    def _answers(self, keys: config.Keys) -> int:
        """Returns the number of channels of the backbone's output, from the backbone's keys."""
        written = "pretrained" in self.model.backbone or "out_channels" in keys
        said = self.family.answers(keys) if written else None
        return self.shape()[0] if said is None else said

    @torch.no_grad()
    def _try(self, backbone: nn.Module) -> None:
        """Runs the backbone on one sample, on the meta device. Raises ConfigError if the run fails, or if the output's shape
        differs from the input's shape."""
        shape = (1, *self.shape())
        try:
            said = predict(backbone, torch.zeros(shape), torch.zeros(1), torch.zeros((1, self.model.text.embeddings, self.width)))
        except (ValueError, TypeError, AttributeError, IndexError, KeyError, RuntimeError) as e:
            why = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
            raise ConfigError(
                f"model.backbone.pretrained: the backbone needs more inputs than images and captions ({why}). "
                "Use another backbone"
            ) from e
        if said.shape != shape:
            raise ConfigError(
                f"model.backbone.pretrained: the output has shape {tuple(said.shape[1:])} for images of shape {shape[1:]}. "
                "Use another backbone"
            )

    def shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """Returns the channels, height, and width of the noised tensor. `size`: width and height in pixels. Without datasets,
        returns the backbone's values."""
        if self.facts is None:
            keys = self._given()
            return self.family.channels(keys), keys.get("sample_size", 64), keys.get("sample_size", 64)
        width, height = size or self.facts.size
        if self.vae_config is None:
            return patches.shape(self.model.patch, self.facts.channels, (width, height))
        factor = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        return self.vae_config["latent_channels"], height // factor, width // factor

    def _defaults(self) -> dict[str, object]:
        """Derives the backbone's keys that follow from the data and the text encoder."""
        out: dict[str, object] = {}
        if self.facts:
            out |= dict.fromkeys(self.family.widths(self.model.backbone), self.width)
            channels, height, width = self.shape()
            inputs = channels * self.family.packed
            out |= {"in_channels": inputs, "out_channels": inputs, "sample_size": max(height, width)}
        return out | self.family.derived(self.model.backbone)

    def build(self) -> nn.Module:
        trained, end = not self.model.text.pretrained, self.facts.end if self.facts else 0
        encoder = None
        if trained:
            vocabulary = -(-self.facts.vocabulary // 64) * 64 if self.facts else 64
            encoder = config.build_text_encoder(self.model.text, vocabulary, end)
        backbone = config.build_backbone(self.model.backbone, self._defaults())
        if self.model.text.whiten and "pretrained" not in self.model.backbone:
            whitening.whiten(backbone.encoder_hid_proj, self.sources)
        if self.checkpointing:
            backbone.enable_gradient_checkpointing()
            if encoder is not None:
                encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        aids = TrainingAids.of(
            self.model, backbone, self.seed, self.facts.features.channels if self.facts and self.facts.features else 0
        )
        return Denoiser(self.name, backbone, encoder, aids).train()

    @cached_property
    def vae(self) -> Any:
        """Loads the frozen autoencoder at its first use, so that ZeRO never shards this autoencoder."""
        folder = self.model.autoencoder
        return config.frozen_autoencoder(folder.pretrained, self.frozen_type) if folder else None

    @cached_property
    def text_encoder(self) -> nn.Module:
        """Loads the frozen text encoder at its first use, so that ZeRO never shards this encoder."""
        return config.frozen_text_encoder(str(self.model.text.pretrained), self.frozen_type)

    def frozen_on(self, name: str, device: torch.device) -> Any:
        """Returns a frozen encoder (`vae` or `text_encoder`) on a device. Any CUDA stream may use the encoder."""
        model = getattr(self, name)
        if name not in self._places or self._places[name][0] != device:
            model.to(device)
            self._places[name] = device, Arrival(device)
        self._places[name][1].awaited()
        return model

    def companions(self) -> dict[str, Companion]:
        """Lists the frozen encoders.

        These encoders are on the device in every step. If the datasets contain an encoder's outputs, this encoder is on the
        device only during image generation.
        """
        assert self.facts
        parts = {}
        if self.model.text.pretrained:
            size = config.frozen_bytes(str(self.model.text.pretrained), self.frozen_type)
            parts["text_encoder"] = Companion(size, self.facts.text is None)
        if self.vae_config:
            parts["vae"] = Companion(config.frozen_bytes(self.vae_config, self.frozen_type), self.facts.content == "images")
        return {name: c for name, c in parts.items() if c.every_step or self.model.samples.draws}

    def rest(self) -> None:
        """Moves an encoder off the device if the datasets contain its outputs, because then only image generation needs the
        encoder."""
        assert self.facts
        idle = {"text_encoder": self.facts.text is not None, "vae": self.facts.content == "latents"}
        resting = [name for name, is_idle in idle.items() if is_idle and self.__dict__.get(name) is not None]
        on_gpu = [name for name in resting if next(getattr(self, name).parameters()).is_cuda]
        for name in resting:
            self.frozen_on(name, torch.device("cpu"))
        if on_gpu:
            torch.cuda.empty_cache()  # leaves memory for allocations outside torch's allocator

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.model.text.pretrained:
            return config.frozen_tokenizer(self.model.text.pretrained, self.model.text.length)
        assert self.facts
        definition = self.sources[0].file("tokenizer.json").read()
        return diffusers_folder.tokenizer(definition, self.facts.end, self.model.text.length)

    @cached_property
    def empty(self) -> dict[str, torch.Tensor]:
        """Encodes the empty caption as `text` and `mask`: token ids [length], or the stored embedding [length, width]."""
        assert self.facts
        if self.facts.text:
            raw = self.sources[0].file("empty_caption.bin").read()
            return {"text": torch.from_numpy(np.frombuffer(raw, np.float16).reshape(self.facts.text).copy()).float()}
        tokens = tokenize(self.tokenizer, [""])
        return {"text": tokens.input_ids[0], "mask": tokens.attention_mask[0]}

    def empty_on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Returns the encoded empty caption (`empty`) on a device. Later calls return the same tensors."""
        return {name: constant.on(device) for name, constant in self._empty.items()}

    @cached_property
    def _empty(self) -> dict[str, Constant]:
        return {name: Constant(values) for name, values in self.empty.items()}

    @torch.no_grad()
    def conditioning(self, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Prepares captions for the model. Returns token ids if the model contains the text encoder, else the embeddings of the
        frozen encoder."""
        if text.is_floating_point() or not self.model.text.pretrained:
            return text
        assert mask is not None
        with masks.unread(whole=True):
            return embed(self.frozen_on("text_encoder", text.device), text, mask, self.model.text.pooling)

    @torch.no_grad()
    def clean(self, content: torch.Tensor, posterior: torch.Tensor | None) -> torch.Tensor:
        """Returns the tensor to which noise is added: pixels or their patches, or latents drawn from their distribution (stored,
        or computed from pixels)."""
        if self.vae_config is None:
            return patches.cut(content, self.model.patch)
        if self.facts and self.facts.content == "images":
            encoder = self.frozen_on("vae", content.device)
            content = encoder.encode(content.to(self.frozen_type)).latent_dist.parameters.float()
        assert posterior is not None
        mean, logvar = content.chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * posterior
        return (latents - (self.vae_config.get("shift_factor") or 0.0)) * self.vae_config.get("scaling_factor", 0.18215)
