"""Defines the keys of `model` for the training of experts, in all architectures and with `pretrained`. Checks that the model
supports these keys.

With `output_router_logits: true`, as in transformers, the objective includes the router's loss, which balances experts. This is
the loss of Switch Transformer (Fedus et al. 2021, arXiv 2101.03961). The model's code computes this loss over a micro-batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Protocol

from heliostat.config.fields import NonNegative, divisors
from heliostat.errors import ConfigError
from heliostat.parallel import language_model
from heliostat.parallel.language_model import LanguageModel
from heliostat.schema import Strict, validate_key

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


class ExpertKeys(Strict):
    experts_implementation: Literal["grouped_mm", "batched_mm", "eager"] | None = None
    """Implementation of the experts' matrix multiplications in transformers. Unset: grouped_mm, where the architecture supports
    it."""
    router_z_loss_coef: NonNegative = 0.0
    """Weight of the routers' z-loss in the objective."""
    router_bias_update_rate: NonNegative = 0.0
    """Amount by which the biases of a router change after every step."""


KEYS = tuple(ExpertKeys.model_fields)
RATE, Z_LOSS = "router_bias_update_rate", "router_z_loss_coef"
ROUTER_LOSS, ROUTER_Z_LOSS = "router_loss", "router_z_loss"
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


class MixtureModel(LanguageModel, Protocol):
    """Lists the additional attributes of a recipe whose model may have experts."""

    experts: ExpertKeys
    balances: bool
    router_weight: float | None


def read(model: Mapping[str, object]) -> ExpertKeys:
    """Reads the experts' keys in a job's `model`. Raises ConfigError for invalid values."""
    return validate_key(ExpertKeys, {k: model[k] for k in KEYS if k in model}, "model")


def require(recipe: MixtureModel) -> None:
    """Raises ConfigError if the job sets a key that the model doesn't use. Logs a warning if the model has biases that never
    change."""
    from heliostat.parallel import experts

    keys, kind = recipe.experts, recipe.config.model_type
    present = [k for k in KEYS if k in keys.model_fields_set]
    if not present and not recipe.routes:
        return
    model = _small(recipe)
    if model is None:
        return  # no small model can be tested; the first step will show a fault
    layers = experts.layers(model)
    if present and not layers:
        raise ConfigError(f"model.{present[0]}: {kind!r} has no experts. Remove this key")
    if keys.router_z_loss_coef and len(experts.routers(model)) < len(layers):
        raise ConfigError(f"model.{Z_LOSS}: not supported: the routers of {kind!r} don't return their logits. Remove this key")
    biased = len(experts.biases(model)) == len(layers) > 0
    if keys.router_bias_update_rate and not biased:
        raise ConfigError(
            f"model.{RATE}: the routers of {kind!r} have no bias for choosing experts, unlike the routers of DeepSeek-V3. "
            f"Remove this key"
        )
    if recipe.job.train.compile and (keys.router_bias_update_rate or keys.router_z_loss_coef):
        named = RATE if keys.router_bias_update_rate else Z_LOSS
        raise ConfigError(f"model.{named}: not supported with train.compile. Set train.compile to false, or remove this key")
    if biased and RATE not in present and not recipe.router_weight:
        log.warning(
            ("model.%s: not set, so the biases with which %r chooses experts stay constant, and a few experts may "
                "receive most tokens. Set this key (DeepSeek-V3 used 0.001), or to 0 on purpose"),
            RATE, kind,
        )  # fmt: skip


def require_divided(recipe: LanguageModel, parts: int) -> None:
    """Raises ConfigError unless the experts of the recipe's model can be partitioned into `parts` parts."""
    from heliostat.parallel import experts

    key, kind, count = "train.parallel.expert", recipe.config.model_type, language_model.number(recipe.config)
    if not count:
        raise ConfigError(f"{key}: {kind!r} has no experts. Set this key to 1")
    if count % parts:
        near = " or ".join(map(str, sorted(divisors(count)[1:], key=lambda n: abs(n - parts))[:2]))
        raise ConfigError(f"{key}: {parts} doesn't divide the model's {count} experts. Use {near}")
    model = _small(recipe)
    layers = experts.layers(model) if model else []
    stacked = {len(p) for m in layers for p in m.parameters(recurse=False)} | {int(m.num_experts) for m in layers}
    if not model or stacked != {language_model.number(model.config)}:
        raise ConfigError(f"{key}: not supported: {kind!r} doesn't stack its experts in one module per layer. Set this key to 1")
    if any(m.has_post_expert_norm for m in layers):
        raise ConfigError(f"{key}: not supported: the experts of {kind!r} have their own norms. Set this key to 1")


def _small(recipe: LanguageModel) -> PreTrainedModel | None:
    """Builds a small model of the recipe's architecture on the meta device. Returns None if heliostat can't build a small model
    of this architecture."""
    import torch

    from heliostat.parallel import tiny

    try:
        with torch.device("meta"):
            return tiny.attempt(recipe, lambda small: small.build(), largest=math.inf)
    except tiny.UntriedError:
        return None


def router_loss_weight(config: PreTrainedConfig) -> float | None:
    """Returns the weight of the router's loss in the objective. Returns None for a model without a router's loss."""
    parts = (config.get_text_config(decoder=True), getattr(config, "ffn_config", None))
    return next((float(c) for part in parts for name in COEFFICIENTS if (c := getattr(part, name, None)) is not None), None)


def asks_router_loss(config: PreTrainedConfig) -> bool:
    return bool(getattr(config.get_text_config(decoder=True), "output_router_logits", False))


def require_router_loss(recipe: MixtureModel, refused: bool) -> None:
    """Raises ConfigError if the job asks for a router's loss that the model doesn't compute.

    Logs a warning if the model has a router's loss, and the job doesn't set whether to use this loss. `refused`: the job turns
    the router's loss off.
    """
    config = recipe.config
    weight = router_loss_weight(config)
    if not asks_router_loss(config):
        if weight and not refused and not recipe.balances and _computes_router_loss(recipe):
            log.warning(
                (
                    "model.output_router_logits: not set, so the objective leaves out the router's loss (coefficient "
                    "%g), and a few experts may receive most tokens. Set this key to true, or to false on purpose"
                ),
                weight,
            )
        return
    if weight is None or not _computes_router_loss(recipe):
        raise ConfigError(f"model.output_router_logits: {config.model_type!r} returns no router loss. Set this key to false")


def _computes_router_loss(recipe: LanguageModel) -> bool:
    """Tests whether a small model of the recipe's architecture computes a router's loss on request."""
    import torch

    from heliostat.parallel import tiny

    def computed(small: LanguageModel) -> bool:
        small.config.get_text_config(decoder=True).output_router_logits = True
        with torch.no_grad():
            outputs = small.build()(input_ids=torch.arange(tiny.LENGTH)[None])
        return isinstance(getattr(outputs, "aux_loss", None), torch.Tensor)

    try:
        return tiny.attempt(recipe, computed)
    except tiny.UntriedError:
        return True  # can't be tested; the first step will show a fault
