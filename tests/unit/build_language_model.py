"""Writes tiny language models with random weights for tests, and prompts for them."""

from pathlib import Path

import torch
from heliostat.inference.batch.engines import Input
from heliostat.recipes.text.causal_lm import CausalLM

from tests.unit.build_job import job
from tests.unit.test_samples import make_text

PROMPTS = [Input(text, seed) for seed, text in enumerate(["a b", "", "c d e f g", "b", "a b c d e f", "h i j", "a b"])]
ARCHITECTURES = {
    "llama": {"arch": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "mamba": {"arch": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}


def write_model(folder: Path, model: dict, length: int = 32) -> Path:
    """Exports a language model whose random weights are large enough to give different answers."""
    changes = {"model": {**model, "vocab_size": 320}, "data.sequence_length": length, "train.precision": "fp32"}
    recipe = CausalLM(job(**changes))
    recipe.bind([make_text(folder / "data")])
    torch.manual_seed(0)
    made = recipe.build()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    made.save_pretrained(folder / "model")
    recipe.save_config(folder / "model")
    return folder / "model"
