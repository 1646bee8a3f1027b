"""Validates YAML against pydantic models, with errors that name the key, the value and the nearest valid choice.

`Strict` models refuse unknown keys and wrong types. `load` reads a file, applies `key.path=value` settings and returns the model,
or raises one ConfigError that lists everything wrong. A key that was renamed keeps its old name as an alias (`Was`).
"""

from __future__ import annotations

import difflib
import logging
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Tag, ValidationError, model_validator

from heliostat.errors import ConfigError
from heliostat.text import brief
from heliostat.text import nearest as nearest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Was:
    """Keeps a field's key of earlier versions, which is still read: `rate: Annotated[float, Was("speed")]`."""

    key: str


class Strict(BaseModel):
    """Refuses unknown keys and silent conversions (except of whole numbers to floats)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants")

    synonyms: ClassVar[dict[str, str]] = {}
    """Keys of other tools, and what to write here instead: the model that is a whole file has them."""

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, value: object) -> object:
        old = old_names(cls)
        if not old or not isinstance(value, dict):
            return value
        for key in (key for key in old if key in value and old[key] in value):
            raise ValueError(f"{key} is the old name of {old[key]}, and both are given. Remove {key}")
        return {old.get(key, key): part for key, part in value.items()}

    def __getattr__(self, name: str) -> Any:
        """Reads a field by its old name: recipes of earlier versions name it so."""
        if new := old_names(type(self)).get(name):
            return getattr(self, new)
        return super().__getattr__(name)  # type: ignore[misc]  # pydantic hides it from type checkers


@cache
def old_names(model: type[BaseModel]) -> dict[str, str]:
    """Returns the model's keys by their old names."""
    fields = model.model_fields.items()
    return {mark.key: field.alias or name for name, field in fields for mark in field.metadata if isinstance(mark, Was)}


def renamed(model: type[BaseModel], raw: Any, at: str = "", into: dict[str, str] | None = None) -> Any:
    """Returns what a file holds with old names of keys replaced, unless it has both; `into` gets each new path by the old one."""
    if isinstance(raw, list):
        return [renamed(model, part, f"{at}{i}.", into) for i, part in enumerate(raw)]
    if not isinstance(raw, dict):
        return raw
    old, whole = old_names(model), {}
    for key, part in raw.items():
        new = old[key] if key in old and old[key] not in raw else key
        if new != key and into is not None:
            into[f"{at}{key}"] = f"{at}{new}"
        inner = _below(model, new)
        whole[new] = renamed(inner, part, f"{at}{new}.", into) if inner else part
    return whole


def renamed_path(model: type[BaseModel], path: str) -> str:
    """Returns a path of keys (`train.steps`) with old names replaced."""
    parts, inner = list[str](), model
    for part in path.split("."):
        parts.append(old_names(inner).get(part, part) if inner else part)
        inner = inner if part.isdecimal() else _below(inner, parts[-1])  # type: ignore[assignment]
    return ".".join(parts)


def _below(model: type[BaseModel] | None, key: str) -> type[BaseModel] | None:
    field = next((f for name, f in model.model_fields.items() if key == (f.alias or name)), None) if model else None
    inner = _inner(field.annotation) if field and get_origin(field.annotation) is not dict else None
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _number(value: object) -> object:
    """Converts a string to a number where it is one: YAML 1.1 reads 1e-3 (no dot) as a string; a person means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Float = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
SHOWN = 200  # characters of a wrong value
KINDS: dict[object, str] = {str: "TEXT", int: "INTEGER", float: "NUMBER", bool: "true|false"}  # what stands for a value in a fix
UNKNOWN = "..."  # stands for a value whose kind isn't known
WANTED = {  # what pydantic says of its own classes, in words of YAML
    "dict_type": "a mapping", "model_type": "a mapping", "model_attributes_type": "a mapping", "list_type": "a list",
    "int_type": "an integer", "float_type": "a number", "bool_type": "true or false", "string_type": "text",
}  # fmt: skip
NODES = 2_000_000  # values that a file may hold, those that it repeats by name counted each time
M = TypeVar("M", bound=BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    """Loads YAML as safe_load does, but refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise ConfigError(f"line {node.start_mark.line + 1}: key {key!r} appears twice. Keep one")
        return super().construct_mapping(node, deep)


BROKEN = (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError)  # the last four of values: dates that are none


def documents(path: Path) -> list[Any]:
    """Reads the documents of a YAML file, empty ones left out; ConfigError that names the file and the line."""
    try:
        with path.open(encoding="utf-8") as f:
            sections = [d for d in yaml.load_all(f, _UniqueKeys) if d is not None]
    except FileNotFoundError as e:
        others = {p.stem: p.name for p in path.parent.glob("*.y*ml")}
        close = difflib.get_close_matches(path.stem, [*others], n=1)  # without their endings, by which all files are the same
        near = f"; did you mean {others[close[0]]!r}?" if close else nearest("", list(others.values()))
        raise ConfigError(f"{path}: no such file{near}") from e
    except IsADirectoryError as e:
        raise ConfigError(f"{path}: is a folder. Name a YAML file in it") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: can't read it ({e})") from e
    except BROKEN as e:
        why = "it is nested too deeply" if isinstance(e, RecursionError) else brief(" ".join(str(e).split()))
        fault = str(e) if isinstance(e, ConfigError) else f"not valid YAML: {why}"
        raise ConfigError(f"{path}: {fault}") from e
    if bounded(sections) > NODES:
        raise ConfigError(f"{path}: has more than {NODES:,} values, or repeats itself (with & and *) without end")
    return sections


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping; ConfigError if it holds anything else."""
    sections = documents(path)
    if len(sections) > 1:
        raise ConfigError(f"{path}: contains {len(sections)} documents. Remove everything from the second `---`")
    if not sections:
        raise ConfigError(f"{path}: is empty. Write a mapping of keys to values")
    if not isinstance(sections[0], dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(sections[0]).__name__}")
    return sections[0]


def bounded(tree: object, seen: tuple[int, ...] = ()) -> int:
    """Counts the values of a tree, up to a little more than NODES; one that holds itself, or is nested too deep, has more."""
    if not isinstance(tree, dict | list):
        return 1
    if id(tree) in seen or len(seen) > 100:
        return NODES + 1
    count = 1
    for value in tree.values() if isinstance(tree, dict) else tree:
        count += bounded(value, (*seen, id(tree)))
        if count > NODES:
            break
    return count


def apply(raw: dict[str, Any], settings: list[str], model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Applies every `key.path=value` to a copy of `raw` (values are YAML; list items by index). `model`: replaces old names."""
    raw = _copied(raw)
    for setting in settings:
        path, mark, text = setting.partition("=")
        if not mark or not path:
            raise ConfigError(f"--set {setting!r}: expected key.path=value")
        if model and (new := renamed_path(model, path)) != path:
            _say_renamed("--set", path, new)
            path = new
        try:
            value = yaml.safe_load(text)
        except BROKEN as e:
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
                raise ConfigError(f"--set {setting!r}: {key!r} is a value, not a mapping of keys")
        if isinstance(target, list):
            target[_index(setting, last, target)] = value
        else:
            target[last] = value
    return raw


def _copied(tree: Any) -> Any:
    """Copies a tree, with a copy of its own wherever it names one part twice (with & and *), so that a change is of one place."""
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def _index(setting: str, key: str, items: list[object]) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise ConfigError(f"--set {setting!r}: {key!r} isn't an index into a list of {len(items)}")
    return int(key)


def walk(model: type[BaseModel], path: tuple[int | str, ...]) -> tuple[type[BaseModel] | None, list[int | str]]:
    """Finds the model whose field the path's last part names, following nested models, lists, dictionaries and unions; and the
    path as the file has it, without the tags of union members that pydantic puts between."""
    current: object = model
    owner, shown = None, list[int | str]()
    named = False  # the next part is a key of a dictionary
    for part in path:
        if isinstance(current, dict):
            current = current.get(part)
            continue
        owner = current if isinstance(current, type) and issubclass(current, BaseModel) else None
        shown.append(part)
        if named or isinstance(part, int):
            named = False
            continue
        annotation = owner.model_fields[part].annotation if owner and part in owner.model_fields else None
        current, named = _inner(annotation), get_origin(annotation) is dict
    return owner, shown


def _inner(annotation: object) -> Any:
    """Finds the model in an annotation; of a union with tags, all models by tag."""
    if get_origin(annotation) in (Union, types.UnionType, list, dict, Annotated):
        if tagged := {
            m.tag: _inner(a) for a in get_args(annotation) for m in getattr(a, "__metadata__", ()) if isinstance(m, Tag)
        }:
            return tagged
        models = [_inner(a) for a in get_args(annotation)]
        return next((m for m in models if isinstance(m, type) and issubclass(m, BaseModel)), None)
    return annotation


def explain(error: ValidationError, model: type[BaseModel], within: str = "") -> list[str]:
    """Explains each fault in one line: the key's path (below the key `within`), what is wrong, and the nearest valid choice."""
    lines, advice = [], getattr(model, "synonyms", {})
    for fault in error.errors():
        owner, path = walk(model, fault["loc"])
        key = brief(".".join(str(p) for p in ((within, *path) if within else path)))
        if fault["type"] == "extra_forbidden":
            known = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
            own = advice.get(str(path[-1]).lower().replace("-", "_"), "")
            own = "" if own == f"Use {key}" else own
            lines.append(f"{key}: unknown key{f'. {own}' if own else nearest(str(path[-1]), known)}")
        elif fault["type"] == "missing":
            lines.append(advice.get(f"{key}?") or absent(key, _example(owner, str(path[-1]))))
        elif fault["type"] == "union_tag_invalid":  # the name that says which keys there are
            names = list(_inner(owner.model_fields[str(path[-1])].annotation)) if owner else []
            lines.append(f"{key}.name: {_shown(fault['input']['name'])} is not a choice{nearest(fault['ctx']['tag'], names)}")
        elif fault["type"] == "literal_error":
            choices = _literals(owner.model_fields[str(path[-1])].annotation) if owner else []
            same = [c for c in choices if str(c) == str(fault["input"])]  # '2' where 2 is meant
            near = f"; did you mean {same[0]!r}?" if same else nearest(str(fault["input"]), [str(c) for c in choices])
            lines.append(f"{key}: {_shown(fault['input'])} is not a choice{near}")
        else:
            message, value = fault["msg"], _shown(fault["input"])
            if wanted := WANTED.get(fault["type"]):
                example = _example(owner, str(path[-1])) if path else UNKNOWN
                fix = f". Write {key}: {example}" if example != UNKNOWN else ""
                need = f"expected {wanted}, got {value}{fix}"
            elif message.startswith("Input should be "):
                need = f"{value} {message.removeprefix('Input ')}"
            else:
                need = message.removeprefix("Value error, ") if fault["type"] == "value_error" else f"{value}: {message}"
            lines.append(f"{key}: {need}" if key else need)
    return lines


def absent(key: str, example: str = UNKNOWN) -> str:
    """Writes that a key is missing, and how to write it."""
    return f"{key}: required key missing. Write {key}: {example}"


def _example(owner: type[BaseModel] | None, key: str) -> str:
    fields = owner.model_fields if owner else {}
    field = next((f for name, f in fields.items() if key in (name, f.alias)), None)
    return _kind(field.annotation) if field else UNKNOWN


def _kind(annotation: object) -> str:
    if get_origin(annotation) is list:
        return f"[{', '.join(map(_kind, get_args(annotation)))}]"
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if choices := [str(c) for c in get_args(annotation)] if get_origin(annotation) is Literal else []:
        return "|".join(choices)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        needed = [f.alias or name for name, f in annotation.model_fields.items() if f.is_required()]
        shown = needed or [f.alias or name for name, f in annotation.model_fields.items()][:1]
        return f"{{{', '.join(f'{name}: ...' for name in shown)}}}"
    return KINDS.get(annotation, UNKNOWN)


def _shown(value: object) -> str:
    return brief(repr(value if not isinstance(value, str) else value[:SHOWN]), SHOWN)


def _literals(annotation: object) -> list[object]:
    nested = [_literals(a) for a in get_args(annotation) if get_origin(a)]
    return [c for n in nested for c in n] or list(get_args(annotation))


def require_whole(model: type, key: str) -> None:
    """Raises ConfigError that names the key if a class, such as a user's, lacks methods that its base requires."""
    if missing := sorted(getattr(model, "__abstractmethods__", ())):
        raise ConfigError(
            f"{key}: {model.__module__}:{model.__qualname__} lacks {', '.join(missing)}. Implement what its base requires"
        )


def validate(model: type[M], raw: object, where: str, context: object = None) -> M:
    """Validates plain data as the model; one ConfigError with every fault, each on its own line after `where`."""
    require_whole(model, where)
    try:
        return model.model_validate(raw, context=context)
    except ValidationError as e:
        raise ConfigError(listed(where, explain(e, model))) from e


def listed(where: str, lines: list[str]) -> str:
    """Writes faults as one message: in the line of `where`, or below it if there are several."""
    return f"{where}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{where}:", *lines])


def load(model: type[M], kind: str, path: Path, settings: list[str] | None = None) -> M:
    """Reads a file of a kind (`KIND_KEYS`), with settings applied, and validates it; ConfigError if it is clearly of another."""
    return validate(model, read(model, kind, path, settings), str(path))


def read(model: type[BaseModel], kind: str, path: Path, settings: list[str] | None = None) -> dict[str, Any]:
    """Reads a file of a kind in the keys of its model, with settings applied; ConfigError if it is clearly of another kind.

    Old names of keys are replaced, and a line in the log names each, once for a file.
    """
    raw, changes = read_yaml(path), dict[str, str]()
    require_kind(kind, path, raw)
    raw = renamed(model, raw, into=changes)
    for old, new in changes.items():
        _say_renamed(str(path), old, new)
    return apply(raw, settings or [], model)


@cache
def _say_renamed(where: str, old: str, new: str) -> None:
    log.warning("%s: %s is now %s", where, old, new)


# A file is of a kind if it has one of the keys that only this kind has. One for another command gets an error that names that.

KIND_KEYS = {  # in this order: a sweep may be written with keys of a job
    "cluster": ("cluster_name", "provider", "available_node_types", "apiVersion"),
    "pipeline": ("pipeline",),
    "sweep": ("space", "searcher", "scheduler"),
    "job": ("recipe", "train"),
    "suite": ("tasks",),
}
KIND_NAMES = {"cluster": "a cluster file", "pipeline": "a pipeline", "sweep": "a sweep", "job": "a job", "suite": "a suite"}
KIND_COMMANDS = {
    "cluster": "heliostat cluster up {0}`, or name it with `--cluster {0}",
    "pipeline": "heliostat data prepare {0}",
    "sweep": "heliostat sweep run {0}",
    "job": "heliostat train {0}",
    "suite": "heliostat model benchmark MODEL {0}",
}


def kind_of(raw: object) -> str | None:
    """Detects the kind of a file's content; None if its keys do not show it."""
    keys = set(raw) if isinstance(raw, dict) else set()
    return next((kind for kind, own in KIND_KEYS.items() if keys & set(own)), None)


def require_kind(wanted: str, path: Path, raw: object) -> None:
    """Raises ConfigError if the file is clearly of another kind than `wanted`; it names the command that takes it."""
    other = kind_of(raw)
    if other and other != wanted and isinstance(raw, dict) and not raw.keys() & set(KIND_KEYS[wanted]):
        command = KIND_COMMANDS[other].format(path)
        raise ConfigError(f"{path}: is {KIND_NAMES[other]}, not {KIND_NAMES[wanted]}. Use `{command}`")
