"""Finds what a run was initialised from: every `pretrained: FOLDER` of its model, and the run that made that folder, if one did.

A folder that `heliostat export` wrote, or that a registered model holds, has its origin in `heliostat.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from heliostat.config.spec import Job
from heliostat.recipes import exported
from heliostat.storage.records import Json


class ParentModel(TypedDict):
    """Describes a folder that a model is initialised from: an entry of `parents.json`."""

    key: str
    folder: str
    config: str  # a digest
    changed: NotRequired[dict[str, Json]]  # what the job gives beside the folder; older records lack it
    bytes: int  # of the weights
    name: str | None
    run_id: str | None
    step: int | None
    license: str | None


class Parents(TypedDict):
    """Describes the content of `parents.json`."""

    parents: list[ParentModel]


def parents(job: Job) -> list[ParentModel]:
    """Describes each folder that the job's model is initialised from."""
    return [_parent(key, Path(folder), changed) for key, folder, changed in _folders(job.model, "model")]


def _folders(tree: Mapping[str, Json], prefix: str) -> Iterator[tuple[str, str, dict[str, Json]]]:
    for key, value in tree.items():
        if key == "pretrained" and isinstance(value, str):
            yield f"{prefix}.{key}", value, {name: other for name, other in tree.items() if name != key}
        elif isinstance(value, Mapping):
            yield from _folders(value, f"{prefix}.{key}")


def _parent(key: str, folder: Path, changed: dict[str, Json]) -> ParentModel:
    configs = sorted(folder.glob("*.json")) if folder.is_dir() else []
    config = hashlib.sha256(b"".join(p.read_bytes() for p in configs if p.name in ("config.json", "model_index.json")))
    origin: dict[str, Any] = {}  # what an exported model records of its run
    record = folder / exported.RECORD
    if record.is_file():
        raw = exported.record(folder)
        card = raw["job"].get("card") or {}
        origin = {"name": raw["job"]["name"], "license": card.get("license"), **raw.get("origin", {})}
    return {
        "key": key,
        "folder": str(folder),
        "config": config.hexdigest()[:16],
        "changed": changed,
        "bytes": sum(p.stat().st_size for p in folder.rglob("*.safetensors")),
        "name": origin.get("name"),
        "run_id": origin.get("run_id"),
        "step": origin.get("step"),
        "license": origin.get("license"),
    }
