"""Defines small jobs of every recipe, and of each way to save memory, for tests of the simulated device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heliostat.config.spec import Job
from transformers import T5Config, T5EncoderModel

from tests.golden import data
from tests.unit import build_aids, build_images, build_pairs
from tests.unit.build_job import BASE, job
from tests.unit.build_text_encoders import texts
from tests.unit.build_text_to_image import BACKBONES, autoencoder, clip

EXPERTS = {**BASE["model"], "arch": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "router_z_loss_coef": 1e-3}
FLOW = {"backbone": build_images.SD3, "objective": {"prediction": "flow", "timesteps": "logit_normal"}}
TERMS = {
    "objective": {"prediction": "x", "timesteps": "logit_normal"}, "contrastive": {}, "immiscible": {"candidates": 2},
    "captions": [{"text": "{caption}"}, {"text": "a {label}"}],
}  # fmt: skip
PROMPTS = {"prompts": [{"text": "a digit"}], "per_prompt": 1, "steps": 2, "judge": False}


def prepare(folder: Path) -> None:
    """Makes the datasets of all cases."""
    data.build(folder)
    build_pairs.dataset(folder / "pairs")
    build_aids.featured(folder / "featured")
    autoencoder(folder / "vae", 1)
    clip(folder / "t5", folder / "text_to_image")  # for its tokenizer
    torch.manual_seed(5)
    T5EncoderModel(T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(
        folder / "t5"
    )


def _frozen(folder: Path, **changes: Any) -> Job:
    text = {"pretrained": str(folder / "t5"), "length": 8}
    return _images(folder, {"text": text, "autoencoder": {"pretrained": str(folder / "vae")}}, **changes)


def _autoencoder(folder: Path, **changes: Any) -> Job:
    model = {
        "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "latent_channels": 4, "norm_num_groups": 4,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }  # fmt: skip
    images = build_images.job(folder / "text_to_image")
    return job(**{**images, "recipe": "heliostat.recipes:Autoencoder", "model": model, **changes})


def _text(folder: Path, **changes: Any) -> Job:
    return job(**{"data.sources": [{"path": str(folder / "causal_lm")}], **changes})


def _images(folder: Path, model: dict[str, Any], **changes: Any) -> Job:
    return job(**{**build_images.job(folder / "text_to_image", caption_dropout=0.2, samples=PROMPTS, **model), **changes})


Case = Callable[..., Job]
CASES: dict[str, Case] = {
    "language model": _text,
    "separate documents": lambda folder, **c: _text(folder, **{"data.document_mask": True, **c}),
    "experts": lambda folder, **c: _text(folder, **{"model": EXPERTS, **c}),
    "tiled loss": lambda folder, **c: _text(folder, **{"train.tiled_loss": True, **c}),
    "activation offload": lambda folder, **c: _text(
        folder, **{"train.activation_checkpointing": True, "train.activation_offload": True, **c}
    ),
    "text embedder": lambda folder, **c: build_pairs.embedder(folder / "pairs", **c),
    "image embedder": lambda folder, **c: build_images.embedder(folder / "text_to_image", **c),
    "diffusion": lambda folder, **c: _images(folder, {"objective": {"prediction": "v", "min_snr": 5.0}}, **c),
    "diffusion version 1": lambda folder, **c: _images(
        folder, {"objective": {"prediction": "v", "min_snr": 5.0}}, **{"train.recipe_version": 1, **c}
    ),
    "frozen encoders": _frozen,
    "frozen encoders in bf16": lambda folder, **c: _frozen(folder, **{**c, "train.precision": "bf16", "train.zero.stage": 1}),
    "autoencoder": _autoencoder,
    "flow matching": lambda folder, **c: _images(folder, FLOW, **c),
    "image terms": lambda folder, **c: _images(folder, TERMS, **c),
}


MASKED = ("unet", "pixart", "lumina", "sana", "prx")  # backbones that mask padding
JOINED = {"sd3": ["clip", "clip", "t5"], "flux": ["clip", "t5"]}


def _backbone(arch: str, folder: Path, **changes: Any) -> Job:
    """Returns a job with frozen text encoders and captions of different lengths."""
    text: Any = {"pretrained": str(folder / "t5"), "length": 12, **({"padding": "masked"} if arch in MASKED else {})}
    if arch in JOINED:
        text = texts(JOINED[arch], folder / f"{arch} encoders", folder / "text_to_image", widths=[16, 16, 40])
    flow = {"objective": {"prediction": "flow"}} if arch not in ("unet", "pixart") else {}
    return _images(folder, {"backbone": BACKBONES[arch], "text": text, **flow}, **changes)


def _aided(folder: Path, aid: dict[str, Any], **changes: Any) -> Job:
    images = build_images.job(folder / "featured" / "data", backbone=build_aids.DEEP["pixart"], samples=PROMPTS, **aid)
    return job(**{**images, **changes})


IMAGES: dict[str, Case] = {
    **{f"backbone {arch}": functools.partial(_backbone, arch) for arch in BACKBONES},
    "near noise in groups": lambda folder, **c: _images(folder, {"immiscible": {"group": 2}}, **c),
    "token routing": lambda folder, **c: _aided(folder, {"tread": {"from": 2, "to": 3}}, **c),
    "alignment": lambda folder, **c: _aided(folder, {"repa": {"layer": 2}}, **c),
}
EVERY = CASES | IMAGES


def made(case: str, folder: Path, **changes: Any) -> Job:
    """Returns the job of a case: fp32, ZeRO-0, and a few steps of 8 samples in micro-batches of 2."""
    usual = {
        "name": case.replace(" ", "-"), "storage": str(folder), "train.precision": "fp32", "train.steps": 4,
        "data.virtual_ranks": 4, "train.global_batch_size": 8, "train.micro_batch_size": 2,
        "data.shuffle_window": 64, "train.zero.stage": 0,
        "evaluate": {"every": 2, "samples": 4, "fraction": 0.1},
    }  # fmt: skip
    return EVERY[case](folder, **{**usual, **changes})


__all__ = ["CASES", "EVERY", "made", "prepare"]
