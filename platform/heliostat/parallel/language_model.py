"""Reads from a configuration of transformers how many experts a layer has, and how many of them a token is sent to."""

from __future__ import annotations

from typing import Any

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def number(config: Any) -> int | None:
    """Returns the number of a layer's routed experts, as a configuration names it; None for a dense model."""
    return _first(config.get_text_config(decoder=True), EXPERTS)


def chosen(config: Any) -> int | None:
    """Returns the number of routed experts that a token is sent to; None for a dense model."""
    return _first(config.get_text_config(decoder=True), CHOSEN)


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    return next((n for name in names if (n := getattr(config, name, None))), None)
