"""YAML to validated pydantic models, with errors that name the key, the value and the nearest valid choice.

`Strict` models refuse unknown keys and wrong types. `load` reads a file, applies `key.path=value` settings and returns
the model, or raises one ConfigError that lists everything wrong.
"""

from __future__ import annotations

import difflib
import types
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from heliostat.errors import ConfigError


class Strict(BaseModel):
    """No unknown keys, no silent conversions (except whole numbers to floats)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants")


def _number(value: object) -> object:
    """YAML 1.1 reads 1e-3 (no dot) as a string; a person means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Float = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
M = TypeVar("M", bound=BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    """safe_load that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise ConfigError(f"line {node.start_mark.line + 1}: key {key!r} is given twice; keep one")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; ConfigError otherwise."""
    try:
        with path.open(encoding="utf-8") as f:
            raw = yaml.load(f, _UniqueKeys)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError as e:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise ConfigError(f"{path}: no such file{near}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read ({e})") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values, not {type(raw).__name__}")
    return raw


def apply(raw: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """`raw` with every `key.path=value` applied (values are YAML; list items by index); the input is not changed."""
    raw = yaml.safe_load(yaml.safe_dump(raw))
    for setting in settings:
        path, mark, text = setting.partition("=")
        if not mark or not path:
            raise ConfigError(f"--set {setting!r}: write it as key.path=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"--set {setting!r}: the value is not valid YAML") from e
        *parents, last = path.split(".")
        target: Any = raw
        for key in parents:
            if isinstance(target, list):
                target = target[_index(setting, key, target)]
            else:
                if target.get(key) is None:
                    target[key] = {}
                target = target[key]
            if not isinstance(target, dict | list):
                raise ConfigError(f"--set {setting!r}: {key!r} holds a value, not keys")
        if isinstance(target, list):
            target[_index(setting, last, target)] = value
        else:
            target[last] = value
    return raw


def _index(setting: str, key: str, items: list) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise ConfigError(f"--set {setting!r}: {key!r} is not an index into a list of {len(items)}")
    return int(key)


def nearest(word: str, choices: list[str]) -> str:
    """`; did you mean 'x'?`, or the choices when none is near, or nothing when there are many or none."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(sorted(choices))}" if 0 < len(choices) <= 30 else ""


def _model_at(model: type[BaseModel], path: tuple) -> type[BaseModel] | None:
    """The model whose field the path's last part names, following nested models, lists, dictionaries and unions."""
    current: Any = model
    named = False  # the next part is a key of a dictionary
    for part in path[:-1]:
        if named or isinstance(part, int):
            named = False
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields):
            return None
        annotation = current.model_fields[part].annotation
        current, named = _inner(annotation), get_origin(annotation) is dict
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _inner(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType, list, dict, Annotated):
        models = [_inner(a) for a in get_args(annotation)]
        return next((m for m in models if isinstance(m, type) and issubclass(m, BaseModel)), None)
    return annotation


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per fault: the key's path, what is wrong with which value, and the nearest valid choice."""
    lines = []
    for fault in error.errors():
        path = fault["loc"]
        key = ".".join(str(p) for p in path)
        owner = _model_at(model, path) if path else None
        if fault["type"] == "extra_forbidden":
            known = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
            lines.append(f"{key}: unknown key{nearest(str(path[-1]), known)}")
        elif fault["type"] == "missing":
            lines.append(f"{key}: is required")
        elif fault["type"] == "literal_error":
            choices = _literals(owner.model_fields[str(path[-1])].annotation) if owner else []
            same = [c for c in choices if str(c) == str(fault["input"])]  # '2' where 2 is meant
            near = f"; did you mean {same[0]!r}?" if same else nearest(str(fault["input"]), [str(c) for c in choices])
            lines.append(f"{key}: {fault['input']!r} is not a choice{near}")
        else:
            message, value = fault["msg"], repr(fault["input"])
            if message.startswith("Input should be "):
                need = f"{value} {message.removeprefix('Input ')}"
            else:
                need = message.removeprefix("Value error, ") if fault["type"] == "value_error" else f"{value}: {message}"
            lines.append(f"{key}: {need}" if key else need)
    return lines


def _literals(annotation: Any) -> list[Any]:
    nested = [_literals(a) for a in get_args(annotation) if get_origin(a)]
    return [c for n in nested for c in n] or list(get_args(annotation))


def validate(model: type[M], raw: dict[str, Any], where: str) -> M:
    """The model, or one ConfigError with every fault, each on its own line after `where`."""
    try:
        return model.model_validate(raw)
    except ValidationError as e:
        lines = explain(e, model)
        raise ConfigError(f"{where}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{where}:", *lines])) from e


def load(model: type[M], path: Path, settings: list[str] | None = None) -> M:
    return validate(model, apply(read_yaml(path), settings or []), str(path))
