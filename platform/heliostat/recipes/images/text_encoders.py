"""Finds the class of a frozen text encoder from its configuration.

CLIP, T5, and BERT and its relatives are supported. Of BERT's relatives, `Auto` of transformers selects the class.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModel, CLIPTextModel, PreTrainedConfig, T5EncoderModel

from heliostat.errors import ConfigError

BERTS = ("bert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta")  # model types


def kind(key: str, config: PreTrainedConfig) -> Any:
    """Returns the class that loads a text encoder with this configuration. Raises ConfigError, with `key` at its beginning, for
    an unsupported type of model."""
    if "t5" in config.model_type:
        return T5EncoderModel
    if "clip" in config.model_type:
        return CLIPTextModel
    if config.model_type in BERTS:
        return AutoModel
    raise ConfigError(
        f"{key}: a model of type {config.model_type!r} isn't a supported text encoder. Use CLIP, T5, or {', '.join(BERTS)}"
    )


def build(key: str, config: PreTrainedConfig) -> Any:
    """Builds a text encoder from its configuration, or from the configuration of a CLIP model with both encoders."""
    cls = kind(key, config)
    return AutoModel.from_config(config) if cls is AutoModel else cls(getattr(config, "text_config", config))
