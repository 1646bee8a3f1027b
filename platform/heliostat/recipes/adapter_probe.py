"""Tests the adapter of a job (`recipes.adapters`) on a model without memory, before the run begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from heliostat.errors import ConfigError
from heliostat.recipes import adapters, quantized
from heliostat.recipes.adapters import KEY, Adapter
from heliostat.text import brief

SHOWN = 8  # layers in a warning

log = logging.getLogger(__name__)


def require(
    adapter: Adapter, make: Callable[[], torch.nn.Module], run: Callable[[torch.nn.Module], torch.Tensor], stage: int
) -> None:
    """Tests an adapter on a model without memory, before the run begins. `make`: builds the base. `run`: computes outputs of a
    model. `stage`: the ZeRO stage.

    Logs the linear layers without an adapter, those whose adapter isn't trained, and those that aren't in 4 bits. Raises
    ConfigError if `targets` names other layers, if peft can't add the adapter, or if the base is in 4 bits at ZeRO stage 3, which
    shards only floating-point weights.
    """
    if adapter.base and stage > 2:
        raise ConfigError(
            f"train.zero.stage: {stage} isn't supported with model.{KEY}.base {adapter.base!r}, because ZeRO-3 can't shard 4-bit "
            f"weights. Set it to 2, or remove model.{KEY}.base"
        )
    with torch.device("meta"):
        model = make()
        linear = dict(adapters.every_linear(model))
        if adapter.targets == adapters.ALL:
            left = {name: f"of class {type(m).__name__}" for name, m in linear.items() if not adapters.adaptable(m)}
            _warn("targets", "have no adapter", left, len(linear))
        if adapter.base:
            kept = {name: why for name, m in linear.items() if (why := quantized.reason_kept(m))}
            _warn("base", "stay in the precision of training", kept, len(linear))
        adapters.add(adapter, model, 0, "fp32")
        trained = {name: layer.lora_B[adapters.NAME].weight for name, layer in adapters.adapted(model)}
        try:
            outputs = run(model)
            if outputs.requires_grad:  # else no layer with an adapter is called
                outputs.sum().backward()
        except Exception as e:  # noqa: BLE001  a model can raise anything without values
            log.warning("model.%s: can't check whether the model calls all layers with an adapter (%s)", KEY, brief(e))
            return
    idle = {name: "the model doesn't call this layer" for name, weight in trained.items() if weight.grad is None}
    if len(idle) == len(trained):
        raise ConfigError(f"model.{KEY}.targets: the model calls none of these layers ({next(iter(idle))}). Name other layers")
    _warn("targets", "have an adapter that isn't trained", idle, len(linear))


def _warn(key: str, what: str, layers: Mapping[str, str], total: int) -> None:
    """Logs linear layers, each with the reason, if there are any."""
    if layers:
        shown = ", ".join(f"{name} ({why})" for name, why in [*layers.items()][:SHOWN])
        more = f", and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
        log.warning("model.%s.%s: %d of %d linear layers %s: %s%s", KEY, key, len(layers), total, what, shown, more)
