"""Runs images through the model in a Hugging Face folder. This module reads only safetensors and JSON, and runs no code from the
folder.

The result for an image, a score or a caption, doesn't depend on the other images in its batch: batches are always full, so the
same kernels compute every image. Captions are decoded greedily.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from heliostat.curation.picturing import upright
from heliostat.curation.scoring import (
    CONFIG,
    TOKENIZER,
    Config,
    label_scores,
    labels,
    read_json,
    require_files,
    require_folder,
    weights,
)
from heliostat.errors import ConfigError
from heliostat.tasks import files

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

Value = TypeVar("Value")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the version of transformers decides which one exists
CAPTIONERS = ("blip", "git", "vision-encoder-decoder")  # models that caption an image without a prompt
GENERATION = "generation_config.json"


def describe(folder: str) -> Config:
    """Returns the folder's config.json as a dictionary. Raises ConfigError if a required file is missing."""
    require_folder(folder)
    processors = _processors(folder)
    if not processors:
        raise ConfigError(
            f"model: {folder!r} has no {PROCESSORS[0]}. Save the image processor to this folder with save_pretrained"
        )
    config, *_ = [read_json(folder, name) for name in (CONFIG, *processors)]
    require_files(folder, tokenizer=is_clip(config) or config.get("model_type") in CAPTIONERS)
    return config


def require_captioner(folder: str) -> None:
    """Raises ConfigError if the folder isn't a captioner, or a required file is missing."""
    if (kind := describe(folder).get("model_type")) not in CAPTIONERS:
        raise ConfigError(f"model: {folder!r} is a {kind!r}. To caption images, use one of {', '.join(CAPTIONERS)}")


def _processors(folder: str) -> list[str]:
    return [name for name in PROCESSORS if (Path(folder) / name).is_file()]


def is_clip(config: Config) -> bool:
    return config.get("model_type") == "clip" and "text_config" in config


def digests(folder: str) -> dict[str, str]:
    config = describe(folder)
    writes = config.get("model_type") in CAPTIONERS
    others = [TOKENIZER] * (writes or is_clip(config)) + [GENERATION] * (writes and (Path(folder) / GENERATION).is_file())
    paths = [*weights(folder), *(Path(folder) / name for name in (CONFIG, *_processors(folder), *others))]
    return {path.name: files.digest("model", str(path)) for path in paths}


class ImageModel(ABC, Generic[Value]):
    """Runs images through the model in a folder, with captions if the model needs them. Uses a GPU if the machine has one."""

    what = "an image classifier or CLIP"

    def __init__(self, folder: str, cls: Any, batch: int) -> None:
        """Loads the folder with a class of transformers; ConfigError if the folder has no model of this class."""
        import torch
        import transformers

        self.folder, self.batch = folder, batch
        try:
            self.processor = transformers.AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False)  # fmt: skip
            model = cls.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, dtype=torch.float32)  # fmt: skip
        except Exception as e:  # errors of many kinds, for faulty folders
            fault = str(e).partition("\n")[0]
            raise ConfigError(
                f"model: can't load {folder!r} as {self.what} ({fault}). Use a folder that save_pretrained has written"
            ) from e
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(Path(self.folder) / TOKENIZER))
        except Exception as e:  # the library raises nothing narrower
            raise ConfigError(
                f"model: can't load {self.folder!r} as {self.what} ({TOKENIZER}: {e}). "
                "Use a folder that save_pretrained has written"
            ) from e

    def __call__(self, images: list[bytes], captions: list[str] | None = None) -> list[Value]:
        """Returns the model's result for each image."""
        import torch

        values = list[Value]()
        for first in range(0, len(images), self.batch):
            part = images[first : first + self.batch]
            texts = (captions or [""] * len(images))[first : first + self.batch]
            missing = self.batch - len(part)
            opened = [upright(image).convert("RGB") for image in part + part[:1] * missing]
            with torch.inference_mode():
                pixels = self.processor(images=opened, return_tensors="pt")["pixel_values"].to(self.model.device)
                values += self.values(pixels, texts + texts[:1] * missing)[: len(part)]
        return values

    @abstractmethod
    def values(self, pixels: Tensor, captions: list[str]) -> list[Value]:
        """Computes a value for each image of a batch, from its decoded pixels and its caption."""


class ImageLabels(ImageModel[float]):
    def __init__(self, folder: str, label: str, batch: int) -> None:
        from transformers import AutoModelForImageClassification

        super().__init__(folder, AutoModelForImageClassification, batch)
        self.place = labels(describe(folder)).index(label)

    def values(self, pixels: Tensor, captions: list[str]) -> list[float]:
        return label_scores(self.model(pixel_values=pixels).logits, self.place, self.model.config)


class CaptionFit(ImageModel[float]):
    """Computes the cosine similarity of each image and its caption, with a CLIP model."""

    def __init__(self, folder: str, batch: int) -> None:
        from transformers import CLIPModel

        super().__init__(folder, CLIPModel, batch)
        self.encoder, text = self.tokenizer(), self.model.config.text_config
        self.encoder.enable_truncation(text.max_position_embeddings)
        self.encoder.enable_padding(length=text.max_position_embeddings, pad_id=text.pad_token_id or 0)

    def values(self, pixels: Tensor, captions: list[str]) -> list[float]:
        import torch

        encoded = self.encoder.encode_batch(captions)
        ids = torch.tensor([e.ids for e in encoded], device=pixels.device)
        mask = torch.tensor([e.attention_mask for e in encoded], device=pixels.device)
        both = self.model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        fit = torch.nn.functional.cosine_similarity(both.image_embeds.float(), both.text_embeds.float())
        return [round(value, 5) for value in fit.tolist()]


class Captioner(ImageModel[tuple[str, bool]]):
    """Captions images. A call returns for each image: (caption, whether the caption was truncated at `max_tokens`)."""

    what = "a captioner"

    def __init__(self, folder: str, max_tokens: int, batch: int) -> None:
        from transformers import AutoModelForImageTextToText

        require_captioner(folder)
        super().__init__(folder, AutoModelForImageTextToText, batch)
        self.decoder, self.max_tokens = self.tokenizer(), max_tokens
        blip = self.model.config.model_type == "blip"  # BLIP ends a text with its separator token
        end = self.model.config.text_config.sep_token_id if blip else self.model.generation_config.eos_token_id
        self.ends = set(end if isinstance(end, list) else [end])

    def values(self, pixels: Tensor, captions: list[str]) -> list[tuple[str, bool]]:
        ids = self.model.generate(pixel_values=pixels, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
        return [self._text(row[1:]) for row in ids.tolist()]  # the first token begins a text, and is often also the end token

    def _text(self, ids: list[int]) -> tuple[str, bool]:
        end = next((place for place, id in enumerate(ids) if id in self.ends), None)
        text = self.decoder.decode(ids[:end], skip_special_tokens=True)
        return " ".join(text.split()), end is None and len(ids) >= self.max_tokens
