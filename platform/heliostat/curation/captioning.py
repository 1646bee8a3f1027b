"""Writes captions of images by a Hugging Face folder of a captioner: safetensors and JSON alone, no code of the folder's.

Decoding is greedy, and batches are always full, so that an image's caption does not depend on the images beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from heliostat.curation import image_scoring
from heliostat.curation.image_scoring import full, loaded, parts, pixels
from heliostat.curation.scoring import TOKENIZER
from heliostat.errors import ConfigError
from heliostat.tasks import files

KINDS = ("blip", "git", "vision-encoder-decoder")  # models that caption an image without being asked anything
GENERATION = "generation_config.json"
Captions = Callable[[list[bytes]], list[tuple[str, bool]]]


def describe(folder: str) -> dict[str, Any]:
    """Reads the folder's config.json; ConfigError if it is no captioner, or something that is needed is not there."""
    config = image_scoring.describe(folder)
    if config.get("model_type") not in KINDS:
        raise ConfigError(
            f"model: {folder!r} is of the kind {config.get('model_type')!r}; captions are written by {', '.join(KINDS)}"
        )
    if not (Path(folder) / TOKENIZER).is_file():
        raise ConfigError(f"model: {folder!r} has no {TOKENIZER}; save it by save_pretrained, with its fast tokenizer")
    return config


def digests(folder: str) -> dict[str, str]:
    """Returns the SHA-256 of all files that captions follow from."""
    more = [path for name in (TOKENIZER, GENERATION) if (path := Path(folder) / name).is_file()]
    return image_scoring.digests(folder) | {path.name: files.digest("model", str(path)) for path in more}


def load(folder: str, max_tokens: int, batch: int) -> Captions:
    """Loads a folder's model, on a GPU if there is one; ConfigError if it cannot be."""
    import transformers
    from tokenizers import Tokenizer

    describe(folder)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False)  # fmt: skip
        tokenizer = Tokenizer.from_file(str(Path(folder) / TOKENIZER))
        model = loaded(transformers.AutoModelForImageTextToText, folder)
    except Exception as e:  # of many kinds: what is wrong with a folder of others
        fault = str(e).partition("\n")[0]
        raise ConfigError(f"model: {folder!r} cannot be loaded as a captioner ({fault})") from e
    return Captioner(model, processor, tokenizer, max_tokens, batch)


def ends_of(model: Any) -> set[int]:
    """Lists the token ids that end a caption; BLIP generates up to its own, whatever its generation config says."""
    blip = model.config.model_type == "blip"
    ends = model.config.text_config.sep_token_id if blip else model.generation_config.eos_token_id
    return {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}


class Captioner:
    """Returns (its caption, whether that was cut at `max_tokens`) of each image."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, max_tokens: int, batch: int) -> None:
        self.model, self.processor, self.tokenizer, self.max_tokens, self.batch = model, processor, tokenizer, max_tokens, batch
        self.ends = ends_of(model)

    def __call__(self, images: list[bytes]) -> list[tuple[str, bool]]:
        return [one for part in parts(images, self.batch) for one in self._written(part)[: len(part)]]

    def _written(self, images: list[bytes]) -> list[tuple[str, bool]]:
        import torch

        with torch.inference_mode():
            values = pixels(self.model, self.processor, full(images, self.batch))
            made = self.model.generate(pixel_values=values, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
        return [self._text(row[1:]) for row in made.tolist()]  # the first token begins a text, and is often the one that ends it

    def _text(self, ids: list[int]) -> tuple[str, bool]:
        end = next((place for place, id in enumerate(ids) if id in self.ends), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return " ".join(text.split()), end is None and len(ids) >= self.max_tokens
