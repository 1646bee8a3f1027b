"""Writes what lies beside an exported language model's weights: configuration, tokenizer, and how it generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from heliostat.data.manifest import Manifest
from heliostat.recipes.pretrained import from_folder
from heliostat.recipes.text import infilling, vocabulary


def write(folder: Path, given: Any, pretrained: str | None, tokenizer: Callable[[], Any], sources: list[Manifest]) -> None:
    """Writes them into the model's folder. Those of a pretrained model are copied; else `tokenizer` builds the tokenizer."""
    config = type(given).from_dict(given.to_dict())
    config.use_cache = True
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    _generation(pretrained, config).save_pretrained(folder)
    if pretrained:
        from_folder("model.pretrained", AutoTokenizer, pretrained).save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes(vocabulary.of_folder(Path(pretrained)))  # as it is, not as it is read
    else:
        tokenizer().save_pretrained(folder)
    infilling.write(folder, sources)


def _generation(pretrained: str | None, config: Any) -> Any:
    """Returns how the exported model generates by default, and where it stops: as the pretrained folder or its config says."""
    if pretrained and (Path(pretrained) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(pretrained)
    return GenerationConfig.from_model_config(config)
