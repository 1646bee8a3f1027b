"""Resolves a cluster file, an address, or a local cluster's name to the URL of the cluster's Jobs API and the cluster's token.

On clouds, the dashboard listens only on the head's loopback address. heliostat reaches the dashboard through `ray dashboard`
(ssh) or `kubectl port-forward`. These commands run only while heliostat needs them.

A Ray driver must run on a node of its cluster. For the option `--cluster` of `heliostat model serve` and `heliostat model infer`,
the function `join` makes this process a driver of a cluster on this machine.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from heliostat import schema
from heliostat.cluster import cluster_file, dashboard, local, private, processes
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.config import workspace
from heliostat.errors import ClusterError, ConfigError
from heliostat.redact import carries_secret

TUNNEL_S = 60.0
END_S = 10.0


@dataclass(frozen=True)
class Endpoint:
    """Holds the URL of a cluster's Jobs API and the cluster's token.

    `here`: whether the cluster's nodes are on this machine, and so can read this machine's files. `file`: the cluster file, if
    known.
    """

    url: str
    token: str | None
    here: bool
    file: ClusterFile | None = None


@contextlib.contextmanager
def endpoint(target: str | None, field: str = "--cluster") -> Iterator[Endpoint]:
    """Opens access to a cluster's Jobs API within the context. If `target` is None, uses the running local cluster, if there is
    exactly one.

    `field`: the option or argument that contains `target`, for error messages. Raises ClusterError if no cluster answers;
    raises ConfigError if `target` doesn't name a cluster.
    """
    if target is None:
        states = local.known()
        if len(states) != 1:
            have = (
                f"{len(states)} clusters are running here: {', '.join(s.name for s in states)}"
                if states
                else "no cluster is running here"
            )
            start = "" if states else ", or start one: heliostat cluster up clusters/local.yaml"
            raise ConfigError(f"{field}: no cluster given ({have}). Pass a cluster file, an address, or a cluster's name{start}")
        target = states[0].name
    file = target.endswith((".yaml", ".yml"))
    if state := local.read(target) if workspace.NAME.fullmatch(target) and not file else None:
        yield _local(state, cluster_file.read(Path(state.file)) if Path(state.file).is_file() else None)
    elif file:
        cluster = cluster_file.read(Path(target))
        if cluster.local:
            if not (state := local.read(cluster.name)):
                raise ClusterError(f"{target}: this cluster isn't running. Start it: heliostat cluster up {target}")
            yield _local(state, cluster)
        elif cluster.kind == "launcher":
            with _tunnel(["ray", "dashboard", target, "--remote-port", _port(cluster), "--port"], dashboard.own_token()) as (
                url,
                token,
            ):
                yield Endpoint(url, token, False, cluster)
        else:
            name = kube_name(cluster)
            service = ["kubectl", "-n", cluster.namespace, "port-forward", f"service/{kube_service(cluster, name)}"]
            with _tunnel(service, kube_token(cluster, name)) as (url, token):
                yield Endpoint(url, token, False, cluster)
    else:
        if carries_secret(target if "://" in target else f"http://{target}"):
            raise ConfigError(f"{field}: the address must not contain a token. Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH")
        url = target if target.startswith(("http://", "https://")) else f"http://{target}"
        if url != target and not _is_address(target):
            names = [s.name for s in local.known()]
            fix = schema.nearest(target, names) or ". Start one: heliostat cluster up clusters/local.yaml"
            raise ConfigError(
                f"{field}: {target!r} isn't a running local cluster, a cluster file (FILE.yaml), or an address (HOST:PORT or "
                f"http://HOST:PORT){fix}"
            )
        here = any(url.startswith(f"http://{host}") for host in ("127.", "localhost"))
        if state := next((s for s in local.known() if s.url == url.rstrip("/")), None):
            yield _local(state, None)
        else:
            yield _answering(Endpoint(url.rstrip("/"), dashboard.own_token(), here))


def _is_address(text: str) -> bool:
    """Checks whether a text is HOST:PORT."""
    match = re.fullmatch(r"(?:[^/:@]+|\[[0-9a-fA-F:]+\]):(\d+)/?", text)
    return match is not None and int(match[1]) < 1 << 16


def _local(state: local.ClusterState, cluster: ClusterFile | None) -> Endpoint:
    if dashboard.probe(state.url) and not private.ours(state.url):
        raise ClusterError(
            f"{state.url}: another user's process answers there, so heliostat sent no token. Check whether "
            f"{state.name} is down: heliostat cluster list"
        )
    return _answering(Endpoint(state.url, state.token or None, True, cluster))


def _answering(endpoint_given: Endpoint) -> Endpoint:
    status = dashboard.probe(endpoint_given.url, endpoint_given.token)
    if status in (401, 403):
        raise ClusterError(
            f"{endpoint_given.url}: the cluster rejects the token. Set RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
        )
    if status != 200:
        raise ClusterError(
            f"{endpoint_given.url}: no Ray cluster answers here ({status or 'no connection'}). "
            "Check the address, or start the cluster"
        )
    return endpoint_given


def _port(cluster: ClusterFile) -> str:
    return local.url_of(cluster).rpartition(":")[2] if cluster.provider == "local" else "8265"


def kube_name(cluster: ClusterFile) -> str:
    """Returns the RayCluster's name. This is the name in the file or, for a RayJob, the name of the cluster that KubeRay made for
    the job.

    Raises ClusterError if the job has no cluster yet.
    """
    if cluster.kind == "RayCluster":
        return cluster.name
    command = ["kubectl", "-n", cluster.namespace, "get", "rayjob", cluster.name, "-o", "jsonpath={.status.rayClusterName}"]
    name = tool(command, f"finding the cluster of the job {cluster.name}").strip()
    if not name:
        raise ClusterError(
            f"{cluster.path}: the job {cluster.name} has no cluster yet. The job may be waiting for its quota "
            "(`suspend`). Check the job with kubectl"
        )
    return name


def kube_service(cluster: ClusterFile, name: str) -> str:
    """Returns the name of the head's Kubernetes service."""
    metadata = (cluster.spec["headGroupSpec"].get("headService") or {}).get("metadata") or {}
    return metadata.get("name") or f"{name}-head-svc"


def kube_token(cluster: ClusterFile, name: str) -> str | None:
    """Reads the cluster's token from its Kubernetes secret; None if the secret is empty.

    The secret has the RayCluster's name, unless the file gives another name.
    """
    secret = (cluster.spec.get("authOptions") or {}).get("secretName") or name
    command = ["kubectl", "-n", cluster.namespace, "get", "secret", secret, "-o", "jsonpath={.data.auth_token}"]
    return base64.b64decode(tool(command, f"reading the token of {name}")).decode() or None


def tool(command: list[str], what: str, timeout: float = 600.0, stdin: str | None = None) -> str:
    """Runs ray, kubectl, or ssh, and returns its standard output.

    `what`: the purpose, for error messages. `timeout`: in seconds. `stdin`: text for the tool's standard input. Raises
    ClusterError if the tool isn't installed, fails (with the tool's last line), or exceeds the timeout.
    """
    if not shutil.which(command[0]):
        raise ClusterError(f"{what} needs `{command[0]}`, which isn't on the PATH. Install this tool")
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as e:
        raise ClusterError(
            f"{what}: `{' '.join(command[:3])}` didn't end within {timeout:.0f} s. Check the connection to the cluster"
        ) from e
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ClusterError(f"{what}: {lines[-1].strip() if lines else f'exit code {done.returncode}'}")
    return done.stdout


@contextlib.contextmanager
def _tunnel(command: list[str], token: str | None) -> Iterator[tuple[str, str | None]]:
    """Runs a port-forwarding command within the context, and yields (URL, token).

    The command's last argument is a free local port, or `PORT:8265` for kubectl.
    """
    if not shutil.which(command[0]):
        raise ClusterError(f"reaching the cluster needs `{command[0]}`, which isn't on the PATH. Install this tool")
    port = processes.free_port()
    place = f"{port}:8265" if command[0] == "kubectl" else str(port)
    process = subprocess.Popen([*command, place], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + TUNNEL_S
    try:
        while not (private.ours(url) and dashboard.probe(url, token) == 200):  # another process may have taken the port meanwhile
            if process.poll() is not None:
                said = (process.stderr.read() if process.stderr else "").strip().splitlines()
                raise ClusterError(f"`{' '.join(command[:3])}` failed: {said[-1] if said else process.returncode}")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"`{' '.join(command[:3])}` didn't reach the cluster's Jobs API within "
                    f"{TUNNEL_S:.0f} s. Check that the cluster runs"
                )
            time.sleep(0.5)
        yield url, token
    finally:
        processes.end_tree(process, END_S)
        process.wait()


STATE_PORT = 6379  # Ray's default


def join(target: str | None) -> None:
    """Sets this process's environment so that Ray connects to a cluster. Call this function before you import Ray.

    `target`: a cluster of this machine; None changes nothing. Raises ConfigError if `target` isn't such a cluster, or if
    RAY_ADDRESS is also set. Raises ClusterError if the cluster doesn't answer.
    """
    if target is None:
        return
    if named := os.environ.get("RAY_ADDRESS"):
        raise ConfigError(f"--cluster: RAY_ADDRESS names a cluster too ({named}). Unset RAY_ADDRESS, or leave out --cluster")
    with endpoint(target) as cluster:
        file = cluster.file
        state = local.read(file.name) if file and file.local else None
        if file is None or state is None:
            raise ConfigError(
                f"--cluster: {target!r} isn't a cluster that `heliostat cluster up` started on this machine. For "
                "a cluster elsewhere, run the command on its head node with RAY_ADDRESS=auto"
            )
        os.environ |= {"RAY_ADDRESS": address(file), "RAY_AUTH_MODE": "token"}
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(state.token_file.resolve())


def address(cluster: ClusterFile) -> str:
    """Returns the address of Ray's state server (GCS), from the head's start command."""
    port = re.search(r"(?<!\S)--port[= ](\d+)", " ".join(cluster.raw["head_start_ray_commands"]))
    return f"{cluster.addresses[0]}:{port[1] if port else STATE_PORT}"
