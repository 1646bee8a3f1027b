"""Serves the exported language model as an MLflow pyfunc. MLflow copies this file into the model, so the server needs only
transformers.

mlflow.pyfunc.load_model("models:/NAME/1").predict(["def "], params={"max_tokens": 40})
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlflow
import torch
from mlflow.pyfunc.model import PythonModel
from mlflow.types.type_hints import TypeFromExample  # a list of strings; with list[str] as the hint, MLflow drops the params
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


class TextServer(PythonModel):
    """Continues prompts. Parameters: max_tokens, temperature (0: greedy), top_p, seed."""

    def load_context(self, context: Any) -> None:
        folder = context.artifacts["model"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.ends = take_sampling(self.model)

    def predict(self, context: Any, model_input: TypeFromExample, params: dict[str, Any] | None = None) -> list[str]:
        p = {"max_tokens": 100, "temperature": 0.8, "top_p": 0.95, "seed": 0, **(params or {})}
        prompts: Any = model_input
        return [continue_text(self.model, self.tokenizer, prompt, **p, ends=self.ends) for prompt in prompts]


def take_sampling(model: Any) -> list[int]:
    """Removes the sampling settings of generation_config.json, such as penalties, from a model, so that only the request's
    settings apply. Returns the end tokens that generation_config.json names."""
    named = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()
    return [] if named is None else [named] if isinstance(named, int) else list(named)


def continue_text(model: Any, tokenizer: Any, prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int,
                  ends: Sequence[int] = ()) -> str:  # fmt: skip
    """Generates the continuation of a prompt, at most `max_tokens` tokens. An empty prompt starts a document. Temperature 0 takes
    the most likely token."""
    ids = tokenizer(prompt or tokenizer.bos_token)["input_ids"]
    return continue_tokens(model, tokenizer, ids, max_tokens, temperature, top_p, seed, ends)


def continue_tokens(model: Any, tokenizer: Any, prompt: list[int], max_tokens: int, temperature: float, top_p: float, seed: int,
                    ends: Sequence[int] = ()) -> str:  # fmt: skip
    """Generates the continuation of tokens. `ends`: end tokens in addition to the tokenizer's."""
    ids = torch.tensor([prompt], device=model.device)
    torch.manual_seed(seed)
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, pad_token_id=tokenizer.eos_token_id,
            eos_token_id=sorted({*ends, tokenizer.eos_token_id} - {None}) or None, do_sample=bool(temperature), **drawn,
        )  # fmt: skip
    return tokenizer.decode(out[0][ids.shape[1] :], skip_special_tokens=True)


mlflow.models.set_model(TextServer())
