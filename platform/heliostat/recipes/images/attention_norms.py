"""Checks the keys of a backbone that normalize attention: `qk_norm` and `cross_attention_norm`.

QK norm normalizes queries and keys, so that attention logits stay small in long bf16 runs (Dehghani et al. 2023, arXiv
2302.05442; Esser et al. 2024, arXiv 2403.03206). diffusers supports it only in some classes. Most blocks of U-Nets ignore
`cross_attention_norm`, which normalizes the captions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from heliostat.errors import ConfigError

QK, CROSS = "qk_norm", "cross_attention_norm"


def require_supported(arch: str, keys: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ConfigError if the job asks for QK norm, but the class of `arch` has no such key. `known`: the keys of the class."""
    if QK in keys and QK not in known:
        raise ConfigError(
            f"model.backbone.{QK}: arch {arch!r} of diffusers has no QK norm. Remove this key, or use arch: sd3 with "
            "qk_norm: rms_norm"
        )


def require_used(keys: Mapping[str, Any], backbone: nn.Module) -> None:
    """Raises ConfigError if the job asks for a normalization of captions that no block of the backbone has."""
    if keys.get(CROSS) and not any(getattr(module, "norm_cross", None) is not None for module in backbone.modules()):
        raise ConfigError(
            f"model.backbone.{CROSS}: only the blocks SimpleCrossAttnDownBlock2D, SimpleCrossAttnUpBlock2D, and "
            "UNetMidBlock2DSimpleCrossAttn use this key. Use these blocks, or remove this key"
        )
