"""Loads an exported language model, and continues prompts with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import Field

from heliostat.config.schema import Float, Strict, validate
from heliostat.errors import ConfigError
from heliostat.recipes.pretrained import from_folder
from heliostat.recipes.protocol import Generated, Request


def whole(key: str, folder: str | Path, **options: Any) -> Any:
    """Loads the model in a folder; ConfigError if a weight is missing, which transformers would initialise at random."""
    model, told = from_folder(key, transformers.AutoModelForCausalLM, folder, output_loading_info=True, **options)
    if absent := sorted(set(told["missing_keys"]) - set(model.all_tied_weights_keys)):
        raise ConfigError(f"{folder}: lacks {len(absent)} of the model's weights, as {absent[0]}; is the folder whole?")
    return model


class Sampling(Strict):
    """Describes how text is generated; temperature 0 takes the likeliest token each time."""

    max_tokens: int = Field(100, ge=1)
    temperature: Float = Field(0.8, ge=0)
    top_p: Float = Field(0.95, gt=0, le=1)


class TextGenerator:
    """Continues prompts with an exported model."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.sampling = validate(Sampling, options, "generate")
        self.tokenizer = from_folder("model", transformers.AutoTokenizer, folder)
        model = whole("model", folder)
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, requests: list[Request]) -> list[Generated]:
        from heliostat.recipes.text.server import continue_text  # with mlflow

        out = []
        for request in requests:
            text = continue_text(self.model, self.tokenizer, request.prompt, **self.sampling.model_dump(), seed=request.seed)
            out.append(Generated(request.prompt, request.prompt + text, {"text": text}))
        return out
