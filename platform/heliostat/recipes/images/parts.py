"""Builds the trained models of a text-to-image job. Checks that all models fit the data and each other."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes.images import config, frozen_autoencoders, patches, rows, training_aids, whitening
from heliostat.recipes.images.conditioning import CaptionParts, presumed
from heliostat.recipes.images.config import Model
from heliostat.recipes.images.pipeline import predict
from heliostat.recipes.images.training_aids import TrainingAids
from heliostat.recipes.protocol import Companion


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
        pooled: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        guidance: float = 1.0,
        keys: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> Any:
        """Runs the backbone. `text`: token ids if the text encoder is also trained, else embeddings. `pooled`, `mask`,
        `lengths`, `guidance`: see `predict`.

        `keys`: the samples' keys, with which tokens skip blocks (`model.tread`). `features`: stored features [n, rows, columns,
        channels]; with features, returns the prediction and the samples' similarity to the features [n] (`model.repa`).
        """
        if not text.is_floating_point():
            text = self.text_encoder(input_ids=text)[0]
        self._aids.begin(keys, features)
        pooled = None if pooled is None else pooled.to(noisy.dtype)
        prediction = predict(getattr(self, self.part), noisy, t, text.to(noisy.dtype), pooled, mask, guidance, lengths)
        if features is None:
            return prediction
        return prediction, self.projector(self._aids.hidden(noisy.shape[2:]), features)


class Parts(CaptionParts):
    def __init__(self, model: Model, checkpointing: bool, frozen_type: torch.dtype = torch.float32, seed: int = 0) -> None:
        """Prepares the models without weights. `frozen_type`: the dtype of the frozen encoders. `seed`: of `model.tread`."""
        self.arch, family = config.backbone_family(model.backbone)
        super().__init__(model, family, frozen_type)
        self.checkpointing, self.seed = checkpointing, seed
        self.name = family.part  # a pipeline's name for the backbone

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
        folder = self.model.autoencoder.pretrained if self.model.autoencoder else None
        if (digest := f.models.get("autoencoder")) and (folder is None or config.folder_digest(folder) != digest):
            raise ConfigError(
                "model.autoencoder.pretrained: the datasets were prepared with another model. Set this key to the "
                "other model's folder"
            )
        self.match_texts()
        if not self.model.frozen_text and f.tokenizer is None:
            raise ConfigError(
                "model.text: the datasets have no tokenizer. Prepare the datasets with a tokenizer, or set model.text.pretrained"
            )
        sizes = [(m.meta["size"][0], m.meta["size"][1]) for m in sources]
        patches.check(self.model.patch, sizes, self.vae_config is not None)
        keys, channels, pretrained = self.given(), self.shape()[0], "pretrained" in self.model.backbone
        inputs = channels * self.family.packed
        if keys.get("in_channels", inputs) != inputs:
            raise ConfigError(
                f"model.backbone.in_channels: {keys['in_channels']} given, but the data has {channels} channels. "
                f"Set this key to {inputs}, or use another backbone"
            )
        if (said := self._answers(keys)) != channels:
            more = ". The backbone also predicts the variance, which heliostat doesn't train" if said == 2 * channels else ""
            raise ConfigError(
                f"model.backbone.out_channels: {said} given, but the prediction target has {channels} channels{more}. "
                f"Set this key to {channels}, or use another backbone"
            )
        if fault := self.family.fault(keys, pretrained):
            raise ConfigError(f"model.backbone.{fault}")
        for key, width in self.widths().items():
            if keys.get(key, width) != width:
                raise ConfigError(
                    f"model.backbone.{key}: {keys[key]} given, but the text encoder's width is {width}. "
                    f"Set this key to {width}, or use another text encoder"
                )
        if self.distilled and not self.model.samples.guided.plain:
            key = "guidance_rescale" if self.model.samples.guidance_rescale else "guidance_interval"
            raise ConfigError(
                f"model.samples.{key}: not supported by a distilled backbone, which gets the guidance scale as input. "
                "Remove this key"
            )
        self._divide(keys)
        if self.whitened:
            whitening.check(keys, self.whitened.pooling, len(self.model.texts), self.embedded, pretrained)
        _, height, width = self.shape()
        training_aids.require(self.model, f.features, height * width // self.family.step(keys) ** 2)
        if self.model.autoencoder:
            config.require_weights("model.autoencoder.pretrained", self.model.autoencoder.pretrained)
        for part in self.frozen_texts:
            config.require_weights(f"{part.key}.pretrained", part.folder)
        with torch.device("meta"):
            built = self.backbone(self.build())  # fails if the keys don't fit together
            if pretrained:
                built = self.family.cls.from_config(config.folder_config(config.PRETRAINED, self.model.backbone["pretrained"]))
            for size in dict.fromkeys(sizes):
                self._try(built, self.shape(size))

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
        if not self.model.frozen_text or "sample_size" not in self.given() or (self.model.repa and not self.facts):
            return None
        if self.facts is None:
            channels, height, width = self.shape()
            latents, text = self.vae_config is not None, self.text_shape
            factor = frozen_autoencoders.factor(self.vae_config) if self.vae_config else self.model.patch
            size = width * factor, height * factor
            content, of_image = ("latents", 3) if latents else ("images", channels // self.model.patch**2)
            several = [presumed(part) for part in self.frozen_texts] if len(self.frozen_texts) > 1 else []
            one = None if several else (text.tokens, text.width)
            self.facts = rows.DatasetFacts(content, of_image, size, None, 0, 0, one, {}, tuple(several))
            self.stored = several
            self.empty = {name: torch.zeros(form.shape) for name, (_, form) in self.stored_columns().items()}
        return rows.blank(self.facts, self.stored_shape(), count)

    @cached_property
    def vae_config(self) -> config.Keys | None:
        folder = self.model.autoencoder
        return config.folder_config("model.autoencoder.pretrained", folder.pretrained) if folder else None

    @property
    def distilled(self) -> bool:
        """Returns whether the backbone gets the guidance scale as input."""
        return bool(self.given().get("guidance_embeds"))

    @property
    def whitened(self) -> config.Text | None:
        """Returns the text encoder with `whiten`; None without one."""
        return next((text for text in self.model.texts if text.whiten), None)

    def _answers(self, keys: config.Keys) -> int:
        """Returns the number of channels of the backbone's output, from the backbone's keys."""
        written = "pretrained" in self.model.backbone or "out_channels" in keys
        said = self.family.answers(keys) if written else None
        return self.shape()[0] if said is None else said

    @property
    def moments(self) -> int:
        """Returns the numbers that describe one latent (`frozen_autoencoders.moments`); 1 for pixels."""
        return frozen_autoencoders.moments(self.vae_config) if self.vae_config else 1

    def stored_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """Returns the shape of an image's content in the datasets: its pixels, or its stored latents. `size`: width and height in
        pixels."""
        channels, height, width = self.shape(size)
        return channels * self.moments, height, width

    @torch.no_grad()
    def _try(self, backbone: nn.Module, shape: tuple[int, int, int]) -> None:
        """Runs the backbone on one sample of this shape, on the meta device. Raises ConfigError if the run fails, or if the
        output has another shape."""
        key = config.PRETRAINED if "pretrained" in self.model.backbone else "model.backbone"
        try:
            said = predict(backbone, torch.zeros((1, *shape)), torch.zeros(1), *self.text_shape.blank(1))
        except (ValueError, TypeError, AttributeError, IndexError, KeyError, RuntimeError) as e:
            why = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
            raise ConfigError(
                f"{key}: the backbone can't compute {shape[2]} x {shape[1]} positions from images and captions ({why}). "
                "Use another backbone"
            ) from e
        if said.shape[1:] != shape:
            raise ConfigError(
                f"{key}: the output has shape {tuple(said.shape[1:])} for images of shape {shape}. Use another backbone"
            )

    def shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """Returns the channels, height, and width of the noised tensor. `size`: width and height in pixels. Without datasets,
        returns the backbone's values."""
        if self.facts is None:
            keys = self.given()
            return self.family.channels(keys), keys.get("sample_size", 64), keys.get("sample_size", 64)
        width, height = size or self.facts.size
        if self.vae_config is None:
            return patches.shape(self.model.patch, self.facts.channels, (width, height))
        factor = frozen_autoencoders.factor(self.vae_config)
        return self.vae_config["latent_channels"], height // factor, width // factor

    def _defaults(self) -> dict[str, object]:
        """Derives the backbone's keys that follow from the data and the text encoder."""
        out: dict[str, object] = {}
        if self.facts:
            out |= self.widths()
            channels, height, width = self.shape()
            inputs = channels * self.family.packed
            out |= {"in_channels": inputs, "out_channels": inputs, "sample_size": max(height, width)}
        return out | self.family.derived(self.model.backbone)

    def backbone(self, model: nn.Module) -> Any:
        return getattr(model, self.name)

    def build(self) -> nn.Module:
        trained, end = not self.model.frozen_text, self.facts.end if self.facts else 0
        encoder = None
        if trained:
            vocabulary = -(-self.facts.vocabulary // 64) * 64 if self.facts else 64
            encoder = config.build_text_encoder(self.model.texts[0], vocabulary, end)
        backbone = config.build_backbone(self.model.backbone, self._defaults())
        if self.whitened:
            whitening.whiten(backbone.encoder_hid_proj, self.sources, *self.stored_columns()["text"])
        if self.checkpointing:
            backbone.enable_gradient_checkpointing()
            if encoder is not None:
                encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        aids = TrainingAids.of(
            self.model, backbone, self.seed, self.facts.features.channels if self.facts and self.facts.features else 0
        )
        return Denoiser(self.name, backbone, encoder, aids).train()

    def companions(self) -> dict[str, Companion]:
        """Lists the frozen encoders.

        These encoders are on the device in every step. If the datasets contain an encoder's outputs, this encoder is on the
        device only during image generation.
        """
        assert self.facts
        parts = {}
        for part in self.frozen_texts:
            parts[part.name] = Companion(config.frozen_bytes(part.folder, self.frozen_type), not self.embedded)
        if self.vae_config:
            parts["vae"] = Companion(config.frozen_bytes(self.vae_config, self.frozen_type), self.facts.content == "images")
        return {name: c for name, c in parts.items() if c.every_step or self.model.samples.draws}

    def rest(self) -> None:
        """Moves an encoder off the device if the datasets contain its outputs, because then only image generation needs the
        encoder."""
        assert self.facts
        idle = dict.fromkeys((part.name for part in self.frozen_texts), self.embedded) | {"vae": self.facts.content == "latents"}
        resting = [name for name, is_idle in idle.items() if is_idle and name in self._loaded]
        on_gpu = [name for name in resting if next(self._loaded[name].parameters()).is_cuda]
        for name in resting:
            self.frozen_on(name, torch.device("cpu"))
        if on_gpu:
            torch.cuda.empty_cache()  # leaves memory for allocations outside torch's allocator

    @property
    def encodes(self) -> bool:
        """Returns whether the autoencoder encodes the images in each step."""
        return self.vae_config is not None and self.facts is not None and self.facts.content == "images"

    @torch.no_grad()
    def clean(self, content: torch.Tensor, posterior: torch.Tensor | None) -> torch.Tensor:
        """Returns the tensor to which noise is added: pixels or their patches, or latents drawn from their distribution (stored,
        or computed from pixels)."""
        if self.vae_config is None:
            return patches.cut(content, self.model.patch)
        if self.encodes:
            encoder = self.frozen_on("vae", content.device)
            content = frozen_autoencoders.encode(encoder, content.to(self.frozen_type)).float()
        return frozen_autoencoders.scaled(self.vae_config, content, posterior)
