"""Reads the configuration of a language model from a job's keys or a folder; errors name the key, in one line."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from heliostat.config.fields import divisors
from heliostat.errors import ConfigError
from heliostat.recipes import exported, pretrained
from heliostat.recipes.text import expert_keys, initial, overrides
from heliostat.schema import nearest
from heliostat.text import brief


class ModelKind(NamedTuple):
    """Describes a kind of model: its name for people, the architectures of transformers that are one, and some of them."""

    name: str
    archs: tuple[str, ...]
    examples: str


CAUSAL_LM = ModelKind("causal language model", tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "llama, gpt2, qwen3")


def from_keys(model: dict[str, Any], wanted: ModelKind = CAUSAL_LM) -> Any:
    keys = {k: v for k, v in model.items() if k not in ("arch", initial.KEY, *expert_keys.KEYS)}
    arch = str(model.get("arch"))
    if arch not in wanted.archs:
        near = nearest(arch, list(wanted.archs)) or f"; for example: {wanted.examples}"
        raise ConfigError(f"model.arch: {arch!r} is no {wanted.name} of transformers{near}")
    kind = transformers.CONFIG_MAPPING[arch]
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
                raise ConfigError(f"model.{size}: {getattr(config, size)} must be at least 1")
        heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    except ConfigError:
        raise
    except Exception as e:  # transformers raises its own errors for values; the last line is the one that says what is wrong
        raise ConfigError(f"model: {brief((str(e).splitlines() or [type(e).__name__])[-1])}") from e
    if heads and groups and heads % groups:
        raise ConfigError(
            f"model.num_key_value_heads: {groups} does not divide num_attention_heads {heads}; {_divisor(heads, groups)}"
        )
    return config


def _reads_head_dim(arch: str) -> bool:
    """Tells whether an architecture's code takes the width of heads from the configuration, whose class may not list it."""
    module = importlib.import_module(f"transformers.models.{arch}.modeling_{arch}")
    return 'getattr(config, "head_dim"' in inspect.getsource(module)


def _check_activation(name: str) -> None:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(f"model.hidden_act: {name!r} is no activation{nearest(name, list(ACT2FN))}")


def _check_heads(kind: Any, keys: dict[str, Any]) -> None:
    """Raises ConfigError if the heads must divide the width and do not; a head size of its own, or an architecture whose defaults
    break the rule, lifts it."""
    field, default = kind.__dataclass_fields__.get("head_dim"), kind()
    if "head_dim" in keys or isinstance(getattr(field, "default", None), int):
        return
    usual: list[Any] = [getattr(default, name, None) for name in ("hidden_size", "num_attention_heads")]
    names = [(name, kind.attribute_map.get(name, name)) for name in ("hidden_size", "num_attention_heads")]
    width, heads = [next((keys[n] for n in both if n in keys), u) for both, u in zip(names, usual, strict=True)]
    if all(type(n) is int and n > 0 for n in (*usual, width, heads)) and usual[0] % usual[1] == 0 and width % heads:
        raise ConfigError(f"model.{names[1][1]}: {heads} does not divide {names[0][1]} {width}; {_divisor(width, heads)}")


def _divisor(number: int, near: int) -> str:
    return f"nearest that does: {min(divisors(number), key=lambda d: abs(d - near))}"


ROUTER = "output_router_logits"  # which a job may give beside `pretrained`, as `expert_keys`: it is of the training


def changed(model: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys that change the configuration of a pretrained model."""
    return {key: value for key, value in model.items() if key not in ("pretrained", ROUTER, *expert_keys.KEYS)}


def from_folder(model: dict[str, Any]) -> Any:
    """Reads the configuration in a folder, and changes it by the job's keys; ConfigError if there is none, or they do not fit."""
    return _routing(overrides.applied(read(model), changed(model)), model)


def read(model: dict[str, Any], wanted: ModelKind = CAUSAL_LM) -> Any:
    """Reads the configuration in the folder of a pretrained model, as it is there."""
    folder = Path(model["pretrained"])
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.pretrained: {str(folder)!r} is not a model folder (no config.json)")
    with exported.using(folder):
        config = pretrained.from_folder("model.pretrained", transformers.AutoConfig, folder)
    if config.model_type not in wanted.archs:
        raise ConfigError(f"model.pretrained: {str(folder)!r} holds a {config.model_type!r}, which is no {wanted.name}")
    return config


def _routing(config: Any, model: dict[str, Any]) -> Any:
    if ROUTER in model:
        inner = config.get_text_config(decoder=True)
        if not hasattr(inner, ROUTER):
            raise ConfigError(
                f"model.{ROUTER}: {model['pretrained']!r} holds a {config.model_type!r}, which has no router; remove this key"
            )
        setattr(inner, ROUTER, bool(model[ROUTER]))
    return config
