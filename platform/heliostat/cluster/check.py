"""`heliostat cluster check FILE`: everything that can be found wrong with a cluster file before a machine is paid for.

Errors stop `cluster up`: what the tool's schema refuses, what cannot work, secrets written in. Warnings are for a person to
decide on: open ports, Ray without authentication, pools that no job can ask for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.cluster import files, schemas
from heliostat.cluster.files import ClusterFile
from heliostat.errors import ConfigError
from heliostat.schema import nearest

SECRETS = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a GitHub or Hugging Face token": r"\b(?:gh[pousr]_[0-9A-Za-z]{36,}|hf_[0-9A-Za-z]{30,})\b",
    "a password in a URL": r"\w+://[^\s/:@$]+:[^\s/@$]+@",
    "a secret's value": (
        r"(?i)\b(?:RAY_AUTH_TOKEN|[A-Z_]*(?:SECRET|PASSWORD|ACCESS_KEY|API_KEY)[A-Z_]*)\s*[=:]\s*['\"]?[^\s'\"$<{#]{8,}"
    ),
}
SECRET_NAMES = re.compile(r"(?i)secret|password|token$|access_key|api_key")


@dataclass(frozen=True)
class Report:
    cluster: ClusterFile
    errors: list[str]
    warnings: list[str]


def check(path: Path) -> Report:
    """ConfigError if the file cannot be read at all; else what is wrong with it."""
    cluster = files.read(path)
    with files.shaped(path):
        return _report(cluster)


def _report(cluster: ClusterFile) -> Report:
    refused = schemas.faults(cluster)
    if refused:  # the rest needs a file of the right form
        return Report(cluster, [*refused, *_secrets(cluster)], [])
    warnings = [*_ports(cluster), *_sense(cluster)]
    if refused is None:
        warnings.append(
            f"the file was not held against KubeRay's schema: {schemas.crd_folder()} does not have its CRDs; "
            f"set {schemas.CRDS} to a folder that has"
        )
    return Report(cluster, [*_impossible(cluster), *_secrets(cluster)], warnings)


def require(path: Path) -> ClusterFile:
    """The cluster file, or one ConfigError with all its errors."""
    report = check(path)
    if report.errors:
        raise ConfigError("\n  ".join([f"{path}:", *report.errors]) if len(report.errors) > 1 else f"{path}: {report.errors[0]}")
    return report.cluster


def _impossible(cluster: ClusterFile) -> Iterator[str]:
    raw = cluster.raw
    heads = [p for p in cluster.pools if p.head]
    if cluster.kind == "launcher" and raw.get("available_node_types") and not heads:
        given, known = str(raw.get("head_node_type")), list(raw["available_node_types"])
        yield f"head_node_type: {given!r} is no node type{nearest(given, known)}"
    for pool in cluster.pools:
        if pool.least > pool.most:
            yield f"pool {pool.name}: at least {pool.least} nodes, but at most {pool.most}"
        if pool.gpus and not pool.cpus:
            yield f"pool {pool.name}: {pool.gpus:g} GPUs and no CPU: no worker fits; give it CPUs"
    if "max_workers" in raw and (most := sum(p.most for p in cluster.pools if not p.head)) and raw["max_workers"] < most:
        least = sum(p.least for p in cluster.pools if not p.head)
        if raw["max_workers"] < least:
            yield f"max_workers: {raw['max_workers']} is below the {least} nodes that the pools start with"
    if cluster.provider == "local":
        for address in cluster.addresses:
            if cluster.addresses.count(address) > 1:
                yield f"provider.worker_ips: {address} is there twice"
                break
    if cluster.kind != "launcher":
        yield from _kuberay_impossible(cluster)


def _kuberay_impossible(cluster: ClusterFile) -> Iterator[str]:
    spec = cluster.spec
    versions = {c["image"].rpartition(":")[2] for g in _groups(spec) for c in g["template"]["spec"]["containers"] if "image" in c}
    if len(versions) > 1:
        yield f"images: {', '.join(sorted(versions))}: head and workers must have one version of Ray and of heliostat"
    if spec.get("enableInTreeAutoscaling"):
        for group in spec.get("workerGroupSpecs") or []:
            if "maxReplicas" not in group:
                yield f"worker group {group['groupName']}: maxReplicas: is required with enableInTreeAutoscaling"
    names = [g["groupName"] for g in spec.get("workerGroupSpecs") or []]
    if len(set(names)) < len(names):
        yield f"workerGroupSpecs: two groups have one name: {', '.join(names)}"


def _groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *(spec.get("workerGroupSpecs") or [])]


def _secrets(cluster: ClusterFile) -> Iterator[str]:
    text = cluster.path.read_text(encoding="utf-8")
    lines = [line.split(" #")[0] for line in text.splitlines() if not line.lstrip().startswith("#")]
    for number, line in enumerate(lines, 1):
        for what, pattern in SECRETS.items():
            if re.search(pattern, line):
                yield f"line {number} of the file's YAML: {what} is written in; give it by environment or as a Kubernetes secret"
                break
    for document in (cluster.raw, *cluster.others):
        if document.get("kind") == "Secret" and (document.get("data") or document.get("stringData")):
            yield "a Secret with its values is in the file; make it with `kubectl create secret`"
        for name, value in _environment(document):
            if SECRET_NAMES.search(name) and value:
                yield f"env {name}: its value is written in; use valueFrom.secretKeyRef"


def _environment(node: Any) -> Iterator[tuple[str, str]]:
    """(name, literal value) of every container's environment variables."""
    if isinstance(node, dict):
        for entry in node["env"] if isinstance(node.get("env"), list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("value"), str):
                yield str(entry.get("name")), entry["value"]
        for value in node.values():
            yield from _environment(value)
    elif isinstance(node, list):
        for value in node:
            yield from _environment(value)


def _ports(cluster: ClusterFile) -> Iterator[str]:
    """Whoever reaches Ray's ports runs code on the cluster (CVE-2023-48022), unless a token is asked for."""
    if cluster.kind == "launcher":
        text = "\n".join(cluster.commands)
        if re.search(r"--dashboard-host[= ](?:0\.0\.0\.0|::)", text):
            yield "the dashboard listens on every address; use --dashboard-host=127.0.0.1, and reach it through an ssh tunnel"
        if not cluster.local and "RAY_AUTH_MODE=token" not in text:
            yield "the start commands do not ask for a token; export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH in them"
        options = [o for key in ("run_options", "head_run_options", "worker_run_options")
                   for o in (cluster.raw.get("docker") or {}).get(key) or []]  # fmt: skip
        if any(re.match(r"(-p|--publish)\b", str(o)) for o in options):
            yield "docker.run_options: publishes a port; Ray's ports must be reachable from the cluster's nodes alone"
        group = cluster.raw["provider"].get("security_group") or {}
        for rule in group.get("IpPermissions") or []:
            if any(r.get("CidrIp") in ("0.0.0.0/0", "::/0") for r in rule.get("IpRanges") or []):
                yield f"provider.security_group: port {rule.get('FromPort', 'any')} is open to the whole internet"
        return
    spec = cluster.spec
    if (spec.get("authOptions") or {}).get("mode") != "token":
        yield "authOptions: Ray asks for no token; set mode: token"
    if (spec.get("networkPolicy") or {}).get("mode") != "DenyAll":
        yield "networkPolicy: every pod of Kubernetes reaches Ray's ports; set mode: DenyAll"
    head = spec["headGroupSpec"]
    if head.get("serviceType", "ClusterIP") != "ClusterIP":
        yield f"headGroupSpec.serviceType: {head['serviceType']} opens Ray's ports; use ClusterIP and a port-forward"
    if head.get("enableIngress"):
        yield "headGroupSpec.enableIngress: opens the dashboard to the outside; use a port-forward"
    for group in _groups(spec):
        if group["template"]["spec"].get("hostNetwork"):
            yield f"{group.get('groupName', 'head')}: hostNetwork: Ray's ports are open on the host's addresses"


def _sense(cluster: ClusterFile) -> Iterator[str]:
    for pool in cluster.pools:
        if pool.gpus and not pool.labels:
            yield f"pool {pool.name}: has GPUs and no labels, so jobs cannot keep other work off it (workers.labels, data.labels)"
        if pool.image and (":" not in pool.image.rpartition("/")[2] or pool.image.endswith(":latest")):
            yield f"pool {pool.name}: image {pool.image} has no version: nodes that start later may run other code"
        if pool.head and pool.cpus and len(cluster.pools) > 1:
            yield f"pool {pool.name}: the head takes work ({pool.cpus:g} CPUs); with CPU: 0 losing a worker never loses the head"
    if "change-me" in cluster.path.read_text(encoding="utf-8"):
        yield "the file still holds change-me: put your own values there"
