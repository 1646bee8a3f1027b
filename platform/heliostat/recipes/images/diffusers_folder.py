"""Loads an exported text-to-image model from the folder of a diffusers pipeline, which contains all parts of the model.

A diffusion model with a U-Net, an AutoencoderKL, and a CLIP text encoder is a StableDiffusionPipeline. Any other model is the
TextToImagePipeline of `pipeline.py`, and its folder contains a copy of that file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from heliostat.recipes.images.pipeline import TextToImagePipeline

REQUIREMENTS = ("mlflow", "torch", "transformers", "accelerate", "diffusers", "pillow")


def tokenizer(definition: bytes, end: int, length: int) -> PreTrainedTokenizerFast:
    """Converts a dataset's tokenizer for a text encoder. The result appends an end token to the caption, and pads with end tokens
    up to `length` tokens."""
    raw = Tokenizer.from_str(definition.decode())
    token = raw.id_to_token(end)
    raw.post_processor = TemplateProcessing(single=f"$A {token}", special_tokens=[(token, end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=token, eos_token=token, pad_token=token, unk_token=token, model_max_length=length
    )


def load(folder: Path) -> Any:
    """Loads the exported pipeline in fp32. Uses the GPU if there is one."""
    index = json.loads((folder / "model_index.json").read_text())

    def part(name: str) -> Any:
        library, kind = index.get(name) or (None, None)
        if kind is None:
            return None
        cls = getattr(diffusers if library == "diffusers" else transformers, kind)
        options: dict[str, Any] = {} if library == "diffusers" else {"trust_remote_code": False}
        if name not in ("tokenizer", "scheduler"):
            options["torch_dtype" if library == "diffusers" else "dtype"] = torch.float32
        return cls.from_pretrained(folder / name, **options)

    names = ("scheduler", "text_encoder", "tokenizer", "unet", "transformer", "vae")
    settings = {name: index[name] for name in ("pooling", "predicts_image") if name in index}
    pipeline: Any = TextToImagePipeline(**{name: part(name) for name in names}, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
