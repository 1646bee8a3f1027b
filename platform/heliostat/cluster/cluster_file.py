"""Reads cluster files: Ray cluster-launcher YAML, or KubeRay manifests.

heliostat doesn't have its own schema for clusters. The files are for other tools (`ray up`, kubectl). This module reads only
the node pools, with their sizes, labels, and images. `cluster.review` checks the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from heliostat.config import workspace
from heliostat.config.file_kinds import require_kind
from heliostat.errors import ConfigError
from heliostat.schema import documents
from heliostat.text import brief

ACCELERATOR = "ray.io/accelerator-type"  # Ray's label for the type of a node's GPU
GPU_RESOURCES = ("nvidia.com/gpu", "amd.com/gpu")
Section = dict[str, Any]  # a mapping in a cluster file, or in its tool's output; the tool defines the schema


@dataclass(frozen=True)
class NodePool:
    """Describes a pool of identical nodes.

    `least` and `most` are the minimum and maximum number of nodes. `cpus` and `gpus` are the numbers per node; `cpus` is None if
    the file doesn't set it and Ray counts each node's CPUs.
    """

    name: str
    head: bool
    least: int
    most: int
    cpus: float | None
    gpus: float
    labels: dict[str, str] = field(default_factory=dict)
    image: str | None = None
    instance: str | None = None
    spot: bool = False


@dataclass(frozen=True)
class ClusterFile:
    """Holds the content of a cluster file.

    `kind`: launcher, RayCluster, or RayJob. `raw`: the document that defines the cluster. `others`: the file's other documents.
    """

    path: Path
    kind: str
    name: str
    raw: Section
    others: tuple[Section, ...] = ()

    @cached_property
    def pools(self) -> tuple[NodePool, ...]:
        """Returns the node pools.

        Raises ConfigError if the file is too malformed to read the pools. To find the place of the error, validate the file
        against the schema (`schemas`).
        """
        with shaped(self.path):
            return tuple(_launcher_pools(self.raw) if self.kind == "launcher" else _kuberay_pools(self.spec))

    @property
    def provider(self) -> str:
        return self.raw["provider"]["type"] if self.kind == "launcher" else "kubernetes"

    @property
    def namespace(self) -> str:
        return self.raw.get("metadata", {}).get("namespace", "default")

    @property
    def spec(self) -> Section:
        """Returns the RayCluster spec of a KubeRay manifest."""
        return self.raw["spec"]["rayClusterSpec"] if self.kind == "RayJob" else self.raw["spec"]

    @property
    def local(self) -> bool:
        """Checks whether all addresses are on this machine. If so, heliostat itself starts the nodes, as processes."""
        return self.provider == "local" and all(a.startswith("127.") for a in self.addresses)

    @property
    def addresses(self) -> list[str]:
        """Lists the addresses of a `local` provider's nodes. The head's address comes first."""
        return [str(self.raw["provider"].get("head_ip", "")), *map(str, self.raw["provider"].get("worker_ips", []))]

    @property
    def commands(self) -> list[str]:
        """Lists every shell command of a launcher file."""
        return [c for key, value in self.raw.items() if key.endswith("_commands") for c in value]


@contextmanager
def shaped(path: Path) -> Iterator[None]:
    """Converts errors of code that reads a file without validation (missing keys, values of the wrong type) into
    ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
        fault = f"{type(e).__name__}: {brief(e)}"
        raise ConfigError(
            f"{path}: can't read the file: a part is missing or has the wrong type ({fault}). Correct this part"
        ) from e


def read(path: Path) -> ClusterFile:
    """Reads a cluster file; raises ConfigError if the file is in neither format, or if the name or another required part is
    missing."""
    documents = _documents(path)
    require_kind("cluster", path, documents[0])
    kuberay = [d for d in documents if str(d.get("apiVersion", "")).startswith("ray.io/")]
    if len(kuberay) > 1:
        raise ConfigError(f"{path}: contains {len(kuberay)} Ray resources, expected one. Split the file")
    try:
        if kuberay:
            raw, kind = kuberay[0], str(kuberay[0].get("kind"))
            if kind not in ("RayCluster", "RayJob"):
                raise ConfigError(f"{path}: kind: {kind!r} isn't supported. Use RayCluster or RayJob")
            name = workspace.check_name(f"{path}: metadata.name", raw["metadata"]["name"])
            return ClusterFile(path, kind, name, raw, tuple(d for d in documents if d is not raw))
        if len(documents) == 1 and {"cluster_name", "provider"} <= documents[0].keys():
            raw = documents[0]
            name = workspace.check_name(f"{path}: cluster_name", raw["cluster_name"])
            return ClusterFile(path, "launcher", str(raw["provider"]["type"]) and name, raw)
    except (KeyError, TypeError) as e:
        raise ConfigError(
            f"{path}: is incomplete, or a part has the wrong type ({type(e).__name__}: {e}). Correct the file"
        ) from e
    raise ConfigError(
        f"{path}: isn't a cluster file. Write cluster-launcher YAML (cluster_name, provider) or a KubeRay "
        "manifest (apiVersion: ray.io/v1)"
    )


def _documents(path: Path) -> list[Section]:
    sections = documents(path)
    if not sections or not all(isinstance(d, dict) for d in sections):
        raise ConfigError(f"{path}: expected mappings of keys to values")
    return sections


def _launcher_pools(raw: Section) -> Iterator[NodePool]:
    docker = raw.get("docker") or {}
    for name, node in (raw.get("available_node_types") or {}).items():
        head, resources, config = name == raw.get("head_node_type"), node.get("resources") or {}, node.get("node_config") or {}
        own = (node.get("docker") or {}).get("worker_image")
        yield NodePool(
            name=name,
            head=head,
            least=1 if head else int(node.get("min_workers", 0)),
            most=1 if head else int(node.get("max_workers", raw.get("max_workers", 0))),
            cpus=resources.get("CPU"),
            gpus=resources.get("GPU", 0),
            labels=dict(node.get("labels") or {}),
            image=own or docker.get("head_image" if head else "worker_image") or docker.get("image"),
            instance=config.get("InstanceType") or config.get("machineType"),
            spot="InstanceMarketOptions" in config or "SPOT" in str(config.get("scheduling")),
        )
    if raw["provider"]["type"] == "local":  # the node's resources are in the start commands, or Ray detects them
        workers = len(raw["provider"].get("worker_ips") or [])
        yield NodePool("head", True, 1, 1, None, 0, {}, docker.get("image"))
        yield NodePool(
            "workers", False, min(workers, int(raw.get("min_workers", workers))), workers, None, 0, {}, docker.get("image")
        )


def groups(spec: Section) -> list[tuple[str, Section]]:
    """Lists (name, group) for the node groups of a RayCluster spec. The head's group comes first."""
    return [("head", spec["headGroupSpec"]), *((g["groupName"], g) for g in spec.get("workerGroupSpecs") or [])]


def _kuberay_pools(spec: Section) -> Iterator[NodePool]:
    for name, group in groups(spec):
        head = group is spec["headGroupSpec"]
        container = group["template"]["spec"]["containers"][0]
        resources = container.get("resources") or {}
        amounts = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
        params = group.get("rayStartParams") or {}
        cpus = params.get("num-cpus", amounts.get("cpu"))
        replicas = int(group["replicas"] if "replicas" in group else group.get("minReplicas", 0))
        yield NodePool(
            name=name,
            head=head,
            least=1 if head else int(group.get("minReplicas", replicas)),
            most=1 if head else int(group.get("maxReplicas", replicas)),
            cpus=None if cpus is None else quantity(cpus),
            gpus=next((quantity(amounts[r]) for r in GPU_RESOURCES if r in amounts), 0),
            labels={str(k): str(v) for k, v in (group.get("labels") or {}).items()},
            image=container.get("image"),
        )


def quantity(value: object) -> float:
    """Parses a Kubernetes quantity of CPUs or GPUs: 8, "8", or "500m" (0.5)."""
    text = str(value)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)
