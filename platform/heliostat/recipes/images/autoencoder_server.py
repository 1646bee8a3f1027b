"""Serves the exported autoencoder with MLflow, which copies this file into the model. Requests contain PNG files in base64, and
responses contain their reconstructions in the same form."""

from __future__ import annotations

import base64
import io
from typing import Any

import mlflow
import numpy as np
import torch
from diffusers import AutoencoderKL
from mlflow.pyfunc.model import PythonModel
from mlflow.types.type_hints import TypeFromExample  # a list of strings; with list[str] as the hint, MLflow drops the params
from PIL import Image


class AutoencoderServer(PythonModel):
    def load_context(self, context: Any) -> None:
        self.vae = AutoencoderKL.from_pretrained(context.artifacts["model"]).to(torch.float32).eval()

    @torch.no_grad()
    def predict(self, context: Any, model_input: TypeFromExample, params: dict[str, Any] | None = None) -> list[str]:
        images: Any = model_input
        return [self._again(text) for text in images]

    def _again(self, text: str) -> str:
        image = Image.open(io.BytesIO(base64.b64decode(text))).convert("L" if self.vae.config.in_channels == 1 else "RGB")
        pixels = torch.from_numpy(np.atleast_3d(np.asarray(image)).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        decoded = self.vae.decode(self.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        again = ((decoded[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        out = io.BytesIO()
        Image.fromarray(again.squeeze(2) if again.shape[2] == 1 else again).save(out, "PNG")
        return base64.b64encode(out.getvalue()).decode()


mlflow.models.set_model(AutoencoderServer())
