"""Validates YAML against pydantic models. Each error has the key, the value, and the fix.

`Strict` models reject unknown keys and wrong types. `apply` applies `key.path=value` settings. One ConfigError lists all faults.
A renamed key keeps its old name as an alias (`Was`).
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
from heliostat.text import UNKNOWN, brief, plural, value_problem
from heliostat.text import absent as absent
from heliostat.text import listed as listed
from heliostat.text import nearest as nearest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Was:
    """Marks a field with its old key, which files may still use: `rate: Annotated[float, Was("speed")]`."""

    key: str


class Strict(BaseModel):
    """Rejects unknown keys and values of a wrong type. The only conversion is from integers to floats."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants")

    synonyms: ClassVar[dict[str, str]] = {}
    """Advice for unknown keys, mostly keys of other tools. Only the model of a complete file has advice."""

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
        """Reads a field by its old name, because recipes for earlier versions use old names."""
        if new := old_names(type(self)).get(name):
            return getattr(self, new)
        return super().__getattr__(name)  # type: ignore[misc]  # pydantic hides it from type checkers


@cache
def old_names(model: type[BaseModel]) -> dict[str, str]:
    """Maps the old names of a model's keys to the current names."""
    pairs = ((field.alias or name, mark) for name, field in model.model_fields.items() for mark in field.metadata)
    return {mark.key: key for key, mark in pairs if isinstance(mark, Was)}


def renamed(model: type[BaseModel], raw: Any, at: str = "", into: dict[str, str] | None = None) -> Any:
    """Replaces old names of keys in a file's content, unless the file has both names.

    `at`: the path of `raw` in the file, with a final dot. `into`: a mapping that receives an entry (old path -> new path) for
    each replaced key.
    """
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
    """Replaces old names in a path of keys, such as `train.steps`."""
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
    """Converts a string that is a number to this number. YAML 1.1 reads 1e-3, which has no dot, as a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Float = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
SHOWN = 200  # characters of a wrong value
KINDS: dict[object, str] = {str: "TEXT", int: "INTEGER", float: "NUMBER", bool: "true|false"}  # placeholders in a fix
LINES = "Write lines of the form `key: value`"
NODES = 2_000_000  # maximum number of values in a file; a value that an alias repeats counts each time
M = TypeVar("M", bound=BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    """Loads YAML like `safe_load`, but rejects a repeated key. PyYAML would silently keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise ConfigError(f"line {node.start_mark.line + 1}: key {key!r} appears twice. Keep one")
        return super().construct_mapping(node, deep)


BROKEN = (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError)  # the last four: values such as impossible dates


def documents(path: Path) -> list[Any]:
    """Reads the documents of a YAML file, except empty documents. The ConfigError has the file and the line."""
    try:
        with path.open(encoding="utf-8") as f:
            sections = [d for d in yaml.load_all(f, _UniqueKeys) if d is not None]
    except FileNotFoundError as e:
        others = {p.stem: p.name for p in path.parent.glob("*.y*ml")}
        close = difflib.get_close_matches(path.stem, [*others], n=1)  # without suffixes, because all suffixes are the same
        near = f". Did you mean {others[close[0]]!r}?" if close else nearest("", list(others.values()))
        raise ConfigError(f"{path}: no such file{near or '. Check the path'}") from e
    except IsADirectoryError as e:
        raise ConfigError(f"{path}: is a folder. Pass a YAML file in this folder") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: isn't UTF-8 text (byte {e.start}). Use a YAML file") from e
    except OSError as e:
        raise ConfigError(f"{path}: can't read this file ({e.strerror or e}). Check the path and its permissions") from e
    except BROKEN as e:
        raise ConfigError(f"{path}: {e if isinstance(e, ConfigError) else _broken(e)}") from e
    if bounded(sections) > NODES:
        raise ConfigError(
            f"{path}: has more than {NODES:,} values, or a value that contains itself (& and *). Remove some values"
        )
    return sections


def _broken(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "not valid YAML (nested too deeply). Use fewer levels"
    mark = getattr(error, "problem_mark", None)
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    why = getattr(error, "problem", None) or error
    return f"not valid YAML{place} ({brief(' '.join(str(why).split()))}). Correct this line, or quote the value"


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that contains one mapping. Raises ConfigError for any other content."""
    sections = documents(path)
    if len(sections) > 1:
        raise ConfigError(f"{path}: contains {len(sections)} documents. Remove everything from the second `---`")
    if not sections:
        raise ConfigError(f"{path}: is empty. {LINES}")
    if not isinstance(sections[0], dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {_shown(sections[0])}. {LINES}")
    return sections[0]


def bounded(tree: object, seen: tuple[int, ...] = ()) -> int:
    """Counts the values of a tree, and stops above NODES. Returns more than NODES if the tree contains itself or is too deep."""
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
    """Applies each `key.path=value` to a copy of `raw`. A value is YAML, and the key of a list item is its index. `model`: the
    model whose old names of keys are replaced in the paths."""
    raw = _copied(raw)
    for setting in settings:
        path, mark, text = setting.partition("=")
        if not mark or not path:
            raise ConfigError(f"--set {setting!r}: expected KEY=VALUE. Write --set {path or 'KEY'}=VALUE")
        if model and (new := renamed_path(model, path)) != path:
            log_renamed("--set", path, new)
            path = new
        try:
            value = yaml.safe_load(text)
        except BROKEN as e:
            raise ConfigError(f"--set {setting!r}: the value isn't valid YAML. Close the brackets, or quote the value") from e
        *parents, last = path.split(".")
        target: Any = raw
        for depth, key in enumerate(parents, 1):
            if isinstance(target, list):
                target = target[_index(setting, key, target)]
            else:
                if target.get(key) is None:
                    target[key] = {}
                target = target[key]
            if not isinstance(target, dict | list):
                whole = ".".join(parents[:depth])
                raise ConfigError(f"--set {setting!r}: {key!r} is a value, not a mapping of keys. Write {whole}=VALUE")
        if isinstance(target, list):
            target[_index(setting, last, target)] = value
        else:
            target[last] = value
    return raw


def _copied(tree: Any) -> Any:
    """Copies a tree. Each repetition of a part (in YAML, & and *) is a separate copy, so a setting changes only one copy."""
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def _index(setting: str, key: str, items: list[object]) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        fix = f"Use {'0' if len(items) == 1 else f'0 to {len(items) - 1}'}" if items else "Set the whole list"
        raise ConfigError(f"--set {setting!r}: {key!r} isn't an index into a list of {plural(len(items), 'item')}. {fix}")
    return int(key)


def walk(model: type[BaseModel], path: tuple[int | str, ...]) -> tuple[type[BaseModel] | None, list[int | str]]:
    """Returns the model of which the path's last part is a field, and the path as it is in the file.

    Follows nested models, lists, dictionaries, and unions. The returned path has no tags, which pydantic inserts for unions.
    """
    current: object = model
    owner, shown = None, list[int | str]()
    named = False  # whether the next part is a key of a dictionary
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
    """Finds the model in an annotation. For a tagged union, returns all models by tag."""
    if get_origin(annotation) in (Union, types.UnionType, list, dict, Annotated):
        if tagged := {
            m.tag: _inner(a) for a in get_args(annotation) for m in getattr(a, "__metadata__", ()) if isinstance(m, Tag)
        }:
            return tagged
        models = [_inner(a) for a in get_args(annotation)]
        return next((m for m in models if isinstance(m, type) and issubclass(m, BaseModel)), None)
    return annotation


def explain(error: ValidationError, model: type[BaseModel], within: str = "") -> list[str]:
    """Explains each fault in one line: the key's path (inside the key `within`), the problem, and the fix."""
    lines, advice = [], getattr(model, "synonyms", {})
    for fault in error.errors():
        owner, path = walk(model, fault["loc"])
        name = str(path[-1]) if path else ""
        key = brief(".".join(str(p) for p in ((within, *path) if within else path)))
        if fault["type"] == "extra_forbidden":
            known = [field.alias or known for known, field in owner.model_fields.items()] if owner else []
            own = advice.get(name.lower().replace("-", "_"), f"Use {key}")
            fix = f". {own}" if own != f"Use {key}" else nearest(name, known) or ". Remove this key"
            lines.append(f"{key}: unknown key{fix}")
        elif fault["type"] == "missing":
            lines.append(advice.get(f"{key}?") or absent(key, _example(owner, name)))
        elif fault["type"] == "union_tag_invalid":  # the field `name` chooses the model
            names = list(_inner(owner.model_fields[name].annotation)) if owner else []
            lines.append(f"{key}.name: {_shown(fault['input']['name'])} isn't a choice{nearest(fault['ctx']['tag'], names)}")
        elif fault["type"] == "literal_error":
            choices = _literals(owner.model_fields[name].annotation) if owner else []
            same = [c for c in choices if str(c) == str(fault["input"])]  # for example '2' instead of 2
            near = f". Did you mean {same[0]!r}?" if same else nearest(str(fault["input"]), [str(c) for c in choices])
            lines.append(f"{key}: {_shown(fault['input'])} isn't a choice{near}")
        else:
            value, limits = _shown(fault["input"]), fault.get("ctx", {})
            problem = value_problem(fault["type"], fault["msg"], value, limits, key, _example(owner, name))
            lines.append(f"{key}: {problem}" if key else problem)
    return lines


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
    """Raises ConfigError, which begins with the key, if a class doesn't implement all methods that its base class requires."""
    if missing := sorted(getattr(model, "__abstractmethods__", ())):
        raise ConfigError(f"{key}: {model.__module__}:{model.__qualname__} lacks {', '.join(missing)}. Implement these methods")


def validate(model: type[M], raw: object, where: str, context: object = None) -> M:
    """Validates plain data against the model. One ConfigError lists all faults after `where`, one per line."""
    require_whole(model, where)
    try:
        return model.model_validate(raw, context=context)
    except ValidationError as e:
        raise ConfigError(listed(where, explain(e, model))) from e


def validate_key(model: type[M], raw: object, key: str) -> M:
    """Validates the value of a key. One ConfigError has a line for each fault, which begins with the complete key."""
    try:
        return model.model_validate(raw)
    except ValidationError as e:
        raise ConfigError("\n  ".join(explain(e, model, key))) from e


@cache
def log_renamed(where: str, old: str, new: str) -> None:
    """Logs the old name of a key, once per file."""
    log.warning("%s: key %s is now %s. Use the new name", where, old, new)
