"""Exchanges attention heads among workers that have a stretch of each sample: DeepSpeed's Ulysses, for `sequence_attention`."""

from __future__ import annotations

from typing import Any


def around(attention: Any, group: Any, micro_batch: int, sizes: tuple[int, int, int], layers: int) -> Any:
    """Makes an attention of all tokens for some heads out of one of some tokens for all heads; `sizes` as
    `sequence_attention.sizes` returns them."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    heads, shared, width = sizes
    return UlyssesSPAttentionHF(
        attn=attention,
        batch_size=micro_batch,
        attn_head_count=heads,
        attn_head_size=width,
        kv_head_count=shared,
        num_hidden_layers=layers,
        process_group=group,
        seq_length_is_variable=True,
    )
