"""Finds the weight of the loss that keeps a mixture of experts balanced, and checks that the model computes it: Switch
Transformer's (Fedus et al. 2021, arXiv 2101.03961), as the model's own code in transformers computes it over a micro-batch. It is
switched on as there, with `output_router_logits: true`.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from heliostat.errors import ConfigError

log = logging.getLogger(__name__)
NAME, Z_NAME = "router_loss", "router_z_loss"
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


def coefficient(config: Any) -> float | None:
    """Returns the weight of the router's loss in the objective; None for a model that has none."""
    parts = (config.get_text_config(decoder=True), getattr(config, "ffn_config", None))
    return next((float(c) for part in parts for name in COEFFICIENTS if (c := getattr(part, name, None)) is not None), None)


def wanted(config: Any) -> bool:
    return bool(getattr(config.get_text_config(decoder=True), "output_router_logits", False))


def probe(recipe: Any, refused: bool) -> None:
    """Raises ConfigError if the job asks for a router's loss that the model does not compute; warns if the job does not set it
    and the model has one. `refused`: the job sets it to false."""
    config = recipe.config
    weight = coefficient(config)
    if not wanted(config):
        if weight and not refused and not recipe.balances and _given(recipe):
            log.warning(
                "model.output_router_logits: is not set, so the router's loss (coefficient %g) is left out of the objective, and "
                "few experts may end with most tokens; set it to true, or to false if that is meant",
                weight,
            )
        return
    if weight is None or not _given(recipe):
        raise ConfigError(
            f"model.output_router_logits: {config.model_type!r} gives no router loss to add to the objective; set it to false"
        )


def _given(recipe: Any) -> bool:
    """Tests whether a small model of the recipe's architecture computes a router's loss if it is asked for."""
    import torch

    from heliostat.parallel import tiny

    for config in tiny.shrunk(recipe.config, recipe.length):
        small = copy.copy(recipe)
        small.config, small.pretrained = config, None
        config.get_text_config(decoder=True).output_router_logits = True
        try:
            if tiny.parameters(small) > tiny.LARGEST:
                continue
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                given = small.build()(input_ids=torch.arange(tiny.LENGTH)[None])
        except Exception:  # noqa: BLE001  whatever this architecture's own code raises
            continue
        return isinstance(getattr(given, "aux_loss", None), torch.Tensor)
    return True  # it is too large to be tried: the first step will tell
