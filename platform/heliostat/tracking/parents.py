"""Finds what a run was initialised from: every `pretrained: FOLDER` of its model, and the run that made that folder, if one did.

A folder that `heliostat export` wrote, or that a registered model holds, has its origin in `heliostat.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heliostat.config.spec import Job
from heliostat.recipes import exported


def parents(job: Job) -> list[dict[str, Any]]:
    """Describes each folder that the job's model is initialised from.

    Each entry holds key, folder, config (a digest), changed (what the job gives beside the folder), bytes (of the weights),
    license, and run_id, name, step or null.
    """
    return [_parent(key, Path(folder), changed) for key, folder, changed in _folders(job.model, "model")]


def _folders(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for key, value in tree.items():
        if key == "pretrained" and isinstance(value, str):
            yield f"{prefix}.{key}", value, {name: other for name, other in tree.items() if name != key}
        elif isinstance(value, dict):
            yield from _folders(value, f"{prefix}.{key}")


def _parent(key: str, folder: Path, changed: dict[str, Any]) -> dict[str, Any]:
    configs = sorted(folder.glob("*.json")) if folder.is_dir() else []
    config = hashlib.sha256(b"".join(p.read_bytes() for p in configs if p.name in ("config.json", "model_index.json")))
    origin: dict[str, Any] = {}
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
        **{name: origin.get(name) for name in ("name", "run_id", "step", "license")},
    }
