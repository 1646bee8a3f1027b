"""Counts the FLOPs of a language model's training step from the shapes of its modules' weights.

6 for every weight that multiplies a token: 2 forward, 4 backward (Kaplan et al. 2020, arXiv 2001.08361). Embeddings are only
looked up and not counted, nor are vectors (norms, biases), nor experts but those that a token is routed to. Attention multiplies
queries with keys, and weights with values: 6 x length x heads x (width of a key + width of a value) a token, for the whole
square, as is customary; windows and the causal half are not taken off. Shapes are read, not weights, so parameters that ZeRO-3
has partitioned do as well.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")
NO_SQUARE = ("linear", "mamba", "conv", "recurrent", "mlp", "moe")  # kinds of layers that attend to nothing


def per_sample(model: torch.nn.Module, config: Any, length: int) -> float:
    """Counts the forward and backward FLOPs of one sample of `length` tokens."""
    config = config.get_text_config(decoder=True)
    return float(length * 6 * (multiplied(model, config) + length * attended(model, config)))


def multiplied(model: torch.nn.Module, config: Any) -> float:
    """Counts the weights that multiply each token."""
    experts, chosen = _first(config, EXPERTS), _first(config, CHOSEN)
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for kind, weight in module._parameters.items():
            shape: tuple[int, ...] = () if weight is None else tuple(getattr(weight, "ds_shape", weight.shape))
            if len(shape) < 2 or "bias" in kind:
                continue
            routed = bool(experts and chosen) and (EXPERT.search(name) or (len(shape) == 3 and shape[0] == experts))
            total += math.prod(shape) * (chosen / experts if routed else 1)
    return total


def attended(model: torch.nn.Module, config: Any) -> int:
    """Counts the multiplications of one token with another, over all layers and heads."""
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


def _first(thing: Any, names: tuple[str, ...]) -> Any:
    return next((found for name in names if (found := getattr(thing, name, None))), None)
