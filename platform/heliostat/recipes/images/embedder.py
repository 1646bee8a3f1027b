"""Trains an embedder of images and captions contrastively, like CLIP (Radford et al. 2021, arXiv 2103.00020).

    recipe: heliostat.recipes:ImageEmbedder
    model: {arch: clip, projection_dim: 64, text_config: {...}, vision_config: {...}, temperature: 0.07}
    model: {pretrained: /models/clip-vit-base-patch32, ...}    # weights, tokenizer and image processor of a folder

A sample is a square image with a caption (`heliostat.pipelines:ImagePipeline`). The caption is the query for its image.
`heliostat.recipes.pairs` describes the loss and the scores. Scores with the prefix `caption_` are for the opposite direction, in
which images retrieve their captions.

The temperature is a constant of the job. The export stores the temperature as CLIP's `logit_scale`.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from pydantic import Field
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from heliostat.config.fields import Count
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes import building, contrastive, exported, tokenizing
from heliostat.recipes.images import rows
from heliostat.recipes.images.decoding import decoded
from heliostat.recipes.pairs import SCORES, EmbedsPairs, PairKeys, named, present
from heliostat.recipes.pretrained import from_config, from_folder
from heliostat.recipes.protocol import Batch
from heliostat.recipes.text import encoder, masks, model_config
from heliostat.recipes.text.model_config import ModelKind
from heliostat.schema import Float, nearest
from heliostat.text import brief

BUILT_IN = {"ImageEmbedder": ("transformers",)}
CLIP = ModelKind("model of images and texts", ("clip",), "clip")
PARTS: dict[str, type[PreTrainedConfig]] = {"text_config": CLIPTextConfig, "vision_config": CLIPVisionConfig}
OLD_END = 2  # with this end token, CLIP's class assumes an early folder, whose end token is recorded wrongly
BACK = "caption_"  # prefix of the scores for captions that images retrieve


class Clip(CLIPModel):
    """Keeps the temperature in a buffer, because it isn't trained, and DeepSpeed doesn't support scalar parameters."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        del self.logit_scale
        self.register_buffer("logit_scale", torch.tensor(float(config.logit_scale_init_value or 0.0)))

    @classmethod
    def is_custom_code(cls) -> bool:
        """Returns False, so that transformers initializes the weights in the same way as for CLIPModel. For an unknown class,
        transformers skips some modules."""
        return False


class ImageEmbedderKeys(PairKeys):
    """Defines the keys of `model` that don't belong to the architecture."""

    temperature: Float = Field(0.07, gt=0)
    """Temperature: divides the cosine similarities in the loss."""
    max_tokens: Count | None = None
    """Maximum tokens of a caption; longer captions are truncated. Unset: the model's maximum."""


OWN = tuple(ImageEmbedderKeys.model_fields)


class ImageEmbedder(EmbedsPairs):
    sides = ("caption", "image")  # columns of a row
    gathered = (*sides, "names")
    scores = ("loss", *SCORES, *(BACK + name for name in SCORES))
    own = ImageEmbedderKeys
    keys: ImageEmbedderKeys

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Makes the model's configuration. Raises ConfigError for invalid keys."""
        keys = {k: v for k, v in self.job.model.items() if k not in OWN}
        if self.pretrained:
            if extra := sorted(keys.keys() - {"pretrained"}):
                raise ConfigError(
                    f"model.{extra[0]}: a pretrained model takes its configuration from its folder. Remove this key"
                )
            return model_config.read(keys, CLIP)
        _check_parts(keys)
        return model_config.from_keys(keys, CLIP)

    @property
    def max_tokens(self) -> int:
        return self.keys.max_tokens or self.config.text_config.max_position_embeddings

    def probe(self) -> None:
        longest = self.config.text_config.max_position_embeddings
        if not 1 < self.max_tokens <= longest:
            raise ConfigError(
                f"model.max_tokens: {self.max_tokens} isn't between 2 and the model's maximum {longest}. Correct this key"
            )
        if self.pretrained:
            assert self.processor

    def bind(self, sources: list[Manifest]) -> None:
        self.sources = sources
        facts = rows.facts(sources, True)
        if facts.content != "images":
            raise ConfigError(
                "data.sources: an embedder needs images, but these datasets contain latents. "
                "Prepare the datasets without `latents`"
            )
        sizes = {(m.meta["size"][0], m.meta["size"][1]) for m in sources}
        if len(sizes) > 1 or facts.size[0] != facts.size[1]:
            shown = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
            raise ConfigError(f"data.sources: CLIP needs square images of one size, but the images have {shown} pixels. "
                "Prepare the datasets without `buckets`")  # fmt: skip
        self._fit(facts.channels, facts.size[0])
        if not self.pretrained:
            vocabulary = self.job.model.get("text_config", {}).get("vocab_size")
            tokenizing.fit_vocabulary(self.config.text_config, "model.text_config.vocab_size", vocabulary, self.tokenizer)
            if self.config.text_config.eos_token_id == OLD_END:
                raise ConfigError(f"data.sources: the tokenizer ends texts with token {OLD_END}, which CLIP doesn't recognize as "
                    "the end. Prepare the datasets with another tokenizer")  # fmt: skip
        with torch.device("meta"):
            self.build()  # fails if the keys don't fit together

    def _fit(self, channels: int, side: int) -> None:
        """Sets the number of channels and the image size in the configuration from the datasets. Raises ConfigError if the job's
        keys don't fit the images."""
        vision, keys = self.config.vision_config, self.job.model.get("vision_config", {})
        for key, value, what in (("num_channels", channels, "channels"), ("image_size", side, "pixels per side")):
            if self.pretrained and getattr(vision, key) != value:
                raise ConfigError(f"model.pretrained: expected images with {getattr(vision, key)} {what}, got {value}. "
                    "Set `resolution` and `channels` in the pipeline, and prepare the datasets again")  # fmt: skip
            if keys.get(key, value) != value:
                raise ConfigError(
                    f"model.vision_config.{key}: {keys[key]} given, but the images have {value} {what}. Remove this key"
                )
            setattr(vision, key, value)
        patch = vision.patch_size
        if not isinstance(patch, int) or not 0 < patch <= side or side % patch:
            raise ConfigError(
                f"model.vision_config.patch_size: {patch} doesn't divide the image side of {side} pixels. Use a divisor of {side}"
            )

    @cached_property
    def processor(self) -> CLIPImageProcessorPil:
        """Loads the pretrained model's image processor, or makes a processor for the datasets' image size."""
        if self.pretrained:
            return processor_of_folder(self.pretrained)
        vision = self.config.vision_config
        return processor_of_size(vision.image_size, vision.num_channels)

    def whole(self, folder: str) -> PreTrainedModel:
        return encoder.load("model.pretrained", folder, Clip, config=self.config, dtype=torch.float32)

    def first(self) -> PreTrainedModel:
        try:
            return from_config(Clip, self.config)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as e:
            raise ConfigError(f"model: {brief(e)}") from e

    def build(self) -> PreTrainedModel:
        model = super().build()
        scale = torch.tensor(-math.log(self.temperature), dtype=torch.float32, device=model.get_buffer("logit_scale").device)
        building.put_buffer(model, "logit_scale", scale)  # if ZeRO-3 partitions the model, the buffer has the run's precision
        return model

    def exact(self, model: torch.nn.Module) -> list[str]:
        return ["logit_scale"]

    # training --------------------------------------------------------------------------------------------------------

    def batch(self, content: pa.Table, keys: np.ndarray) -> Batch:
        captions, images = (present(content, side) for side in self.sides)
        tokens = tokenizing.tokens(self.tokenizer, captions, self.max_tokens)
        pixels = normalised(self.processor, decoded(images))
        names, cut = named([captions, images]), torch.from_numpy(tokens.cut).long()
        return {"input_ids": tokens.ids, "attention_mask": tokens.mask, "pixel_values": pixels, "names": names, "cut": cut}

    def represent(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        with masks.unread(whole=True):
            out = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")})
        sides = {"caption": out.text_embeds, "image": out.image_embeds}
        embedded = {side: F.normalize(vectors.float(), dim=-1) for side, vectors in sides.items()}
        return {**embedded, "names": batch["names"], "cut": batch["cut"]}

    def measure(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        back = contrastive.recall(contrastive.ranks(arrays["image"], arrays["caption"], arrays["names"][:, ::-1]))
        return {**super().measure(arrays), **{BACK + name: value for name, value in back.items()}}

    # for people, and the export --------------------------------------------------------------------------------------

    def describe(self, content: pa.Table) -> str:
        row = content.select(["id", "caption"]).to_pylist()[0]
        return f"{row['caption']} ({row['id']})"

    def save_config(self, folder: Path) -> None:
        kind = encoder.model_class(self.config).__name__
        config = model_config.exported_config(self.config, kind, self.job.train.precision)
        config.logit_scale_init_value = -math.log(self.temperature)
        config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def _check_parts(keys: dict[str, object]) -> None:
    """Raises ConfigError for an unknown key in `text_config` or `vision_config`."""
    for name, kind in PARTS.items():
        if not isinstance(part := keys.get(name, {}), dict):
            raise ConfigError(f"model.{name}: expected a mapping with keys of {kind.__name__}, got {brief(part)}")
        known = {*kind.__dataclass_fields__, *kind.attribute_map}
        for key in part:
            if key not in known:
                raise ConfigError(f"model.{name}.{key}: unknown key of {kind.__name__}{nearest(key, sorted(known))}")


def processor_of_size(side: int, channels: int) -> CLIPImageProcessorPil:
    """Makes an image processor for square images, which maps pixels to [-1, 1]."""
    return CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False, do_convert_rgb=channels == 3,
                                 image_mean=[0.5] * channels, image_std=[0.5] * channels)  # fmt: skip


def processor_of_folder(folder: str) -> CLIPImageProcessorPil:
    """Loads the image processor of a pretrained model. Raises ConfigError unless the processor scales pixels from [0, 255] to [0,
    1], and normalizes by mean and standard deviation."""
    with exported.using(Path(folder)):
        processor = from_folder("model.pretrained", AutoImageProcessor, folder, backend="pil")
    if not (processor.do_rescale and processor.do_normalize and abs(processor.rescale_factor * 255 - 1) < 1e-6):
        raise ConfigError(
            f"model.pretrained: the image processor of {folder!r} doesn't normalize pixels of 0 to 255 by mean "
            "and deviation. Use another model"
        )
    return processor


def normalised(processor: CLIPImageProcessorPil, images: np.ndarray) -> torch.Tensor:
    """Converts uint8 [n, height, width, channels] to the model's input, fp32 [n, channels, height, width]."""
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / deviation
