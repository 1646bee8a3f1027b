"""Builds models of `transformers` from a configuration, with the same initial weights at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch

from heliostat.recipes import partitioning


def from_config(auto: Any, config: Any, **options: Any) -> Any:
    """Builds a model of an Auto class, or of a class of models itself, in fp32."""
    from transformers.initialization import no_init_weights

    make = getattr(auto, "from_config", None) or auto._from_config
    if partitioning.wanted():
        return make(config, dtype=torch.float32, **options)
    with no_init_weights():  # as at ZeRO-3: constructors draw no random numbers
        model = make(config, dtype=torch.float32, **options)
    model.init_weights()
    return model
