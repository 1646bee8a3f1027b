"""Describes the origin of a model's folder: the run and the step that trained the model, and the license.

If `heliostat model export` made the folder, or if the folder is part of a registered model, its `heliostat.json` names the run.
For a model of the Hugging Face Hub, the license comes from the model's own card.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NotRequired

import yaml
from typing_extensions import TypedDict

from heliostat.config import pretrained
from heliostat.recipes import exported
from heliostat.recipes.exported import ConvertedFile
from heliostat.recipes.folder_digests import weights_digest
from heliostat.storage.hub import files
from heliostat.storage.records import Format, open_

CARD = "README.md"


@open_
class ModelOrigin(TypedDict):
    """Describes a folder or Hub model. `name`, `run_id`, and `step`: of the run that trained the model; None if unknown."""

    folder: str
    config: str  # digest of the model's configuration files
    digest: NotRequired[str | None]  # of the weights and config.json; None for a folder of several models
    bytes: int  # size of the weights
    converted_from: NotRequired[ConvertedFile | None]
    name: str | None
    run_id: str | None
    step: int | None
    license: str | None


ORIGIN = Format(ModelOrigin, "record of a model's origin", fix="Prepare the dataset again")


def of(named: str, folder: Path) -> ModelOrigin:
    """Describes the origin of a model. `named`: the name by which the job or pipeline names the model; `folder`: its folder on
    this machine."""
    configs = sorted(folder.glob("*.json")) if folder.is_dir() else []
    config = hashlib.sha256(b"".join(p.read_bytes() for p in configs if p.name in ("config.json", "model_index.json")))
    origin: dict[str, Any] = {}  # the record of the run in an exported model
    if (folder / exported.RECORD).is_file():
        raw = exported.record(folder)
        card = raw["job"].get("card") or {}
        origin = {"name": raw["job"]["name"], "license": card.get("license"), **raw.get("origin", {})}
    elif pretrained.hub_name(named):
        origin = {"license": _license(folder / CARD)}
    return {
        "folder": named,
        "config": config.hexdigest()[:16],
        "digest": weights_digest(folder) if (folder / "config.json").is_file() else None,
        "bytes": files.weight_bytes(folder),
        "converted_from": exported.converted_from(folder),
        "name": origin.get("name"),
        "run_id": origin.get("run_id"),
        "step": origin.get("step"),
        "license": origin.get("license"),
    }


def _license(readme: Path) -> str | None:
    """Reads the license in the header of a model's card; None if the header has no license, or isn't readable."""
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        known = yaml.safe_load(header[1]) if header else None
    except (yaml.YAMLError, ValueError, RecursionError):  # also an impossible date, or a thousand brackets
        return None
    license = known.get("license") if isinstance(known, dict) else None
    return license if isinstance(license, str) else None
