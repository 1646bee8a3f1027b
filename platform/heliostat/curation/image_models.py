"""Scores images by a Hugging Face folder of an image classifier or a CLIP: safetensors and JSON alone, no code of the folder's.

An image's score does not depend on the images beside it: batches are always full, so that each goes through the same kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heliostat.curation.picturing import upright
from heliostat.curation.scoring import CONFIG, TOKENIZER, labels, weights
from heliostat.errors import ConfigError
from heliostat.tasks import files

PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # either, by the version that saved the folder
Score = Callable[[list[bytes], list[str]], list[float]]


def describe(folder: str) -> dict[str, Any]:
    """Reads the folder's config.json; ConfigError if something that is needed is not there."""
    told, processors = dict[str, Any](), _processors(folder)
    if not processors:
        raise ConfigError(f"model: {folder!r} has no {PROCESSORS[0]}; save it by save_pretrained, with its image processor")
    for name in (CONFIG, *processors):
        try:
            told[name] = json.loads(files.read("model", str(Path(folder) / name)))
        except ValueError as e:
            raise ConfigError(
                f"model: {folder!r}: {name} is not JSON ({e}); name a folder that save_pretrained has written"
            ) from e
        if "auto_map" in told[name]:
            raise ConfigError(
                f"model: {folder!r} needs code that it brings ({name}: auto_map), which is not run; take another model"
            )
    config = told[CONFIG]
    if not weights(folder):
        raise ConfigError(f"model: {folder!r} has no safetensors; save it by save_pretrained")
    if is_clip(config) and not (Path(folder) / TOKENIZER).is_file():
        raise ConfigError(f"model: {folder!r} has no {TOKENIZER}; save it by save_pretrained, with its fast tokenizer")
    return config


def _processors(folder: str) -> list[str]:
    return [name for name in PROCESSORS if (Path(folder) / name).is_file()]


def is_clip(config: dict[str, Any]) -> bool:
    return config.get("model_type") == "clip" and "text_config" in config


def digests(folder: str) -> dict[str, str]:
    """Returns the SHA-256 of all files that scores follow from."""
    tokenizer = [TOKENIZER] if is_clip(describe(folder)) else []
    paths = [*weights(folder), *(Path(folder) / name for name in (CONFIG, *_processors(folder), *tokenizer))]
    return {path.name: files.digest("model", str(path)) for path in paths}


def load(folder: str, label: str | None, batch: int) -> Score:
    """Loads a folder's model, on a GPU if there is one; ConfigError if it is no image classifier, and no CLIP."""
    import transformers

    config = describe(folder)
    cls: Any = transformers.CLIPModel if is_clip(config) else transformers.AutoModelForImageClassification
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False)  # fmt: skip
        model = loaded(cls, folder)
    except Exception as e:  # of many kinds: what is wrong with a folder of others
        fault = str(e).partition("\n")[0]
        raise ConfigError(f"model: {folder!r} cannot be loaded as an image classifier or CLIP ({fault})") from e
    if is_clip(config):
        return Captions(model, processor, folder, batch)
    assert label is not None
    return Labels(model, processor, labels(config).index(label), batch)


def loaded(cls: Any, folder: str) -> Any:
    """Loads a model of a class from a folder's safetensors, on a GPU if there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = cls.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, dtype=torch.float32)  # fmt: skip
    return model.eval().to(device)


class Labels:
    """Scores images by a label of a classifier."""

    def __init__(self, model: Any, processor: Any, place: int, batch: int) -> None:
        self.model, self.processor, self.place, self.batch = model, processor, place, batch

    def __call__(self, images: list[bytes], captions: list[str]) -> list[float]:
        return [score for part in parts(images, self.batch) for score in self._scores(part)[: len(part)]]

    def _scores(self, images: list[bytes]) -> list[float]:
        import torch

        with torch.inference_mode():
            logits = self.model(pixel_values=pixels(self.model, self.processor, full(images, self.batch))).logits.float()
        if self.model.config.num_labels > 1:  # of one output: a grade
            independent = self.model.config.problem_type == "multi_label_classification"
            logits = logits.sigmoid() if independent else logits.softmax(-1)
        return [round(value, 5) for value in logits[:, self.place].tolist()]


class Captions:
    """Scores how well captions fit their images, by a CLIP."""

    def __init__(self, model: Any, processor: Any, folder: str, batch: int) -> None:
        from tokenizers import Tokenizer

        self.model, self.processor, self.batch = model, processor, batch
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / TOKENIZER))
        length = model.config.text_config.max_position_embeddings
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(length=length, pad_id=model.config.text_config.pad_token_id or 0)

    def __call__(self, images: list[bytes], captions: list[str]) -> list[float]:
        pairs = zip(parts(images, self.batch), parts(captions, self.batch), strict=True)
        return [score for some, texts in pairs for score in self._scores(some, texts)[: len(some)]]

    def _scores(self, images: list[bytes], captions: list[str]) -> list[float]:
        import torch

        encoded = self.tokenizer.encode_batch(full(captions, self.batch))
        device = self.model.device
        ids = torch.tensor([e.ids for e in encoded], device=device)
        mask = torch.tensor([e.attention_mask for e in encoded], device=device)
        with torch.inference_mode():
            values = pixels(self.model, self.processor, full(images, self.batch))
            found = self.model(input_ids=ids, attention_mask=mask, pixel_values=values)
        fit = torch.nn.functional.cosine_similarity(found.image_embeds.float(), found.text_embeds.float())
        return [round(value, 5) for value in fit.tolist()]


def parts(items: list[Any], size: int) -> list[list[Any]]:
    """Cuts a list into batches."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def full(items: list[Any], size: int) -> list[Any]:
    """Fills a batch up with its first item."""
    return items + [items[0]] * (size - len(items))


def pixels(model: Any, processor: Any, images: list[bytes]) -> Any:
    """Decodes images to what the model takes."""
    made = processor(images=[upright(image).convert("RGB") for image in images], return_tensors="pt")
    return made["pixel_values"].to(model.device)
