"""Validates a cluster file against the schema of the file's tool. The messages name the wrong key and the nearest valid key.

The schema of cluster-launcher YAML is in the installed ray. The schemas of KubeRay manifests are the operator's CRDs, which
aren't part of the repository. `HELIOSTAT_KUBERAY_CRDS` names the folder of the CRDs (default `../shared/kuberay-crds`). The
folder contains `rayclusters.yaml` and `rayjobs.yaml`.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from heliostat.cluster.cluster_file import ClusterFile, Section
from heliostat.config import workspace
from heliostat.schema import nearest

if TYPE_CHECKING:
    from jsonschema import ValidationError

CRDS = "HELIOSTAT_KUBERAY_CRDS"
CRD_FILES = {"RayCluster": "rayclusters.yaml", "RayJob": "rayjobs.yaml"}


def faults(cluster: ClusterFile) -> list[str] | None:
    """Lists the violations of the schema, one line each. Returns None if there is no schema for the file."""
    schema = (
        _launcher() if cluster.kind == "launcher" else _crd(crd_folder() / CRD_FILES[cluster.kind], cluster.raw["apiVersion"])
    )
    if schema is None:
        return None
    from jsonschema import Draft202012Validator

    errors = sorted(Draft202012Validator(schema).iter_errors(cluster.raw), key=lambda e: list(map(str, e.absolute_path)))
    return [line for e in errors for line in _lines(e)]


def crd_folder() -> Path:
    """Returns the folder in which heliostat looks for KubeRay's CRDs."""
    return Path(os.environ.get(CRDS) or workspace.root().parent / "shared" / "kuberay-crds")


@lru_cache
def _launcher() -> Section:
    """Reads Ray's schema directly from the schema's file, because importing Ray would take a second."""
    from importlib.util import find_spec

    spec = find_spec("ray")
    assert spec and spec.origin
    return json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))


@lru_cache
def _crd(file: Path, api_version: str) -> Section | None:
    if not file.is_file():
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is ten times as fast for a file of a megabyte
    crd = yaml.load(file.read_text(encoding="utf-8"), loader)  # noqa: S506 (a SafeLoader)
    versions = {v["name"]: v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"]}
    name = api_version.removeprefix("ray.io/")
    return strict(versions[name]) if name in versions else {"not": {}, "description": f"apiVersion {api_version}"}


def strict(schema: Any) -> Any:
    """Converts an OpenAPI schema to a JSON schema.

    Unknown keys become errors where the schema lists keys. `int-or-string` becomes an integer or a string.
    """
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {k: {n: strict(p) for n, p in v.items()} if k == "properties" else strict(v) for k, v in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if schema.get("properties") and "additionalProperties" not in schema and not open_ended:
        out["additionalProperties"] = False
    if "metadata" in schema.get("properties", {}) and "apiVersion" in schema["properties"]:
        out["properties"]["metadata"] = {"type": "object"}  # Kubernetes defines the keys of this object; CRDs don't list them
    return out


def _lines(error: ValidationError) -> list[str]:
    where = ".".join(map(str, error.absolute_path))
    dot = f"{where}." if where else ""
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = list(error.schema.get("properties", {}))
        return [f"{dot}{key}: unknown key{nearest(str(key), known)}" for key in error.instance if key not in known]
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return [f"{dot}{key}: required" for key in missing[:1]]
    value = json.dumps(error.instance, default=str)
    value = value if len(value) <= 60 else value[:57] + "..."
    if error.validator == "type":
        kinds = error.validator_value if isinstance(error.validator_value, str) else " or ".join(error.validator_value)
        return [f"{where}: expected {kinds}, got {value}"]
    if error.validator == "enum":
        return [f"{where}: {value} isn't a choice{nearest(str(error.instance), [str(v) for v in error.validator_value])}"]
    return [f"{where}: {value}: {error.message if len(error.message) < 120 else error.validator}"]
