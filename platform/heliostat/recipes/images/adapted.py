"""Trains and exports adapters of a text-to-image model's backbone (`recipes.adapters`), in the format of diffusers:
`pytorch_lora_weights.safetensors`, for `load_lora_weights` of a pipeline and `load_lora_adapter` of a backbone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from heliostat.errors import ConfigError
from heliostat.recipes import adapter_probe, adapter_tensors, adapters
from heliostat.recipes.adapters import Adapts
from heliostat.recipes.counter_random import normals
from heliostat.recipes.images import config
from heliostat.recipes.images.config import Model
from heliostat.recipes.images.parts import Denoiser, Parts
from heliostat.recipes.images.pipeline import predict
from heliostat.recipes.pretrained import whole_part
from heliostat.recipes.protocol import Exports, Weight
from heliostat.storage.hub import files

WEIGHTS, METADATA = "pytorch_lora_weights", "lora_adapter_metadata"  # names that diffusers reads
SHOWN = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "lora_dropout", "bias")
TIMES = (20, 700)  # of the batch that compares an export with the trained model


class AdaptedImages(Adapts, Exports):
    """Implements `Adapts` for text-to-image models. Only the backbone has an adapter."""

    model: Model
    parts: Parts

    def probe(self) -> None:
        if not self.adapter:
            return
        folder = self.base()
        if not any(folder.glob("*.safetensors")) and not files.absent_weights(folder):
            raise ConfigError(
                f"model.backbone.pretrained: {str(folder)!r} has no safetensors weights. Save the model with save_pretrained"
            )
        if not self.model.frozen_text:
            raise ConfigError("model.text: the text encoder must be frozen with model.adapter. Set model.text.pretrained")
        adapter_probe.require(self.adapter, self._plain_backbone, self._run, self.job.train.zero.stage)

    def _run(self, backbone: Any) -> torch.Tensor:
        """Computes the backbone's output for one blank sample on the meta device."""
        return predict(backbone, torch.zeros((1, *self.parts.shape())), torch.zeros(1), *self.parts.text_shape.blank(1))

    def _plain_backbone(self) -> Any:
        """Builds the backbone of the base, without adapters and weights."""
        _, family = config.backbone_family(self.model.backbone)
        with torch.device("meta"):
            return family.cls.from_config(config.folder_config("model.backbone.pretrained", str(self.base())))

    def base(self) -> Path:
        return Path(self.model.backbone["pretrained"])

    def tensors(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Weight]]:
        if self.adapter is None:
            return super().tensors(shapes)
        merged, prefix = adapter_tensors.merged(self.adapter, shapes), f"{self.parts.name}."
        return {self.layout[prefix]: {name.removeprefix(prefix): weight for name, weight in merged.items()}}

    def adapter_files(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Weight]]:
        assert self.adapter
        return {WEIGHTS: adapter_tensors.exported(self.adapter, shapes, str)}

    def save_adapter_config(self, folder: Path, layers: list[str]) -> dict[str, str]:
        plain, part = self._plain_backbone(), self.parts.name
        if not hasattr(plain, "load_lora_adapter"):
            raise ConfigError(f"--adapter: diffusers can't load an adapter of {type(plain).__name__}. Export with --merge")
        assert self.adapter
        every = [name for name, _ in plain.named_modules()]
        targets = adapters.shortest([name.removeprefix(f"{part}.") for name in layers], every)
        keys = {**adapters.peft_config(self.adapter, targets).to_dict(), "target_modules": targets}
        return {METADATA: json.dumps({f"{part}.{key}": keys[key] for key in SHOWN})}

    def reload(self, folder: Path, adapter: bool) -> torch.nn.Module:
        _, family = config.backbone_family(self.model.backbone)
        backbone = whole_part(family.cls, self.base() if adapter else folder / self.parts.name, torch.float32)
        if adapter:
            adapters.round_base(self.adapter, backbone)
            backbone.load_lora_adapter(folder, prefix=self.parts.name, weight_name=f"{WEIGHTS}.safetensors")
        return Denoiser(self.parts.name, backbone, None)

    def answer(self, model: torch.nn.Module) -> torch.Tensor:
        shape, text = self.parts.shape(), self.parts.text_shape
        keys, times = torch.arange(len(TIMES)), torch.tensor(TIMES)
        noisy = normals(0, keys, 0, math.prod(shape)).view(len(keys), *shape)
        tokens = normals(0, keys, 1, text.tokens * text.width).view(len(keys), text.tokens, text.width)
        return model(noisy, times, tokens, normals(0, keys, 2, text.pooled) if text.pooled else None)
