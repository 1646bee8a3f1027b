"""Writes what lies beside an exported language model's weights: configuration, tokenizer, and how it generates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from heliostat.recipes.pretrained import from_folder
from heliostat.recipes.text import infilling, vocabulary

if TYPE_CHECKING:
    from heliostat.recipes.text.causal_lm import CausalLM


def write(recipe: CausalLM, folder: Path) -> None:
    """Writes them into the model's folder; of a pretrained model as its own folder has them."""
    config = type(recipe.config).from_dict(recipe.config.to_dict())
    config.use_cache = True
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    _generation(recipe.pretrained, config).save_pretrained(folder)
    if recipe.pretrained:
        from_folder("model.pretrained", AutoTokenizer, recipe.pretrained).save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes(vocabulary.of_folder(Path(recipe.pretrained)))  # as it is, not as it is read
    else:
        recipe.tokenizer().save_pretrained(folder)
    infilling.write(folder, recipe.sources)


def _generation(pretrained: str | None, config: Any) -> Any:
    """Returns how the exported model generates by default, and where it stops: as the pretrained folder or its config says."""
    if pretrained and (Path(pretrained) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(pretrained)
    return GenerationConfig.from_model_config(config)
