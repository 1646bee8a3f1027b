"""Writes and loads an exported text-to-image model: the folder of a diffusers pipeline, with every part that it needs.

With a U-Net in the latents of an AutoencoderKL, conditioned by CLIP, it is a StableDiffusionPipeline; anything else is the
TextToImagePipeline of `pipeline.py`, which lies in the folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from heliostat.recipes.images.pipeline import TextToImagePipeline
from heliostat.recipes.protocol import Serving

if TYPE_CHECKING:
    from heliostat.recipes.images.text_to_image import TextToImage

REQUIREMENTS = ("mlflow", "torch", "transformers", "accelerate", "diffusers", "pillow")


def tokenizer(definition: bytes, end: int, length: int) -> PreTrainedTokenizerFast:
    """Adapts a dataset's tokenizer to a text encoder: the caption, an end token, and end tokens as padding up to the length."""
    raw = Tokenizer.from_str(definition.decode())
    token = raw.id_to_token(end)
    raw.post_processor = TemplateProcessing(single=f"$A {token}", special_tokens=[(token, end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=token, eos_token=token, pad_token=token, unk_token=token, model_max_length=length
    )


def save(recipe: TextToImage, folder: Path) -> None:
    """Writes all of the export but the trained weights."""
    with torch.device("meta"):
        model: Any = recipe.build()
    backbone = getattr(model, recipe.parts.name)
    (folder / recipe.parts.name).mkdir(parents=True, exist_ok=True)
    backbone.save_config(folder / recipe.parts.name)
    text = recipe.model.text
    if text.pretrained:
        shutil.copytree(text.pretrained, folder / "text_encoder", dirs_exist_ok=True)
        kind = type(recipe.parts.text_encoder).__name__
    else:
        kind = CLIPTextModel.__name__
        model.text_encoder.config.architectures = [kind]
        model.text_encoder.config.save_pretrained(folder / "text_encoder")
    recipe.parts.tokenizer.save_pretrained(folder / "tokenizer")
    if recipe.model.autoencoder:
        shutil.copytree(recipe.model.autoencoder.pretrained, folder / "vae", dirs_exist_ok=True)
    scheduler = recipe.process.scheduler(recipe.sampler, clip=recipe.parts.vae_config is None)
    scheduler.save_pretrained(folder / "scheduler")
    standard = (
        recipe.parts.arch == "unet" and bool(recipe.parts.vae_config) and kind == "CLIPTextModel" and not recipe.process.flow
    )
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline" if standard else ["pipeline", TextToImagePipeline.__name__],
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        recipe.parts.name: ["diffusers", type(backbone).__name__],
        "text_encoder": ["transformers", kind],
        "tokenizer": ["transformers", type(recipe.parts.tokenizer).__name__],
        "vae": ["diffusers", "AutoencoderKL"] if recipe.parts.vae_config else [None, None],
    }
    if standard:
        nothing: dict[str, Any] = {key: [None, None] for key in ("safety_checker", "feature_extractor", "image_encoder")}
        index |= {**nothing, "requires_safety_checker": False}
    else:
        index |= {part: [None, None] for part in ("unet", "transformer") if part != recipe.parts.name}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def load(folder: Path) -> Any:
    """Loads the exported pipeline in fp32, onto the GPU if there is one."""
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
    pipeline: Any = TextToImagePipeline(**{name: part(name) for name in names})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def serving(recipe: TextToImage) -> Serving:
    from mlflow.models import infer_signature

    samples = recipe.model.samples
    params = {"steps": samples.steps, "guidance": samples.guidance, "seed": 0}
    prompts = [*(p.text for p in samples.prompts), "an image"][:1]
    signature = infer_signature(prompts, ["base64"], params)
    return Serving(Path(__file__).with_name("server.py"), prompts, signature, REQUIREMENTS)
