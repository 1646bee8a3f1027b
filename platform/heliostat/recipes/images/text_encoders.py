"""Finds the class of a frozen text encoder from its configuration.

CLIP, T5, T5Gemma, BERT and its relatives, and decoders such as Gemma are supported. For BERT's relatives and decoders, the table
of transformers has the class.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_MAPPING,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
    T5EncoderModel,
    T5GemmaEncoderModel,
    UMT5EncoderModel,
)

from heliostat.errors import ConfigError
from heliostat.recipes.text import encoder

BERTS = ("bert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta")  # model types
DECODERS = ("gemma", "gemma2", "gemma3_text", "llama", "qwen2", "qwen3")
CLASSES = {"t5": T5EncoderModel, "mt5": T5EncoderModel, "umt5": UMT5EncoderModel, "t5gemma": T5GemmaEncoderModel}


def kind(key: str, config: PreTrainedConfig) -> Any:
    """Returns the class that loads a text encoder with this configuration. Raises ConfigError, with `key` at its beginning, for
    an unsupported type of model, or for a T5Gemma with a decoder."""
    if config.model_type == "t5gemma" and config.is_encoder_decoder:
        raise ConfigError(
            f"{key}: the folder has a decoder, too. Save only the encoder: "
            "T5GemmaEncoderModel.from_pretrained(FOLDER, is_encoder_decoder=False).save_pretrained(NEW_FOLDER)"
        )
    if config.model_type in CLASSES:
        return CLASSES[config.model_type]
    if "clip" in config.model_type:
        return CLIPTextModelWithProjection if "CLIPTextModelWithProjection" in (config.architectures or ()) else CLIPTextModel
    if config.model_type in (*BERTS, *DECODERS):
        return MODEL_MAPPING[type(config)]
    known = ", ".join(("CLIP", *CLASSES, *BERTS, *DECODERS))
    raise ConfigError(f"{key}: a model of type {config.model_type!r} isn't a supported text encoder. Use one of {known}")


def build(key: str, config: PreTrainedConfig) -> Any:
    """Builds a text encoder from its configuration, or from the configuration of a CLIP model with both encoders."""
    cls = kind(key, config)
    return cls(getattr(config, "text_config", config), **encoder.without_pooler(cls))


def widths(config: Any) -> tuple[int, int | None]:
    """Returns the widths of the tokens and of the pooled embedding, which only CLIP has, of an encoder with this
    configuration."""
    if config.model_type == "t5gemma":
        return int(config.encoder.hidden_size), None
    if "clip" not in config.model_type:
        return int(getattr(config, "d_model", None) or config.hidden_size), None
    text = getattr(config, "text_config", config)
    projected = "CLIPTextModelWithProjection" in (config.architectures or ())
    return int(text.hidden_size), int(text.projection_dim if projected else text.hidden_size)
