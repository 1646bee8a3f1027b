"""Reads the configuration of a language model from a job's keys or from a folder. Errors name the wrong key, in one line."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from pydantic import Field, ValidationError, model_validator
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from heliostat.config.fields import Count, divisors
from heliostat.errors import ConfigError
from heliostat.recipes import adapters, exported, precision, pretrained
from heliostat.recipes.text import expert_keys, initial
from heliostat.schema import Float, Strict, explain, nearest
from heliostat.text import brief


class ModelKind(NamedTuple):
    """Describes a kind of model: its name for people, its architectures in transformers, and some examples."""

    name: str
    archs: tuple[str, ...]
    examples: str


KEY = re.compile(r"Validation error for field '(\w+)'")  # beginning of huggingface_hub's errors about values
WRONG_TYPE = re.compile(r"^\s*TypeError: (Field '\w+' )?")
CAUSAL_LM = ModelKind("causal language model", tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "llama, gpt2, qwen3")


def from_keys(model: Mapping[str, Any], wanted: ModelKind = CAUSAL_LM) -> PreTrainedConfig:
    keys = {k: v for k, v in model.items() if k not in ("arch", initial.KEY, *expert_keys.KEYS)}
    arch = str(model.get("arch"))
    if arch not in wanted.archs:
        near = nearest(arch, list(wanted.archs)) or f". Use, for example, {wanted.examples}"
        raise ConfigError(f"model.arch: {arch!r} isn't a {wanted.name} of transformers{near}")
    kind: type[PreTrainedConfig] = transformers.CONFIG_MAPPING[arch]
    act = keys.get("hidden_act", keys.get("activation_function"))
    if isinstance(act, str):
        _check_activation(act)
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    for key in keys:
        if key not in known and not (key == "head_dim" and _reads_head_dim(arch)):
            near = nearest(key, sorted(known))
            raise ConfigError(f"model.{key}: unknown key for arch {arch!r}{near}")
    try:
        _check_heads(kind, keys)
        config = kind(**keys)
        for size in ("hidden_size", "num_hidden_layers"):
            if getattr(config, size, 1) < 1:
                raise ConfigError(f"model.{size}: expected at least 1, got {getattr(config, size)}")
        heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    except ConfigError:
        raise
    except Exception as e:  # transformers raises its own errors for values
        raise _bad_value(e) from e
    if heads and groups and heads % groups:
        raise ConfigError(
            f"model.num_key_value_heads: {groups} doesn't divide num_attention_heads {heads}. {_divisor(heads, groups)}"
        )
    return config


def _reads_head_dim(arch: str) -> bool:
    """Checks whether an architecture reads the head width from the configuration, even if the configuration class doesn't list
    this key."""
    module = importlib.import_module(f"transformers.models.{arch}.modeling_{arch}")
    return 'getattr(config, "head_dim"' in inspect.getsource(module)


def _check_activation(name: str) -> None:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(f"model.hidden_act: {name!r} isn't an activation{nearest(name, list(ACT2FN))}")


def _check_heads(kind: type[PreTrainedConfig], keys: Mapping[str, Any]) -> None:
    """Raises ConfigError if the number of heads must divide the width, but doesn't.

    The heads needn't divide the width if the job sets the head size, or if the architecture's own defaults break this rule.
    """
    field, default = kind.__dataclass_fields__.get("head_dim"), kind()
    if "head_dim" in keys or isinstance(getattr(field, "default", None), int):
        return
    usual: list[Any] = [getattr(default, name, None) for name in ("hidden_size", "num_attention_heads")]
    names = [(name, kind.attribute_map.get(name, name)) for name in ("hidden_size", "num_attention_heads")]
    width, heads = [next((keys[n] for n in both if n in keys), u) for both, u in zip(names, usual, strict=True)]
    if all(type(n) is int and n > 0 for n in (*usual, width, heads)) and usual[0] % usual[1] == 0 and width % heads:
        raise ConfigError(f"model.{names[1][1]}: {heads} doesn't divide {names[0][1]} {width}. {_divisor(width, heads)}")


def _divisor(number: int, near: int) -> str:
    return f"Nearest divisor: {min(divisors(number), key=lambda d: abs(d - near))}"


ROUTER = "output_router_logits"  # allowed in addition to `pretrained`, like `expert_keys`: a setting of the training


def changed(model: Mapping[str, object], *apart: str) -> dict[str, object]:
    """Returns the keys that change the configuration of a pretrained model. `apart`: keys of the recipe itself."""
    return {key: value for key, value in model.items() if key not in ("pretrained", ROUTER, *apart, *expert_keys.KEYS)}


def from_folder(model: Mapping[str, object]) -> PreTrainedConfig:
    """Reads the configuration in a folder, and applies the job's keys. Raises ConfigError if the folder has no configuration, or
    if the keys don't fit this configuration."""
    return _routing(applied(read(model), changed(model, adapters.KEY)), model)


def exported_config(config: PreTrainedConfig, model: str, weights: str) -> PreTrainedConfig:
    """Returns a copy of a configuration for an export: with the name of the model's class, and the type of the weights.
    `weights`: their precision."""
    copied = type(config).from_dict(config.to_dict())
    copied.architectures, copied.dtype = [model], precision.dtype_of(weights)
    return copied


def read(model: Mapping[str, object], wanted: ModelKind = CAUSAL_LM) -> PreTrainedConfig:
    """Reads the configuration in the folder of a pretrained model, unchanged."""
    folder = Path(str(model["pretrained"]))
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.pretrained: {str(folder)!r} {pretrained.no_model(folder)}")
    with exported.using(folder):
        config = pretrained.from_folder("model.pretrained", transformers.AutoConfig, folder)
    if config.model_type not in wanted.archs:
        raise ConfigError(f"model.pretrained: {str(folder)!r} contains a {config.model_type!r}, which isn't a {wanted.name}")
    return config


def _routing(config: PreTrainedConfig, model: Mapping[str, object]) -> PreTrainedConfig:
    if ROUTER in model:
        inner = config.get_text_config(decoder=True)
        if not hasattr(inner, ROUTER):
            raise ConfigError(
                f"model.{ROUTER}: {model['pretrained']!r} contains a {config.model_type!r}, which has no router. Remove this key"
            )
        setattr(inner, ROUTER, bool(model[ROUTER]))
    return config


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
            raise ValueError(f"{key}: not supported for rope_type {self.rope_type!r}. Remove this key")
        for key in OWN["llama3"][1:] if self.rope_type == "llama3" else ():
            if getattr(self, key) is None:
                raise ValueError(f"{key}: required for rope_type 'llama3' (Llama 3.1 uses low_freq_factor 1, high_freq_factor 4)")
        return self


def applied(config: PreTrainedConfig, keys: Mapping[str, object]) -> PreTrainedConfig:
    """Returns a configuration with a job's keys applied. Raises ConfigError for an unknown key, or an invalid value."""
    if not keys:
        return config
    inner = config.get_text_config(decoder=True)
    changes = _changes(inner, {k: v for k, v in keys.items() if k != SCALING})
    if SCALING in keys:
        changes |= _extended(inner, keys[SCALING], changes)
    whole = config.to_dict()
    part = whole if inner is config else next(whole[name] for name in whole if getattr(config, name, None) is inner)
    part.update(changes)
    try:
        return type(config).from_dict(whole)
    except Exception as e:  # transformers raises its own errors for values
        raise _bad_value(e) from e


def _bad_value(error: Exception) -> ConfigError:
    """Returns an error that names the key whose value transformers rejects.

    The last line of transformers' error names the problem. For a wrong type, the first line names the key.
    """
    lines = str(error).splitlines() or [type(error).__name__]
    key = KEY.match(lines[0])
    return ConfigError(f"model.{key[1]}: {brief(WRONG_TYPE.sub('', lines[-1]))}" if key else f"model: {brief(lines[-1])}")


def _changes(config: PreTrainedConfig, keys: Mapping[str, object]) -> dict[str, object]:
    known = {*type(config).__dataclass_fields__, *config.attribute_map}
    for key in keys:
        if key not in known:
            near = nearest(key, sorted({*known, SCALING}))
            raise ConfigError(f"model.{key}: unknown key for the pretrained {config.model_type!r}{near or '. Remove this key'}")
    return {config.attribute_map.get(key, key): value for key, value in keys.items()}


def _extended(config: PreTrainedConfig, rope: object, changes: Mapping[str, object]) -> dict[str, object]:
    """Returns the keys that scale a configuration's rotary embeddings. These keys include the resulting maximum sample length,
    unless the job sets this length."""
    try:
        scaling = RopeScaling.model_validate(rope)
    except ValidationError as e:
        raise ConfigError("\n  ".join(explain(e, RopeScaling, f"model.{SCALING}"))) from e
    old = getattr(config, "rope_parameters", None)
    if not old:
        raise ConfigError(f"model.{SCALING}: {config.model_type!r} has no rotary embeddings. Remove this key")
    if any(isinstance(value, dict) for value in old.values()):
        raise ConfigError(
            f"model.{SCALING}: {config.model_type!r} has several kinds of rotary embeddings. Set all of model.rope_parameters"
        )
    if "rope_parameters" in changes:
        raise ConfigError(f"model.{SCALING}: model.rope_parameters is set too. Remove one of these two keys")
    before = scaling.original_max_position_embeddings or old.get("original_max_position_embeddings")
    before = before or config.max_position_embeddings
    new = {k: old[k] for k in ("rope_theta", "partial_rotary_factor") if k in old} | scaling.model_dump(exclude_none=True)
    if "original_max_position_embeddings" in OWN[scaling.rope_type]:
        new["original_max_position_embeddings"] = before
    longest = changes.get("max_position_embeddings", int(before * scaling.factor))
    return {"rope_parameters": new, "max_position_embeddings": longest}


def require_same_weights(
    config: PreTrainedConfig, keys: Mapping[str, object], build: Callable[[PreTrainedConfig], torch.nn.Module]
) -> None:
    """Raises ConfigError if a key of the job changes the shapes of the pretrained weights. The error names the key.
    `build(config)` returns a model."""
    own = _shapes(build(config))
    if not keys or own == _shapes(build(applied(config, keys))):
        return
    for key in keys:
        other = _shapes(build(applied(config, {key: keys[key]})))
        if differ := sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name)):
            name = differ[0]
            raise ConfigError(
                f"model.{key}: {brief(keys[key])} doesn't fit the pretrained weights: {name!r} has size "
                f"{_size(own.get(name))}, and with this key {_size(other.get(name))}. Remove this key"
            )
    raise ConfigError(f"model: {', '.join(keys)} together don't fit the pretrained weights. Remove one of these keys")


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _size(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else " x ".join(map(str, shape))
