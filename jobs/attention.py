"""Attention for short sequences in bf16 on a CPU: "grouped", an implementation for transformers as "sdpa" is one.

There torch's fused kernel takes 1.2 (512 tokens) to 1.8 times (256 tokens) as long, and transformers' own "eager" longer still.
The queries that share a key head are one matrix, so keys and values are never repeated, and softmax writes bf16 at once, so no
fp32 copy of the scores is made. Masks are those of "sdpa": none where attention is just causal, else bool, True where it looks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

NAME = "grouped"
MODELS = ("llama", "mistral", "qwen2", "qwen3")  # whose attention is scaled dot products and a mask, and nothing else
LONGEST = 512  # tokens; the scores are held as a whole


def register() -> None:
    """Makes the implementation known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


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
    """Queries [batch, heads, length, width], keys and values [batch, groups, length, width] -> [batch, length, heads, width]."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    queries = (query * scaling).reshape(batch * groups, -1, width)
    keys, values = key.reshape(batch * groups, length, width), value.reshape(batch * groups, length, width)
    if attention_mask is None:
        ahead = query.new_full((length, length), -torch.inf).triu(1).repeat(heads // groups, 1)
        scores = torch.baddbmm(ahead, queries, keys.transpose(1, 2))
    else:
        scores = torch.bmm(queries, keys.transpose(1, 2))
        scores.view(batch, groups, -1, length, length).masked_fill_(~attention_mask.unsqueeze(2), -torch.inf)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    return torch.bmm(weights, values).view(batch, heads, length, width).transpose(1, 2).contiguous(), None
