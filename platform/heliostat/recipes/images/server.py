"""Serves the exported text-to-image model with MLflow. MLflow copies this file into the model, so the server needs only
diffusers.

mlflow.pyfunc.load_model("models:/NAME/1").predict(["a handwritten seven"], params={"steps": 20}) returns PNG files in base64.
"""

from __future__ import annotations

import base64
import io
import os
from typing import Any

import mlflow
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from mlflow.pyfunc.model import PythonModel
from mlflow.types.type_hints import TypeFromExample  # a list of strings; with list[str] as the hint, MLflow drops the params


class ImageServer(PythonModel):
    """Generates an image for each prompt. Parameters: steps, guidance, guidance_rescale, guidance_interval,
    and seed. A StableDiffusionPipeline has no guidance_interval. Image i, counted from 0, uses seed + i."""

    def load_context(self, context: Any) -> None:
        diffusers_logging.disable_progress_bar()
        folder = os.fspath(context.artifacts["model"])
        # runs the folder's own pipeline.py, which was logged with this model; in fp32, or text encoders would keep their type
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline: Any = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    def predict(self, context: Any, model_input: TypeFromExample, params: dict[str, Any] | None = None) -> list[str]:
        p = {"steps": 30, "guidance": 4.0, "seed": 0, **(params or {})}
        more = {name: p[name] for name in ("guidance_rescale", "guidance_interval") if name in p}
        prompts: Any = model_input
        draws = [torch.Generator("cpu").manual_seed(p["seed"] + i) for i in range(len(prompts))]
        images = self.pipeline(
            list(prompts), num_inference_steps=p["steps"], guidance_scale=p["guidance"], generator=draws, **more
        ).images
        return [_png(image) for image in images]


def _png(image: Any) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


mlflow.models.set_model(ImageServer())
