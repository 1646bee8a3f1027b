"""Loads an exported text-to-image model from the folder of a diffusers pipeline, which contains all parts of the model.

`exporting` writes these folders.
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

from heliostat.recipes.images.backbones.canvas_unet import CanvasUNet
from heliostat.recipes.images.pipeline import TextToImagePipeline
from heliostat.recipes.pretrained import from_folder, whole, whole_part
from heliostat.recipes.text import encoder

SETTINGS = ("masked", "patch", "predicts_image", "sample_size", "texts")  # of the pipeline, in model_index.json
REQUIREMENTS = ("mlflow", "torch", "transformers", "accelerate", "diffusers", "pillow")
SD3_TEXTS = [  # arguments of `pipeline.encode` with which StableDiffusion3Pipeline calls its text encoders
    {"layer": "penultimate", "padding": "seen"},
    {"layer": "penultimate", "padding": "seen"},
    {"padding": "seen"},
]


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
        own = CanvasUNet if kind == CanvasUNet.__name__ else None  # heliostat's class, never the copy in the folder
        cls: Any = own or getattr(transformers if library == "transformers" else diffusers, kind)
        if name == "scheduler":
            return cls.from_pretrained(folder / name)
        if name.startswith("tokenizer"):
            return from_folder("model", cls, folder / name)
        if library == "transformers":
            return whole("model", cls, folder / name, dtype=torch.float32, **encoder.without_pooler(cls))
        return whole_part(cls, folder / name, torch.float32)

    texts = [f"{name}{suffix}" for suffix in ("", "_2", "_3") for name in ("text_encoder", "tokenizer")]
    models = {name: part(name) for name in ("scheduler", *texts, "unet", "transformer", "vae")}
    settings = {name: index[name] for name in SETTINGS if name in index}
    if index["_class_name"] == "StableDiffusion3Pipeline":
        settings["texts"] = SD3_TEXTS
    pipeline: Any = TextToImagePipeline(**models, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
