"""Writes the JSON Schemas of the YAML files, by which editors complete and check keys: `python -m docs.site.schemas`.

They come from the pydantic models, with descriptions from the attribute docstrings. Cluster files belong to Ray and Kubernetes:
their schema here describes the keys that heliostat reads. The files go to the template of `heliostat init`; `jobs/schemas/` links
to them, and `make docs` publishes them.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, get_args

from heliostat.config.fields import Filled
from heliostat.config.spec import Job
from heliostat.curation import registry
from heliostat.curation.conversations.pipeline import ConversationPipeline, PreferencePipeline
from heliostat.curation.images.pipeline import ImagePipeline
from heliostat.curation.pairs.pipeline import PairPipeline
from heliostat.curation.prepare import Pipeline
from heliostat.curation.references.pipeline import ReferencePipeline
from heliostat.curation.stage import Stage
from heliostat.curation.staged import StagedPipeline
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.schema import old_names
from heliostat.tune.sweep import Sweep
from pydantic import BaseModel

from docs.site import keys

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "platform/heliostat/cli/template/jobs/schemas"
DRAFT = "http://json-schema.org/draft-07/schema#"  # the newest that editors' YAML servers know in full
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
ALSO: dict[str, dict[str, Any]] = {  # what a validator takes in addition to the field's type
    "Workers.gpus": {"const": "auto"},
    "Train.parallel": {"const": "auto"},
}
PIPELINES: dict[str, type[Pipeline]] = {
    "text-pipeline": TextPipeline, "image-pipeline": ImagePipeline, "pairs-pipeline": PairPipeline,
    "conversations-pipeline": ConversationPipeline, "preferences-pipeline": PreferencePipeline,
    "references-pipeline": ReferencePipeline,
}  # fmt: skip


def write() -> None:
    """Writes all schemas, and the links to them."""
    FOLDER.mkdir(exist_ok=True)
    (ROOT / "jobs/schemas").mkdir(exist_ok=True)
    for name, schema in every().items():
        (FOLDER / f"{name}.json").write_text(text(schema), encoding="utf-8")
        link = ROOT / "jobs/schemas" / f"{name}.json"
        if not link.is_symlink():
            link.symlink_to(Path("../..") / FOLDER.relative_to(ROOT) / link.name)


def text(schema: dict[str, Any]) -> str:
    """Writes a schema as the file has it: a line for each key of the file, and for each section."""
    entries = []
    for key, part in schema.items():
        lines = [f"  {_json(name)}: {_json(one)}" for name, one in part.items()] if key in ("properties", "$defs") else []
        entries.append(f" {_json(key)}: " + ("{\n" + ",\n".join(lines) + "\n }" if lines else _json(part)))
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _json(part: object) -> str:
    return json.dumps(part, ensure_ascii=False)


def every() -> dict[str, dict[str, Any]]:
    """Makes the schemas of all kinds of files, by their names."""
    return {
        "job": of(Job, "heliostat job"),
        "sweep": of(Sweep, "heliostat sweep"),
        **{name: pipeline(model, f"heliostat {name.replace('-', ' ')}") for name, model in PIPELINES.items()},
        "cluster": cluster(),
    }


def of(model: type[BaseModel], title: str) -> dict[str, Any]:
    """Makes the schema of a file that a model defines."""
    schema = model.model_json_schema(by_alias=True)
    models = {section.__name__: section for section in _models(model)}
    _complete(schema, model)
    for name, part in schema.get("$defs", {}).items():
        if name in models:
            _complete(part, models[name])
    return {"$schema": DRAFT, **_plain(schema), "title": title}


def pipeline(model: type[Pipeline], title: str) -> dict[str, Any]:
    """Makes the schema of a pipeline's file: the keys of its class, and of all stages if it has stages."""
    schema = of(model, title)
    names = [f"heliostat.pipelines:{model.__name__}", f"{model.__module__}:{model.__name__}"]
    described = "Import path of the pipeline's class."
    schema["properties"] = {
        "pipeline": {"type": "string", "examples": names[:1], "description": described},
        **schema["properties"],
    }
    schema["required"] = ["pipeline", *schema.get("required", [])]
    if not issubclass(model, StagedPipeline):
        return schema
    stages = [_stage(name) for name in registry.names()]
    schema["properties"]["stages"]["items"] = {"type": "object", "required": ["stage"], "anyOf": stages}
    schema.get("$defs", {}).pop("Stage", None)
    for old, key in model.moved.items():
        schema["properties"][old] = {"type": "string", **_deprecated(f"columns.{key}")}
    listed = {"type": "array", "items": {"type": "string"}, "description": "Old way to write columns.others."}
    columns = schema["properties"]["columns"]
    schema["properties"]["columns"] = {"description": columns.pop("description"), "anyOf": [columns, listed]}
    return schema


def _stage(name: str) -> dict[str, Any]:
    stage: type[Stage] = registry.find(name)
    schema = of(stage, name)
    del schema["$schema"]
    inner = schema.pop("$defs", {})
    schema["properties"] = {"stage": {"const": name, "description": _sentence(stage.__doc__)}, **schema.get("properties", {})}
    schema["required"] = ["stage", *schema.get("required", [])]
    return _inlined(schema, inner)


def _inlined(part: Any, definitions: dict[str, Any]) -> Any:
    """Replaces references by what they refer to, so that a schema can be a part of another one."""
    if isinstance(part, list):
        return [_inlined(one, definitions) for one in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _inlined(definitions[part["$ref"].rpartition("/")[2]], definitions) | {
            k: v for k, v in part.items() if k != "$ref"
        }
    return {key: _inlined(one, definitions) for key, one in part.items()}


def cluster() -> dict[str, Any]:
    """Makes the schema of cluster files: the keys of Ray's cluster launcher and of a KubeRay manifest that heliostat reads."""

    def mapping(about: str, required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
        return {"type": "object", "description": about, "properties": properties, **({"required": required} if required else {})}

    def value(kind: str, about: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "description": about, **more}

    commands = {"type": "array", "items": {"type": "string"}}
    node = mapping(
        "A kind of node.",
        resources=mapping("What a node offers, such as CPU and GPU. Left out: Ray finds out."),
        min_workers=value("integer", "Nodes of this kind that always run.", minimum=0),
        max_workers=value("integer", "Most nodes of this kind.", minimum=0),
        labels=mapping("Ray labels, which `workers.labels` and `data.labels` of a job select."),
        node_config=mapping("What the provider needs to start such a node."),
        docker=mapping("The container of this kind of node."),
    )
    steps = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    launcher = mapping(
        "A file of Ray's cluster launcher.",
        ["cluster_name", "provider"],
        cluster_name=value("string", "The cluster's name, which `--cluster NAME` takes."),
        provider=mapping(
            "Where the nodes run.",
            ["type"],
            type=value("string", "The kind of provider.", examples=["local", "aws", "gcp"]),
            region=value("string", "The cloud's region."),
            head_ip=value("string", "local: the address of the head node; 127.0.0.1 for processes on this machine."),
            worker_ips=value("array", "local: the addresses of the other nodes.", items={"type": "string"}),
        ),
        available_node_types={**mapping("The kinds of nodes, by name."), "additionalProperties": node},
        head_node_type=value("string", "The kind of the head node."),
        max_workers=value("integer", "Most nodes in addition to the head node.", minimum=0),
        idle_timeout_minutes=value("number", "Minutes after which an idle node is removed."),
        docker=mapping("The container that all nodes run in."),
        auth=mapping("How heliostat reaches the nodes by SSH."),
        file_mounts=mapping("Files that are copied to all nodes."),
        **{f"{step}_commands": {**commands, "description": f"Shell commands: {step.replace('_', ' ')}."} for step in steps},
    )
    manifest = mapping(
        "A Kubernetes manifest; heliostat starts RayCluster and RayJob.",
        ["apiVersion", "kind", "metadata"],
        apiVersion=value("string", "The API, such as ray.io/v1.", examples=["ray.io/v1"]),
        kind=value("string", "The kind of object.", examples=["RayCluster", "RayJob"]),
        metadata=mapping("The object's name and namespace."),
        spec=mapping("The object's own keys."),
    )
    return {"$schema": DRAFT, "title": "heliostat cluster", "anyOf": [launcher, manifest]}


def _models(model: type[BaseModel]) -> set[type[BaseModel]]:
    """Finds the model and all models in its fields."""
    found, left = set[type[BaseModel]](), [model]
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left += [inner for field in one.model_fields.values() for inner in _inside(field.annotation)]
    return found


def _inside(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for argument in get_args(annotation) for inner in _inside(argument)]


@cache
def _described(model: type[BaseModel]) -> dict[str, str]:
    return keys.descriptions(model)


def _complete(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Adds descriptions and old names, and takes keys that heliostat fills in from the required ones."""
    properties = schema.get("properties", {})
    for name, field in model.model_fields.items():
        key = field.alias or name
        part = properties.get(key)
        if part is None:
            continue
        rules = [mark.rule for mark in field.metadata if isinstance(mark, Filled)]
        description = _sentence(_described(model)[name])
        part["description"] = f"{description} Default: {rules[0]}." if rules else description
        if rules:
            schema["required"] = [one for one in schema.get("required", []) if one != key]
            part.pop("default", None)
        if also := ALSO.get(f"{model.__name__}.{key}"):
            rest = {one: part.pop(one) for one in [*part] if one not in ("description", "title", "default")}
            part["anyOf"] = [*rest.pop("anyOf", []), *([rest] if rest else []), also]
    for old, key in old_names(model).items():
        properties[old] = {**properties[key], **_deprecated(key)}
    if not schema.get("required", True):
        del schema["required"]
    if "description" in schema:
        schema["description"] = _sentence(schema["description"])


def _deprecated(key: str) -> dict[str, Any]:
    hint = f"Old name of {key}."
    return {"deprecated": True, "deprecationMessage": hint, "doNotSuggest": True, "description": hint}


def _sentence(text: str | None) -> str:
    return " ".join((text or "").replace("`", "").split())


def _plain(part: Any) -> Any:
    """Writes a schema in words that every validator knows: bounds by their names, and any one of several that fit."""
    if isinstance(part, list):
        return [_plain(one) for one in part]
    if not isinstance(part, dict):
        return part
    return {"anyOf" if key == "oneOf" else BOUNDS.get(key, key): _plain(one) for key, one in part.items()}


if __name__ == "__main__":
    write()
