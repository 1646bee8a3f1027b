"""Writes the folder of an exported text-to-image model: a pipeline of diffusers with all parts of the model except the trained
weights.

The folder is one of diffusers' own pipelines if this pipeline generates the same images. Otherwise, it's the
`TextToImagePipeline` of `pipeline.py`, and the folder contains a copy of that file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
from torch import nn
from transformers import CLIPTextModel

from heliostat.recipes.images import text_encoders
from heliostat.recipes.images.backbones import canvas_unet
from heliostat.recipes.images.backbones.canvas_unet import CanvasUNet
from heliostat.recipes.images.noising import Process
from heliostat.recipes.images.parts import Parts
from heliostat.recipes.images.pipeline import TextToImagePipeline

NOTHING = [None, None]  # a missing part of a pipeline
SD3_TOKENS = 256  # tokens of T5 in a call of StableDiffusion3Pipeline


def save(folder: Path, parts: Parts, model: nn.Module, process: Process, sampler: str) -> None:
    """Writes everything in the export except the trained weights. `model`: the trained models, on the meta device."""
    backbone, scheduler = parts.backbone(model), process.scheduler(sampler, clip=parts.vae_config is None)
    (folder / parts.name).mkdir(parents=True, exist_ok=True)
    backbone.save_config(folder / parts.name)
    scheduler.save_pretrained(folder / "scheduler")
    if parts.model.autoencoder:
        shutil.copytree(parts.model.autoencoder.pretrained, folder / "vae", dirs_exist_ok=True)
    index: dict[str, object] = {
        "_class_name": standard(parts, process) or ["pipeline", TextToImagePipeline.__name__],
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        parts.name: _backbone(folder / parts.name, backbone),
        **_text_encoders(folder, parts, model),
        "vae": ["diffusers", _autoencoder(parts)] if parts.vae_config else NOTHING,
        **_settings(parts, process, backbone),
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    shutil.copy(Path(__file__).with_name("pipeline.py"), folder / "pipeline.py")


def standard(parts: Parts, process: Process) -> str | None:
    """Returns the pipeline of diffusers that generates the same images as heliostat; None without such a pipeline."""
    if parts.vae_config is None or _autoencoder(parts) != "AutoencoderKL":
        return None
    samples = parts.model.samples
    if tuple(samples.guidance_interval) != (0.0, 1.0):
        return None
    layers = [(one.clip, one.layer, one.padding, one.text.pooling) for one in parts.frozen_texts]
    one_clip = not parts.frozen_texts or layers == [(True, "last", "seen", None)]
    shifted = parts.vae_config.get("shift_factor")  # StableDiffusionPipeline decodes without the shift
    if parts.arch == "unet" and not process.flow and one_clip and not shifted:
        return "StableDiffusionPipeline"
    clip = [(True, "penultimate", "seen", None)]
    fits = layers == [*clip, *clip, (False, "last", "seen", None)] and parts.frozen_texts[2].text.length == SD3_TOKENS
    projected = all(one.shape.pooled and "Projection" in str(one.config.architectures) for one in parts.frozen_texts[:2])
    same_steps = process.flow and not process.predicts_image and not process.objective.base_size and not samples.guidance_rescale
    return "StableDiffusion3Pipeline" if parts.arch == "sd3" and same_steps and fits and projected else None


def guidance(parts: Parts, process: Process) -> dict[str, object]:
    """Returns the guidance of the samples, as parameters that the exported pipeline has."""
    samples = parts.model.samples
    each = {"guidance": samples.guidance, "guidance_rescale": samples.guidance_rescale,
            "guidance_interval": list(samples.guidance_interval)}  # fmt: skip
    absent = {"StableDiffusionPipeline": {"guidance_interval"}}
    absent["StableDiffusion3Pipeline"] = {"guidance_interval", "guidance_rescale"}
    kind = standard(parts, process)
    return {name: value for name, value in each.items() if name not in absent.get(str(kind), ())}


def _backbone(folder: Path, backbone: Any) -> list[str]:
    """Returns the backbone's entry in the index. Copies the file of the backbone's class if diffusers doesn't have this class."""
    if not isinstance(backbone, CanvasUNet):
        return ["diffusers", type(backbone).__name__]
    shutil.copy(canvas_unet.__file__, folder / "canvas_unet.py")
    return ["canvas_unet", CanvasUNet.__name__]


def _autoencoder(parts: Parts) -> str:
    """Returns the name of the autoencoder's class."""
    assert parts.vae_config
    name: str = parts.vae_config.get("_class_name", "AutoencoderKL")
    return name


def _text_encoders(folder: Path, parts: Parts, model: Any) -> dict[str, object]:
    """Writes the text encoders and tokenizers, and returns their entries in the index."""
    index: dict[str, object] = {}
    if not parts.frozen_texts:
        model.text_encoder.config.architectures = [CLIPTextModel.__name__]
        model.text_encoder.config.save_pretrained(folder / "text_encoder")
        index["text_encoder"] = ["transformers", CLIPTextModel.__name__]
    for part in parts.frozen_texts:
        shutil.copytree(part.folder, folder / part.name, dirs_exist_ok=True)
        kind = text_encoders.kind(f"{part.key}.pretrained", part.config)
        single = part.clip and len(parts.frozen_texts) == 1
        index[part.name] = ["transformers", CLIPTextModel.__name__ if single else kind.__name__]
    for number, tokenizer in enumerate(parts.tokenizers, start=1):
        name = f"tokenizer_{number}" if number > 1 else "tokenizer"
        tokenizer.save_pretrained(folder / name)
        index[name] = ["transformers", type(tokenizer).__name__]
    return index


def _settings(parts: Parts, process: Process, backbone: Any) -> dict[str, object]:
    """Returns the entries of the index that only one kind of pipeline has."""
    if standard(parts, process) == "StableDiffusionPipeline":
        nothing: dict[str, object] = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), NOTHING)
        return {**nothing, "requires_safety_checker": False}
    if standard(parts, process) == "StableDiffusion3Pipeline":
        return dict.fromkeys(("image_encoder", "feature_extractor"), NOTHING)
    absent = [part for part in ("unet", "transformer") if part != parts.name]
    absent += [f"{name}_{n}" for n in (2, 3) if n > len(parts.tokenizers) for name in ("text_encoder", "tokenizer")]
    out: dict[str, object] = dict.fromkeys(absent, NOTHING)
    if parts.frozen_texts:
        out |= {"texts": [part.settings for part in parts.frozen_texts], "masked": any(p.masked for p in parts.frozen_texts)}
    if process.predicts_image:
        out["predicts_image"] = True
    if parts.model.patch > 1:
        out["patch"] = parts.model.patch
    return out if "sample_size" in backbone.config else {**out, "sample_size": max(parts.shape()[1:])}


def text_folders(folder: Path, text: Any) -> Any:
    """Returns the job's key `model.text` with the folders of an export. The export's backbone has the projection that `whiten`
    initialized."""
    if isinstance(text, list):
        names = ["text_encoder", *(f"text_encoder_{number}" for number in range(2, len(text) + 1))]
        return [{**one, "pretrained": str(folder / name)} for one, name in zip(text, names, strict=True)]
    kept = {key: value for key, value in text.items() if key != "whiten"}
    return {**kept, "pretrained": str(folder / "text_encoder")} if text.get("pretrained") else kept
