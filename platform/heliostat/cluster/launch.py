"""Starts and stops a cluster with the tool for the cluster file: heliostat itself, `ray up` and `ray down`, or kubectl."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from heliostat import extras
from heliostat.cluster import cluster_file, kuberay, local
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.cluster.endpoint import tool
from heliostat.errors import ClusterError, ConfigError
from heliostat.text import plural

log = logging.getLogger(__name__)

UP_S = 3600.0  # clouds may need a long time to find machines


class LaunchResult(TypedDict):
    """Describes the result of starting or stopping a cluster.

    For a local cluster, `nodes` is the number of nodes, and `processes` is the number of ended processes.
    """

    name: str
    note: str
    url: NotRequired[str]
    nodes: NotRequired[int]
    processes: NotRequired[int]


def up(cluster: ClusterFile, restart: bool = False) -> LaunchResult:
    """Starts a cluster, or joins a running cluster.

    `restart`: whether to restart Ray on nodes where Ray already runs. A restart ends the jobs on these nodes. Raises ConfigError
    if `restart` is set for KubeRay.
    """
    if cluster.local:
        state = local.up(cluster, restart)
        note = (
            f"{plural(len(state.nodes), 'node')} at {state.url}, token in {state.token_file}"
            if state.nodes
            else f"joined {state.url}"
        )
        return {"name": cluster.name, "url": state.url, "nodes": len(state.nodes), "note": note}
    if cluster.kind == "launcher":
        if cluster.provider == "local":
            os.environ.setdefault("RAY_UP_enable_autoscaler_v2", "0")  # the autoscaler's version 2 doesn't start one of the hosts
        require_launcher(cluster)
        tool(launcher(cluster, restart), f"starting {cluster.name}", UP_S)
        kept = "" if restart else ". Ray wasn't restarted on nodes where Ray already ran (to restart Ray there, pass --restart)"
        return {
            "name": cluster.name,
            "note": (f"is up{kept}. Submit a job through ssh: heliostat submit JOB.yaml --cluster {cluster.path}"),
        }
    if restart:
        raise ConfigError(
            f"--restart: not supported for KubeRay. Run `heliostat cluster down {cluster.path}`, and then "
            f"`heliostat cluster up {cluster.path}`"
        )
    return {"name": cluster.name, "note": kuberay.start(cluster)}


def require_launcher(cluster: ClusterFile) -> None:
    """Raises MissingExtraError if a package that Ray's launcher needs for the cluster's provider isn't installed."""
    if cluster.provider == "gcp":
        extras.require("gcp", "googleapiclient", "google_auth_httplib2", what="provider.type: gcp")


def launcher(cluster: ClusterFile, restart: bool) -> list[str]:
    """Builds the `ray up` command, which starts all nodes that don't run yet.

    The command has `--no-restart`, because otherwise `ray up` first stops Ray on the head.
    """
    return ["ray", "up", "--yes", *([] if restart else ["--no-restart"]), str(cluster.path)]


def down(target: str) -> LaunchResult:
    """Stops a cluster: `target` is a cluster file, or the name of a local cluster."""
    if not target.endswith((".yaml", ".yml")):
        return _down_local(target)
    cluster = cluster_file.read(Path(target))
    if cluster.local:
        return _down_local(cluster.name)
    if cluster.kind == "launcher":
        require_launcher(cluster)
        tool(["ray", "down", "--yes", target], f"stopping {cluster.name}", UP_S)
        if cluster.provider == "local":
            _stop_hosts(cluster)
        return {"name": cluster.name, "note": "is down"}
    tool(["kubectl", "delete", "-f", target, "--ignore-not-found"], f"stopping {cluster.name}")
    return {"name": cluster.name, "note": "is deleted"}


def _stop_hosts(cluster: ClusterFile) -> None:
    """Runs the file's `ray stop` commands on the user's own hosts over ssh, because `ray down` leaves Ray running there."""
    auth = cluster.raw.get("auth") or {}
    key = ["-i", str(Path(auth["ssh_private_key"]).expanduser())] if "ssh_private_key" in auth else []
    stop = " ; ".join(c for c in cluster.raw.get("worker_start_ray_commands") or [] if c.strip().endswith("ray stop"))
    trust = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]  # like `ray up`
    for address in cluster.addresses if stop else ():
        where = f"{auth['ssh_user']}@{address}"
        try:
            tool(["ssh", *key, *trust, "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", where, stop], f"stopping {address}", 60)
        except ClusterError as e:
            log.warning("%s. If the host exists, Ray may still run on this host", e)


def _down_local(name: str) -> LaunchResult:
    state = local.read(name)
    if state is None:
        have = ", ".join(s.name for s in local.known()) or "none"
        raise ConfigError(f"{name}: no such local cluster. Clusters: {have}")
    ended = local.down(name)
    note = f"is down, {ended} processes ended" if state.nodes else "keeps running, because heliostat only joined it"
    return {"name": name, "note": note, "processes": ended}
