"""Counts the FLOPs of a language model's training step from the shapes of its modules' weights.

Each weight that multiplies a token counts 6 FLOPs: 2 in the forward pass, and 4 in the backward pass (Kaplan et al. 2020, arXiv
2001.08361). A weight that isn't trained counts 4 FLOPs, because the backward pass doesn't compute its gradient. Embeddings
(lookups), vectors (norms, biases), and experts that a token isn't routed to don't count.

Attention multiplies queries with keys, and weights with values: 6 x length x heads x (key width + value width) per token. As is
customary, this counts all pairs of tokens: attention windows and the causal mask don't reduce the number. This module reads only
shapes, so parameters that ZeRO-3 has partitioned count too.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch

from heliostat.parallel import language_model
from heliostat.recipes import building
from heliostat.recipes.quantized import Nf4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")
NO_SQUARE = ("linear", "mamba", "conv", "recurrent", "mlp", "moe")  # kinds of layers without attention


def per_sample(model: torch.nn.Module, config: PreTrainedConfig, length: int) -> float:
    """Counts the forward and backward FLOPs of one sample of `length` tokens."""
    config = config.get_text_config(decoder=True)
    return float(length * 6 * (multiplied(model, config) + length * attended(model, config)))


def multiplied(model: torch.nn.Module, config: PreTrainedConfig) -> float:
    """Counts the weights that each token is multiplied with, without embeddings, norms, biases, and unused experts. A weight that
    isn't trained counts 2/3."""
    total, share = 0.0, _routed_share(config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        if isinstance(module, Nf4Linear):
            total += module.in_features * module.out_features * 2 / 3
            continue
        for kind, weight in module._parameters.items():
            shape: tuple[int, ...] = () if weight is None else building.shape(weight)
            if len(shape) < 2 or "bias" in kind:
                continue
            part = 1 if weight is not None and weight.requires_grad else 2 / 3
            total += math.prod(shape) * (share if _routed(name, shape, config) else 1) * part
    return total


def active(model: torch.nn.Module, config: PreTrainedConfig) -> int:
    """Counts the parameters that a token uses. These are all parameters, except routed experts to which the token isn't sent."""
    config = config.get_text_config(decoder=True)
    matrices = ((name.rpartition(".")[0], math.prod(shape), shape) for name, shape in _shapes(model))
    return round(sum(n * (_routed_share(config) if _routed(name, shape, config) else 1) for name, n, shape in matrices))


def _shapes(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, building.shape(p)) for name, p in model.named_parameters()]


def _routed_share(config: PreTrainedConfig) -> float:
    """Returns the fraction of a layer's routed experts that a token is sent to."""
    experts, chosen = language_model.number(config), language_model.chosen(config)
    return chosen / experts if experts and chosen else 1.0


def _routed(module: str, shape: tuple[int, ...], config: PreTrainedConfig) -> bool:
    """Checks whether a parameter belongs to one routed expert, or contains a part of each routed expert."""
    experts = language_model.number(config)
    stacked = len(shape) == 3 or (len(shape) == 2 and module.rpartition(".")[2] == "experts")  # matrices, or their biases
    return bool(EXPERT.search(module)) or (stacked and shape[0] == experts)


def attended(model: torch.nn.Module, config: PreTrainedConfig) -> int:
    """Counts the multiplications in which attention combines one token with all tokens, over all layers and heads."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    total = 0
    for module in model.modules():
        layer, key = getattr(module, "layer_idx", None), _first(module, ("qk_head_dim", "head_dim", "head_size"))
        if not key or "Attention" not in type(module).__name__:
            continue
        if isinstance(layer, int) and layer < len(kinds) and any(k in kinds[layer] for k in NO_SQUARE):
            continue
        value = _first(module, ("v_head_dim",)) or key
        heads = _first(module, ("num_heads", "num_attention_heads")) or config.num_attention_heads
        total += heads * (key + value)
    return total


def _first(thing: object, names: tuple[str, ...]) -> int:
    return next((value for name in names if (value := getattr(thing, name, None))), 0)
