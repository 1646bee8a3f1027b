"""Defines the keys of `model` that say how a mixture of experts is trained, in any architecture and beside `pretrained`; checks
that the model has what they need.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal

from pydantic import ValidationError

from heliostat.config.fields import NonNegative, divisors
from heliostat.errors import ConfigError
from heliostat.parallel import expert_numbers
from heliostat.schema import Strict, explain

log = logging.getLogger(__name__)


class ExpertKeys(Strict):
    experts_implementation: Literal["grouped_mm", "batched_mm", "eager"] | None = None
    """How transformers multiplies by experts' matrices. Unset: grouped_mm, in every architecture that can."""
    router_z_loss_coef: NonNegative = 0.0
    """Weight of the routers' z-loss in the objective."""
    router_bias_update_rate: NonNegative = 0.0
    """Change of a router's biases behind every step."""


KEYS = tuple(ExpertKeys.model_fields)
RATE, Z_LOSS = "router_bias_update_rate", "router_z_loss_coef"


def read(model: dict[str, Any]) -> ExpertKeys:
    """Reads the keys among a job's `model`; ConfigError for wrong values."""
    try:
        return ExpertKeys.model_validate({k: model[k] for k in KEYS if k in model})
    except ValidationError as e:
        raise ConfigError("\n  ".join(explain(e, ExpertKeys, "model"))) from e


def require(recipe: Any) -> None:
    """Raises ConfigError if the job gives a key that the recipe's model has no use for; warns of biases that nothing changes."""
    from heliostat.parallel import experts

    keys, kind = recipe.experts, recipe.config.model_type
    given = [k for k in KEYS if k in keys.model_fields_set]
    if not given and not recipe.routes:
        return
    model = _small(recipe)
    if model is None:
        return  # of no size that can be tried: the first step will tell
    layers = experts.layers(model)
    if given and not layers:
        raise ConfigError(f"model.{given[0]}: {kind!r} has no experts that it could be about; remove this key")
    if keys.router_z_loss_coef and len(experts.routers(model)) < len(layers):
        raise ConfigError(f"model.{Z_LOSS}: the routers of {kind!r} do not tell their logits; remove this key")
    biased = len(experts.biases(model)) == len(layers) > 0
    if keys.router_bias_update_rate and not biased:
        raise ConfigError(
            f"model.{RATE}: {kind!r} has no bias that its routers choose experts with, as DeepSeek-V3 has; remove this key"
        )
    if recipe.job.train.compile and (keys.router_bias_update_rate or keys.router_z_loss_coef):
        named = RATE if keys.router_bias_update_rate else Z_LOSS
        raise ConfigError(f"model.{named} with train.compile is not tried; set train.compile to false, or remove this key")
    if biased and RATE not in given and not recipe.router_weight:
        log.warning(
            "model.%s: is not set, so the biases that %r chooses experts with stay as they are, and few experts may end with "
            "most tokens; set it (DeepSeek-V3 had 0.001), or to 0 if that is meant",
            RATE, kind,
        )  # fmt: skip


def require_divided(recipe: Any, parts: int) -> None:
    """Raises ConfigError unless the experts of the recipe's model can be divided into so many parts."""
    from heliostat.parallel import experts

    key, kind, count = "train.parallel.expert", recipe.config.model_type, expert_numbers.number(recipe.config)
    if not count:
        raise ConfigError(f"{key}: {kind!r} has no experts; set it to 1")
    if count % parts:
        near = " or ".join(map(str, sorted(divisors(count)[1:], key=lambda n: abs(n - parts))[:2]))
        raise ConfigError(f"{key}: {parts} does not divide the model's {count} experts; use {near}")
    model = _small(recipe)
    layers = experts.layers(model) if model is not None else []
    stacked = {len(p) for m in layers for p in m.parameters(recurse=False)} | {int(m.num_experts) for m in layers}
    if stacked != {expert_numbers.number(model.config)}:
        raise ConfigError(f"{key}: the experts of {kind!r} are not stacked in one module of each layer; set it to 1")
    if any(m.has_post_expert_norm for m in layers):
        raise ConfigError(f"{key}: the experts of {kind!r} have norms of their own, which is not tried; set it to 1")


def _small(recipe: Any) -> Any:
    """Builds a small model of the recipe's architecture, without memory for it; None if none can be built."""
    import torch

    from heliostat.parallel import tiny

    for config in tiny.shrunk(recipe.config, recipe.length):
        small = copy.copy(recipe)
        small.config, small.pretrained = config, None
        try:
            with torch.device("meta"):
                return small.build()
        except Exception:  # noqa: BLE001  whatever this architecture's own code raises
            continue
    return None
