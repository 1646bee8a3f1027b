"""Checks a cluster file for problems before you pay for a machine (`heliostat cluster check FILE`).

Errors stop `cluster up`: violations of the tool's schema, settings that can't work, and secrets in plain text (`secrets`).

Warnings don't stop `cluster up`. They report open ports, Ray without authentication, pools that no job can request, and settings
that would fail or be unsafe on a cloud (`clouds`) or in Kubernetes (`pods`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from heliostat.cluster import clouds, cluster_file, pods, schemas
from heliostat.cluster.cluster_file import ClusterFile, groups
from heliostat.errors import ConfigError
from heliostat.schema import nearest


@dataclass(frozen=True)
class FileReview:
    """Holds a cluster file, and its errors and warnings. Each error or warning is one line."""

    cluster: ClusterFile
    errors: list[str]
    warnings: list[str]


def check(path: Path) -> FileReview:
    """Collects the errors and warnings of a cluster file; raises ConfigError if the file can't be read at all."""
    cluster = cluster_file.read(path)
    with cluster_file.shaped(path):
        return _report(cluster)


def _report(cluster: ClusterFile) -> FileReview:
    refused = schemas.faults(cluster)
    if refused:  # the other checks need a file that matches the schema
        return FileReview(cluster, [*refused, *secrets(cluster)], [])
    warnings = [*clouds.open_ports(cluster), *clouds.warnings(cluster), *pods.warnings(cluster), *_sense(cluster)]
    if refused is None:
        warnings.append(
            f"can't check the file against KubeRay's schema: {schemas.crd_folder()} lacks KubeRay's CRDs. Set "
            f"{schemas.CRDS} to a folder with the CRDs"
        )
    return FileReview(cluster, [*_impossible(cluster), *secrets(cluster)], warnings)


def require(path: Path) -> ClusterFile:
    """Checks a cluster file and returns it. If the file has errors, raises one ConfigError that contains all of them."""
    report = check(path)
    if report.errors:
        raise ConfigError("\n  ".join([f"{path}:", *report.errors]) if len(report.errors) > 1 else f"{path}: {report.errors[0]}")
    return report.cluster


def _impossible(cluster: ClusterFile) -> Iterator[str]:
    raw = cluster.raw
    heads = [p for p in cluster.pools if p.head]
    if cluster.kind == "launcher" and raw.get("available_node_types") and not heads:
        head, known = str(raw.get("head_node_type")), list(raw["available_node_types"])
        yield f"head_node_type: {head!r} isn't a node type{nearest(head, known)}"
    for pool in cluster.pools:
        if pool.least > pool.most:
            yield f"pool {pool.name}: minimum of {pool.least} nodes is above the maximum of {pool.most}. Raise the maximum"
        if pool.gpus and not pool.cpus:
            yield f"pool {pool.name}: {pool.gpus:g} GPUs and no CPU, so no worker fits. Give the pool CPUs"
    if "max_workers" in raw and (most := sum(p.most for p in cluster.pools if not p.head)) and raw["max_workers"] < most:
        least = sum(p.least for p in cluster.pools if not p.head)
        if raw["max_workers"] < least:
            yield f"max_workers: {raw['max_workers']} is below the {least} nodes that the pools start with. Raise max_workers"
    if cluster.provider == "local":
        for address in cluster.addresses:
            if cluster.addresses.count(address) > 1:
                yield f"provider.worker_ips: {address} is listed twice. Remove one entry"
                break
    if cluster.kind != "launcher":
        yield from _kuberay_impossible(cluster)


def _kuberay_impossible(cluster: ClusterFile) -> Iterator[str]:
    spec = cluster.spec
    versions = {
        c["image"].rpartition(":")[2] for _, g in groups(spec) for c in g["template"]["spec"]["containers"] if "image" in c
    }
    if len(versions) > 1:
        yield (
            f"images: {', '.join(sorted(versions))}: the head and the workers must have the same versions of "
            "Ray and heliostat. Use the same image"
        )
    if spec.get("enableInTreeAutoscaling"):
        for group in spec.get("workerGroupSpecs") or []:
            if "maxReplicas" not in group:
                yield f"worker group {group['groupName']}: maxReplicas: required with enableInTreeAutoscaling. Add maxReplicas"
    names = [g["groupName"] for g in spec.get("workerGroupSpecs") or []]
    if len(set(names)) < len(names):
        yield f"workerGroupSpecs: two groups have the same name: {', '.join(names)}. Rename one group"


def _sense(cluster: ClusterFile) -> Iterator[str]:
    for pool in cluster.pools:
        if pool.gpus and not pool.labels:
            yield (
                f"pool {pool.name}: has GPUs and no labels, so jobs can't keep other work off the pool's nodes. Add labels "
                "(workers.labels, data.labels)"
            )
        if pool.image and (":" not in pool.image.rpartition("/")[2] or pool.image.endswith(":latest")):
            yield f"pool {pool.name}: image {pool.image} has no version, so later nodes may run other code. Add a version"
        if pool.head and pool.cpus and len(cluster.pools) > 1:
            yield (
                f"pool {pool.name}: the head has {pool.cpus:g} CPUs, so it runs workers, and a failing worker can end the "
                "head. Set CPU: 0"
            )
    if "change-me" in cluster.path.read_text(encoding="utf-8"):
        yield "the file still contains change-me. Replace change-me with your values"


# secrets --------------------------------------------------------------------------------------------------------------


WORDS = r"[A-Z0-9_]*(?:SECRET|PASSWORD|PASSWD|PASSPHRASE|ACCESS_KEY|API_KEY|APIKEY|AUTH_TOKEN|TOKEN)(?:_[A-Z0-9_]*)?"
VALUE = r"['\"]?[^\s'\"$<{#]{8,}"  # a value that is neither a variable nor a placeholder
PATTERNS = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a GitHub or Hugging Face token": r"\b(?:gh[pousr]_[0-9A-Za-z]{36,}|hf_[0-9A-Za-z]{30,})\b",
    "a password in a URL": r"\w+://[^\s/:@$]*:[^\s/@$]+@",
    # both commands also accept -pVALUE
    "a password for sshpass": r"\bsshpass\s+(?:-\w\s+\S+\s+)*-p\s*['\"]?[^\s'\"$-][^\s'\"]*",
    "a password for a registry": r"\blogin\b.*\s(?:-p\s*|--password[\s=]+)['\"]?[^\s'\"$<-]",
    "a bearer token": r"(?i)\bbearer\s+[^\s'\"$<{]{8,}",
    "credentials for a registry": r"\s--(?:src-|dest-)?creds[\s=]+['\"]?[^\s'\"$<-]",
    "a secret's value": rf"(?i)\b(?P<name>{WORDS})['\"]?\s*[=:]\s*(?P<value>{VALUE})",
}
SECRET_NAMES = re.compile(r"(?i)secret|password|passwd|token$|access_key|api_?key")
HARMLESS = re.compile(r"(?i)(?:_PATH|_FILE|_DIR|_MODE|_TTL|_URL|_TYPE|_NAME)$")  # such keys name the place or use of a secret


def secrets(cluster: ClusterFile) -> Iterator[str]:
    """Yields one line for each secret in the file, without the secret itself."""
    text = cluster.path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        code = "" if line.lstrip().startswith("#") else line.split(" #")[0]
        if what := found_in(code):
            yield f"line {number}: contains {what}. Use an environment variable or a Kubernetes secret"
    for document in (cluster.raw, *cluster.others):
        if document.get("kind") == "Secret" and (document.get("data") or document.get("stringData")):
            yield "the file contains a Secret with its values. Create the Secret with `kubectl create secret`"
        for name, value in _environment(document):
            if SECRET_NAMES.search(name) and value and not HARMLESS.search(name):
                yield f"env {name}: the file contains the secret value. Use valueFrom.secretKeyRef"


def found_in(line: str) -> str | None:
    """Returns the kind of the secret in a line, for example `a private key`; None if the line contains no secret."""
    for what, pattern in PATTERNS.items():
        for match in re.finditer(pattern, line):
            named = match.groupdict().get("name")
            if named is None or not (HARMLESS.search(named) or _refers(match["value"])):
                return what
    return None


def _refers(value: str) -> bool:
    """Checks whether the value is the path of a file that contains a secret, and not the secret itself."""
    return value.lstrip("'\"").startswith(("/", "~", "./"))


def _environment(node: object) -> Iterator[tuple[str, str]]:
    """Yields (name, literal value) of every container's environment variables."""
    if isinstance(node, dict):
        for entry in node["env"] if isinstance(node.get("env"), list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("value"), str):
                yield str(entry.get("name")), entry["value"]
        for value in node.values():
            yield from _environment(value)
    elif isinstance(node, list):
        for value in node:
            yield from _environment(value)
