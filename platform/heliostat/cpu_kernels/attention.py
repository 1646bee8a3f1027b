"""Computes causal attention for short sequences on a CPU: "grouped", an implementation for transformers as "sdpa" is one.

There torch's fused kernel takes 1.2 (fp32) to 2 times (bf16) as long, and transformers' own "eager" longer still. Scores are
computed for a quarter of the queries at a time, against the keys that those may attend to; the queries that share a key head are
one matrix, so keys and values are never repeated; softmax writes the scores' own type, so bf16 makes no fp32 copy of them. Masks
are those of "sdpa": none where attention is just causal, else bool, True where a query attends to a key, and never to a later
one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

NAME = "grouped"
MODELS = ("llama", "mistral", "qwen2", "qwen3", "nanochat")  # whose attention is scaled dot products and a mask, and nothing else
LONGEST = 512  # tokens; the scores of all queries are kept for the gradient
FEWEST = 64  # queries at a time: smaller products are slow


def fits(model: torch.nn.Module, length: int | None) -> bool:
    """Tests whether the model attends as it is computed here, and its samples are short."""
    return length is not None and length <= LONGEST and getattr(getattr(model, "config", None), "model_type", None) in MODELS


def use(model: Any) -> None:
    """Makes a model of transformers compute its attention here, from now on."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Computes [batch, length, heads, width] from queries [batch, heads, length, width], and keys and values [batch, groups,
    length, width]."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    queries = (query * scaling).reshape(batch * groups, heads // groups, length, width)
    keys, values = key.reshape(batch * groups, length, width), value.reshape(batch * groups, length, width)
    size = max(FEWEST, -(-length // 4))
    attended = []
    for start in range(0, length, size):
        end = min(start + size, length)
        some, seen = queries[:, :, start:end].reshape(batch * groups, -1, width), keys[:, :end].transpose(1, 2)
        if attention_mask is None:
            ahead = query.new_full((end - start, end), -torch.inf).triu(start + 1).repeat(heads // groups, 1)
            scores = torch.baddbmm(ahead, some, seen)
        else:
            scores = torch.bmm(some, seen)
            hidden = ~attention_mask[:, :, start:end, :end].unsqueeze(2)
            scores.view(batch, groups, -1, end - start, end).masked_fill_(hidden, -torch.inf)
        weights = F.dropout(F.softmax(scores, dim=-1), dropout)
        attended.append(torch.bmm(weights, values[:, :end]).view(batch, heads, end - start, width))
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None
