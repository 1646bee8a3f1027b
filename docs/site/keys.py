"""Writes the reference of a YAML schema's keys from its pydantic models: type, range and default from the model, the meaning from
the attribute docstring below each field (read from the source, so that importing the models costs nothing for it).
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin

from heliostat.config.fields import Filled
from heliostat.curation import registry
from pydantic import BaseModel, ByteSize
from pydantic_core import PydanticUndefined

PATTERN_WORDS = {r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$": "a name of letters, digits, `.`, `_` and `-`, up to 100 characters"}


@lru_cache(maxsize=64)
def _source(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Reads the meaning of each field of the model, and of the models it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not (issubclass(cls, BaseModel) and cls is not BaseModel):
            continue
        tree = _source(inspect.getsourcefile(cls) or "")
        body = next(n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    for name, info in model.model_fields.items():
        if info.description:
            found[name] = info.description
    return {name: found.get(name, "") for name in model.model_fields}


@dataclass(frozen=True)
class Section:
    """Describes a mapping's keys: the path that leads there (`data.sources[]`), and which of several it is (`adamw`), if any."""

    path: str
    model: type[BaseModel]
    variant: str = ""

    @property
    def anchor(self) -> str:
        return anchor(self.path) + (f"-{self.variant}" if self.variant else "")

    def key_anchor(self, key: str) -> str:
        return anchor(f"{self.path}.{key}".lstrip(".")) + (f"-{self.variant}" if self.variant else "")


def sections(model: type[BaseModel], at: str = "", variant: str = "") -> list[Section]:
    """Lists the model and all that its fields hold, in the file's order; of several in one place, the first has no variant."""
    found = [Section(at, model, variant)]
    for name, info in model.model_fields.items():
        held = _held(info.annotation)
        for inner, suffix in held:
            path = f"{at}.{info.alias or name}{suffix}".lstrip(".")
            found += sections(inner, path, _name_of(inner) if inner is not held[0][0] else "")
    return found


def _name_of(model: type[BaseModel]) -> str:
    """Returns what distinguishes one of several models: the value of its field `name`."""
    return str(model.model_fields["name"].default) if "name" in model.model_fields else model.__name__.lower()


def _held(annotation: Any, suffix: str = "") -> list[tuple[type[BaseModel], str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, suffix)]
    origin = get_origin(annotation)
    below = "[]" if origin is list else ".KEY" if origin is dict else suffix
    return [pair for argument in get_args(annotation) for pair in _held(argument, below)]


def reference(model: type[BaseModel], at: str = "") -> str:
    """Writes the whole schema as Markdown, below a heading of level 2: a section for each mapping, an entry for each key.

    `at`: the key that holds the model's own.
    """
    found = sections(model, at)
    several = {s.path for s in found if s.variant}
    return "\n".join(line for s in found for line in _written(s, s is not found[0], s.path in several))


def _written(section: Section, headed: bool, one_of_several: bool) -> list[str]:
    schema, told, lines = section.model.model_json_schema(by_alias=True), descriptions(section.model), []
    if headed:
        which = f", `name: {_name_of(section.model)}`" if one_of_several else ""
        lines = [f"### `{section.path}`{which} {{ #{section.anchor} }}", ""]
    if one_of_several:
        lines += [" ".join((section.model.__doc__ or "").split()), ""]
    for name, info in section.model.model_fields.items():
        key = info.alias or name
        path = f"{section.path}.{key}".lstrip(".")
        mark = "" if _held(info.annotation) else f"{{ #{section.key_anchor(key)} }}"  # else the section of its keys has it
        kind = "bytes, as `512MiB`" if info.annotation is ByteSize else words(schema["properties"][key], path)
        lines += [f"`{key}`{mark} <small>{kind}; {_default(info)}</small>", f":   {linked(told[name])}", ""]
    return lines


def stages() -> str:
    """Writes the reference of all stages of pipelines as Markdown: what each does, its keys, and its reasons to drop."""
    lines = list[str]()
    for name in registry.names():
        cls = registry.find(name)
        about = (sys.modules[cls.__module__].__doc__ or "").partition("\n\n")[0]
        extra = f" Needs `pip install 'heliostat[{cls.needs[0]}]'`." if cls.needs else ""
        lines += [f"## `{name}`", "", " ".join(about.split()) + extra, "", *_written(Section(name, cls), False, False)]
    return "\n".join(lines)


def anchor(path: str) -> str:
    """Returns the anchor of a key on the page of its schema: its path."""
    return path.replace("[]", "")


def _default(info: Any) -> str:
    if rule := next((mark.rule for mark in info.metadata if isinstance(mark, Filled)), ""):
        return f"default {rule}"
    if info.default is PydanticUndefined and info.default_factory is None:
        return "**required**"
    value = info.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel) or value in ({}, []):
        return "optional"
    if isinstance(value, bool):
        return f"default `{str(value).lower()}`"
    if isinstance(value, int) and value >= 1 << 20 and value & (value - 1) == 0:
        return f"default {value >> 30} GiB" if value >= 1 << 30 else f"default {value >> 20} MiB"
    return "default empty" if value == "" else f"default `{value}`"


def words(schema: dict[str, Any], path: str = "") -> str:
    """Describes in words what a JSON schema allows; `path` leads to the section of the keys that it holds."""
    if several := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(words(s, path) for s in several if s.get("type") != "null"))
    if "$ref" in schema:
        return f"[its keys](#{anchor(path)})"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _range("whole number" if kind == "integer" else "number", schema)
    if kind == "string":
        return PATTERN_WORDS.get(schema.get("pattern", ""), "text")
    if kind == "boolean":
        return "`true` or `false`"
    if kind == "array":
        inner, count = schema.get("items", {}), schema.get("minItems")
        return f"list of {f'{count} ' if count == schema.get('maxItems') and count else ''}{plural(words(inner, path))}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"mapping to {words(inner, f'{path}.KEY')}" if isinstance(inner, dict) and inner else "mapping"
    return "any value"


def plural(text: str) -> str:
    """Puts the first noun of a type in the plural: `number, at least 0` is `numbers, at least 0`."""
    return re.sub(r"^(whole number|number|any value)\b", r"\1s", text).replace("[its keys]", "[keys]")


def _range(kind: str, schema: dict[str, Any]) -> str:
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    least, most = schema.get("minimum"), schema.get("maximum")
    if kind == "whole number" and above is not None:
        least, above = above + 1, None
    said = [f"at least {_number(least)}"] if least is not None else [f"above {_number(above)}"] if above is not None else []
    said += [f"at most {_number(most)}"] if most is not None else [f"below {_number(below)}"] if below is not None else []
    return f"{kind}, {' and '.join(said)}" if said else kind


def _number(value: float) -> str:
    return next((f"2^{n}" for n in range(20, 65) if value == 2**n), f"{value:,g}")


def linked(text: str) -> str:
    """Makes links of the pages that a description names (`docs/checkpoints.md#what-is-kept`), by their repository path."""

    def link(found: re.Match[str]) -> str:
        page, mark = found[1], found[2] or ""
        return f"[{(mark[1:] or page.rpartition('/')[2]).replace('-', ' ')}](docs/{page}.md{mark})"

    return re.sub(r"docs/([\w/-]+)\.md(#[\w-]+)?", link, text)
