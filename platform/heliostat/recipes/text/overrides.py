"""Changes the configuration of a pretrained model by a job's keys: any key of its architecture that leaves the weights' shapes as
they are, and `rope_scaling`, which extends its rotary positions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator

from heliostat.config.fields import Count
from heliostat.errors import ConfigError
from heliostat.schema import Float, Strict, explain, nearest
from heliostat.text import brief

SCALING = "rope_scaling"
OWN = {"linear": (), "yarn": ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
       "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")}  # fmt: skip
COMMON = ("rope_type", "factor", "rope_theta")


class RopeScaling(Strict):
    rope_type: Literal["linear", "yarn", "llama3"]
    factor: Float = Field(ge=1)
    rope_theta: Float | None = Field(None, gt=0)
    original_max_position_embeddings: Count | None = None
    attention_factor: Float | None = Field(None, gt=0)
    beta_fast: Float | None = Field(None, gt=0)
    beta_slow: Float | None = Field(None, gt=0)
    truncate: bool | None = None
    low_freq_factor: Float | None = Field(None, gt=0)
    high_freq_factor: Float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> RopeScaling:
        for key in sorted(self.model_fields_set - {*COMMON, *OWN[self.rope_type]}):
            raise ValueError(f"{key} is not of rope_type {self.rope_type!r}; remove it")
        for key in OWN["llama3"][1:] if self.rope_type == "llama3" else ():
            if getattr(self, key) is None:
                raise ValueError(f"{key} is required by rope_type 'llama3' (Llama 3.1 has low_freq_factor 1, high_freq_factor 4)")
        return self


def applied(config: Any, given: dict[str, Any]) -> Any:
    """Returns a configuration with a job's keys in place of its own; ConfigError for a key that it does not have, or a value."""
    if not given:
        return config
    inner = config.get_text_config(decoder=True)
    changes = _changes(inner, {k: v for k, v in given.items() if k != SCALING})
    if SCALING in given:
        changes |= _extended(inner, given[SCALING], changes)
    whole: dict[str, Any] = config.to_dict()
    part = whole if inner is config else next(whole[name] for name in whole if getattr(config, name, None) is inner)
    part.update(changes)
    try:
        return type(config).from_dict(whole)
    except Exception as e:  # transformers raises its own errors for values; the last line is the one that says what is wrong
        raise ConfigError(f"model: {brief((str(e).splitlines() or [type(e).__name__])[-1])}") from e


def _changes(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    known = {*type(config).__dataclass_fields__, *config.attribute_map}
    for key in given:
        if key not in known:
            near = nearest(key, sorted({*known, SCALING}))
            raise ConfigError(f"model.{key}: unknown key for the pretrained {config.model_type!r}{near}")
    return {config.attribute_map.get(key, key): value for key, value in given.items()}


def _extended(config: Any, given: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys that scale a configuration's rotary positions, and the longest sample that follows unless it is given."""
    try:
        scaling = RopeScaling.model_validate(given)
    except ValidationError as e:
        raise ConfigError("\n  ".join(explain(e, RopeScaling, f"model.{SCALING}"))) from e
    old = getattr(config, "rope_parameters", None)
    if not old:
        raise ConfigError(f"model.{SCALING}: {config.model_type!r} has no rotary positions; remove this key")
    if any(isinstance(value, dict) for value in old.values()):
        raise ConfigError(
            f"model.{SCALING}: {config.model_type!r} has rotary positions of several kinds; give all of model.rope_parameters"
        )
    if "rope_parameters" in changes:
        raise ConfigError(f"model.{SCALING}: model.rope_parameters is given, too; remove one of them")
    before = scaling.original_max_position_embeddings or old.get("original_max_position_embeddings")
    before = before or config.max_position_embeddings
    new = {k: old[k] for k in ("rope_theta", "partial_rotary_factor") if k in old} | scaling.model_dump(exclude_none=True)
    if "original_max_position_embeddings" in OWN[scaling.rope_type]:
        new["original_max_position_embeddings"] = before
    longest = changes.get("max_position_embeddings", int(before * scaling.factor))
    return {"rope_parameters": new, "max_position_embeddings": longest}


def require_same_weights(config: Any, given: dict[str, Any], build: Any) -> None:
    """Raises ConfigError, by the key, if a job's keys change which weights the pretrained model has. `build(config)`: a model."""
    own = _shapes(build(config))
    if not given or own == _shapes(build(applied(config, given))):
        return
    for key in given:
        other = _shapes(build(applied(config, {key: given[key]})))
        if differ := sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name)):
            name = differ[0]
            raise ConfigError(
                f"model.{key}: {brief(given[key])} does not fit the pretrained weights, whose {name!r} is "
                f"{_size(own.get(name))} and would be {_size(other.get(name))}; remove this key"
            )
    raise ConfigError(f"model: {', '.join(given)} together do not fit the pretrained weights; remove one of them")


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _size(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else " x ".join(map(str, shape))
