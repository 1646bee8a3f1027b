"""Finds what a cluster file leaves open.

Whoever reaches Ray's ports runs code on the cluster (CVE-2023-48022), unless Ray requires a token.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from heliostat.cluster.cluster_file import ClusterFile, Section, groups

DOCKER_OPTIONS = ("run_options", "head_run_options", "worker_run_options")
LOOPBACK = ("127.", "localhost", "::1")
EVERYWHERE = ("0.0.0.0/0", "::/0")
DASHBOARD = re.compile(r"--dashboard-host[= ]+(\"[^\"]*\"|'[^']*'|\$\([^)]*\)|\S+)")


def warnings(cluster: ClusterFile) -> Iterator[str]:
    yield from _launcher(cluster) if cluster.kind == "launcher" else _kuberay(cluster.spec)


def _launcher(cluster: ClusterFile) -> Iterator[str]:
    for host in DASHBOARD.findall("\n".join(cluster.commands)):
        if not host.strip("\"'").startswith(LOOPBACK):
            yield (
                f"the dashboard listens on {host}, which other machines reach; use --dashboard-host=127.0.0.1, and reach it "
                "through an ssh tunnel"
            )
            break
    if not cluster.local:
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            starts = [c for c in cluster.raw.get(key) or [] if "ray start" in c]  # each in a shell of its own
            if not starts or not all(map(_asks_for_token, starts)):  # none: Ray runs its own, without
                yield f"{key}: the nodes do not ask for a token; export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH in them"
    for where, options in docker_options(cluster):
        if any(re.match(r"(-p|-P|--publish)", option) for option in options):
            yield f"{where}: publishes a port; Ray's ports must be reachable from the cluster's nodes alone"
    group = cluster.raw["provider"].get("security_group") or {}
    for rule in group.get("IpPermissions") or []:
        ranges = [*(rule.get("IpRanges") or []), *(rule.get("Ipv6Ranges") or [])]
        if any(value in EVERYWHERE for r in ranges for value in r.values()):
            yield f"provider.security_group: port {rule.get('FromPort', 'any')} is open to the whole internet"


def _asks_for_token(command: str) -> bool:
    """Checks whether `ray start` runs with token authentication on, and is given the token's path."""
    return re.search(r"RAY_AUTH_MODE=['\"]?token\b", command) is not None and "RAY_AUTH_TOKEN_PATH=" in command


def docker_options(cluster: ClusterFile) -> Iterator[tuple[str, list[str]]]:
    """Yields (key, words) of every list of `docker run` options in a launcher file, its node types' included."""
    places: list[tuple[str, Section]] = [("docker", cluster.raw.get("docker") or {})]
    for name, node in (cluster.raw.get("available_node_types") or {}).items():
        places.append((f"available_node_types.{name}.docker", node.get("docker") or {}))
    for where, docker in places:
        for key in DOCKER_OPTIONS:
            if docker.get(key):
                yield f"{where}.{key}", [word for option in docker[key] for word in _words(str(option))]


def _words(option: str) -> list[str]:
    try:
        return shlex.split(option)
    except ValueError:  # an unclosed quote: docker would refuse it, too
        return option.split()


def _kuberay(spec: Section) -> Iterator[str]:
    if (spec.get("authOptions") or {}).get("mode") != "token":
        yield "authOptions: Ray asks for no token; set mode: token"
    head = spec["headGroupSpec"]
    if head.get("serviceType", "ClusterIP") != "ClusterIP":
        yield f"headGroupSpec.serviceType: {head['serviceType']} opens Ray's ports; use ClusterIP and a port-forward"
    if head.get("enableIngress"):
        yield "headGroupSpec.enableIngress: opens the dashboard to the outside; use a port-forward"
    for name, group in groups(spec):
        if group["template"]["spec"].get("hostNetwork"):
            yield f"{name}: hostNetwork: Ray's ports are open on the host's addresses"
