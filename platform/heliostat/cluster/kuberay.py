"""Starts a cluster or a job on Kubernetes. Waits until KubeRay has accepted and started the cluster or job, and reports the
operator's messages.

`kubectl apply` succeeds as soon as Kubernetes has stored the file. The operator accepts or rejects the file later. The operator
reports its decision in the resource's status and in events.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from heliostat.cluster.cluster_file import ClusterFile, Section
from heliostat.cluster.endpoint import tool
from heliostat.errors import ClusterError

log = logging.getLogger(__name__)

UP_S = 1200.0  # long enough for nodes that an autoscaler adds, and for an image of many gigabytes
POLL_S = 2.0
TAKEN_UP_S = 30.0  # within this time, the operator gives a status to an accepted resource
OF_JOB = r"-(raycluster-)?[a-z0-9]{5}"  # KubeRay appends this to a job's name for the name of the job's cluster
FAILURES = 10  # consecutive failures of a call after which the wait ends
JOB_FAILED = ("Failed", "ValidationFailed")
JOB_QUEUED = ("Suspended", "Suspending")
JOB_UP = ("Running", "Complete")


@dataclass(frozen=True)
class KubernetesEvent:
    """Holds an event of Kubernetes; `count` grows when the same event occurs again."""

    uid: str
    count: int
    warning: bool
    reason: str
    about: str
    name: str
    message: str

    @property
    def rejects(self) -> bool:
        """Checks whether the event reports that the operator rejects the resource."""
        return self.warning and self.reason.startswith("Invalid")


def start(cluster: ClusterFile, seconds: float = UP_S) -> str:
    """Applies the file. Waits until the head of the cluster is ready, or until the job runs or is queued. Returns a note for
    the user.

    Raises ClusterError if the operator rejects the file or the job fails, with the operator's reason. If the start takes longer
    than `seconds`, raises ClusterError with the operator's last warning.
    """
    ask = Asker(cluster)
    earlier = ask.events()
    seen, rejected = {(e.uid, e.count) for e in earlier}, [e for e in earlier if e.rejects and _is_of(e, cluster)]
    _create(cluster)
    begun, warned = time.monotonic(), KubernetesEvent("", 0, False, "", "", "", "")
    while True:
        for event in ask.events():
            if (event.uid, event.count) in seen:
                continue
            seen.add((event.uid, event.count))
            if event.rejects and _is_of(event, cluster):
                raise _rejection(cluster, event)
            log.log(logging.WARNING if event.warning else logging.INFO, "%s: %s: %s", event.about, event.reason, event.message)
            warned = event if event.warning else warned
        status = ask.status()
        if note := _note(cluster, status):
            return note
        if rejected and not status and not ask.failed and time.monotonic() - begun > TAKEN_UP_S:  # unchanged file: no new event
            raise _rejection(cluster, rejected[-1])
        if time.monotonic() - begun > seconds:
            last = f" (last warning: {warned.about}: {warned.reason}: {warned.message})" if warned.uid else ""
            raise ClusterError(
                f"{cluster.path}: not ready after {seconds:.0f} s{last}. The start continues on Kubernetes. Run the command "
                f"again to wait, or run: kubectl -n {cluster.namespace} describe {cluster.kind.lower()} "
                f"{cluster.name}"
            )
        time.sleep(POLL_S)


def _rejection(cluster: ClusterFile, event: KubernetesEvent) -> ClusterError:
    return ClusterError(f"{cluster.path}: KubeRay rejects the file ({event.reason}): {event.message}. Correct the file")


class Asker:
    """Queries Kubernetes during a start. Occasional failures and unreadable events don't end the wait."""

    def __init__(self, cluster: ClusterFile) -> None:
        self.cluster, self.failed, self.first, self.blind = cluster, 0, True, False

    def events(self) -> list[KubernetesEvent]:
        """Returns the events; an empty list if the events can't be read.

        If the first call fails, all later calls return an empty list too. Otherwise, events from before the start would count as
        new.
        """
        first, self.first = self.first, False
        try:
            return [] if self.blind else list(_events(self.cluster))
        except ClusterError as e:
            if first:
                self.blind = True
                log.warning("%s. heliostat doesn't show the operator's events", e)
            return []

    def status(self) -> Section:
        """Returns the resource's status; empty if the status can't be read. Raises ClusterError after FAILURES failures in a
        row."""
        try:
            current = _status(self.cluster)
        except ClusterError:
            self.failed += 1
            if self.failed >= FAILURES:
                raise
            return {}
        self.failed = 0
        return current


def _is_of(event: KubernetesEvent, cluster: ClusterFile) -> bool:
    """Checks whether an event is about the resource or its job's cluster.

    Other resources' names may have the same beginning.
    """
    rest = event.name.removeprefix(cluster.name)
    return not rest or (cluster.kind == "RayJob" and re.fullmatch(OF_JOB, rest) is not None)


def _create(cluster: ClusterFile) -> None:
    """Applies the file, or creates a RayJob. Applying a RayJob that has already ended would start nothing, without an error."""
    what = f"starting {cluster.name}"
    if cluster.kind == "RayCluster":
        tool(["kubectl", "apply", "-f", str(cluster.path)], what)
        return
    if cluster.others:
        tool(["kubectl", "apply", "-f", "-"], what, stdin=yaml.safe_dump_all(cluster.others))
    tool(["kubectl", "create", "-f", "-"], what, stdin=yaml.safe_dump(cluster.raw))


def _note(cluster: ClusterFile, status: Section) -> str | None:
    """Returns the note for the user if the wait is over; else None. Raises ClusterError if the start failed."""
    where = f"kubectl -n {cluster.namespace} get {cluster.kind.lower()} {cluster.name}"
    if cluster.kind == "RayJob":
        state = str(status.get("jobDeploymentStatus", ""))
        if state in JOB_FAILED:
            reason = ": ".join(str(status[k]) for k in ("reason", "message") if status.get(k))
            raise ClusterError(f"{cluster.path}: the job is {state}{f': {reason}' if reason else ''}")
        if state in JOB_QUEUED:
            return f"the job is queued (suspended); it starts when its quota is free: {where}"
        return f"the job is {state.lower()}: {where}" if state in JOB_UP else None
    if status.get("state") == "failed":
        raise ClusterError(f"{cluster.path}: the cluster failed: {status.get('reason') or 'KubeRay gives no reason'}")
    ready = {c.get("type"): c.get("status") for c in status.get("conditions") or []}
    if status.get("state") == "suspended":
        return f"the cluster is suspended: {where}"
    if ready.get("HeadPodReady") == "True" or status.get("state") == "ready":
        return f"the head is ready: {where}"
    return None


def _status(cluster: ClusterFile) -> Section:
    command = ["kubectl", "-n", cluster.namespace, "get", cluster.kind.lower(), cluster.name, "-o", "json"]
    return json.loads(tool(command, f"reading the status of {cluster.name}", 60)).get("status") or {}


def _events(cluster: ClusterFile) -> Iterator[KubernetesEvent]:
    """Yields the events of the resource, and the events of the cluster and the pods that KubeRay makes for this resource. The
    names of the cluster and the pods begin with the resource's name."""
    command = ["kubectl", "-n", cluster.namespace, "get", "events", "-o", "json"]
    for item in json.loads(tool(command, f"reading the events of {cluster.name}", 60)).get("items") or []:
        about = item.get("involvedObject") or item.get("regarding") or {}
        name = str(about.get("name", ""))
        if name == cluster.name or name.startswith(f"{cluster.name}-"):
            yield KubernetesEvent(
                uid=str(item["metadata"]["uid"]),
                count=int(item.get("count") or (item.get("series") or {}).get("count") or 1),
                warning=item.get("type") == "Warning",
                reason=str(item.get("reason", "")),
                about=f"{about.get('kind', '')} {name}".strip(),
                name=name,
                message=str(item.get("message") or item.get("note") or "")[:500],
            )
