"""Recognizes language models whose keys are certainly valid, so that these models can be checked without transformers.

Importing torch and a configuration class of transformers takes three seconds of processor time, which is most of the check of a
small job. For the keys below, transformers has only these rules; tests/unit/test_plain_keys.py compares them. `model_config` and
transformers handle all other keys, and all errors.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heliostat.recipes.text import initial

Size = Annotated[int, Field(ge=1)]
WITHOUT_HEAD_DIM = ("qwen2", "nanochat")  # architectures without the key head_dim


class Plain(BaseModel):
    """Describes a dense model with grouped heads and explicit sizes."""

    model_config = ConfigDict(strict=True, extra="forbid")

    arch: Literal["llama", "mistral", "qwen2", "qwen3", "nanochat"]
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    intermediate_size: Size
    head_dim: Size | None = None
    vocab_size: Size | None = None
    max_position_embeddings: Size | None = None
    hidden_act: Literal["silu", "gelu", "relu", "relu2"] = "silu"
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    initializer_range: Annotated[float, Field(ge=0, le=1)] = 0.02
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tie_word_embeddings: bool = False


def read(model: dict[str, object]) -> Plain | None:
    """Reads the keys of a model that is certainly valid. Returns None for all other models."""
    keys = {key: value for key, value in model.items() if key != initial.KEY}
    try:
        plain = Plain.model_validate(keys)
    except (ValidationError, TypeError):  # TypeError: a key that isn't a string
        return None
    if plain.head_dim is None:
        divide = plain.hidden_size % (2 * plain.num_attention_heads) == 0  # rotary positions rotate pairs
    else:
        divide = plain.hidden_size % plain.num_attention_heads == plain.head_dim % 2 == 0 and plain.arch not in WITHOUT_HEAD_DIM
    share = plain.num_attention_heads % plain.num_key_value_heads == 0
    return plain if divide and share and None not in keys.values() else None
