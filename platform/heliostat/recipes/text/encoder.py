"""Builds and loads models of `transformers` without a head, and pools a text's hidden states into one embedding."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from heliostat.recipes.pretrained import from_config, from_folder, whole
from heliostat.recipes.text import masks
from heliostat.recipes.text.model_config import ModelKind

ENCODER = ModelKind(
    "text encoder or decoder",
    tuple({**MODEL_FOR_MASKED_LM_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}),
    "bert, modernbert, qwen3",
)


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a model in fp32 with its architecture's initial weights."""
    return from_config(transformers.AutoModel, config, **without_pooler(model_class(config)))


def load(
    key: str, folder: str | Path, kind: Any = transformers.AutoModel, config: PreTrainedConfig | None = None, **options: object
) -> PreTrainedModel:
    """Loads the model in a folder without its head. Raises ConfigError if a weight is missing, because transformers would
    initialize this weight at random.

    `kind`: an Auto class, or a model class.
    """
    config = config or from_folder(key, transformers.AutoConfig, folder)
    return whole(key, kind, folder, **{**options, "config": config, **without_pooler(model_class(config))})


def without_pooler(cls: type[PreTrainedModel]) -> dict[str, bool]:
    """Returns the option that leaves out the pooler of a class, if there is one, because heliostat doesn't use the pooler."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls).parameters else {}


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Returns the class of a configuration's model without a head. If there are several classes, returns the first."""
    mapped: Any = transformers.MODEL_MAPPING[type(config)]
    return mapped[0] if isinstance(mapped, tuple) else mapped


def places(config: PreTrainedConfig, model: PreTrainedModel | None = None) -> int | None:
    """Returns the maximum number of tokens for which a model has positions. Returns None if the maximum is unknown. `model`: the
    loaded model, if there is one."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    tables = [m for name, m in (model.named_modules() if model is not None else ()) if name.endswith("position_embeddings")]
    first = max(
        (m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0
    )  # positions that RoBERTa doesn't use
    return most - first if most and most > 0 else None  # -1 in XLNet means no limit


def embed(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Embeds texts as vectors of length 1, fp32 [texts, width]. `mask`: true for tokens."""
    with masks.unread(whole=True):
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return F.normalize(pool(states.float(), mask, pooling), dim=-1)


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pools each text's states into one vector: the mean over its tokens (`mean`), the last token's state (`last`), or the first
    token's state (`cls`). A text without tokens gets zeros."""
    count = mask.sum(1, keepdim=True)
    if pooling == "mean":
        return states.masked_fill(mask[..., None] == 0, 0).sum(1) / count.clamp(min=1)
    places = torch.arange(mask.shape[1], device=mask.device)
    chosen = (places * mask).argmax(1) if pooling == "last" else mask.argmax(1)
    return states[torch.arange(len(states), device=mask.device), chosen].masked_fill(count == 0, 0)
