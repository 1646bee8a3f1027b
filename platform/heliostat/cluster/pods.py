"""Warns about pod settings in a KubeRay manifest that would fail, or that are less safe than they could be."""

from __future__ import annotations

import re
from collections.abc import Iterator

from heliostat.cluster import network_policies
from heliostat.cluster.cluster_file import GPU_RESOURCES, ClusterFile, Section, groups
from heliostat.config.spec import Job

RDMA = re.compile(r"^rdma/|/efa$|/ib$|/roce$|hugepages.*rdma|^vpc\.amazonaws\.com/efa$")
HOOK = re.compile(r"heliostat\.cluster\.spot\s+now(?:\s+--seconds[ =](\d+(?:\.\d+)?))?")
HOOK_S = 90.0  # the default of --seconds of `heliostat.cluster.spot now`
ENDING_S = 15.0  # seconds that Ray needs to end after the hook


def warnings(cluster: ClusterFile) -> Iterator[str]:
    """Yields warnings about the pods of a KubeRay manifest; none for a launcher file."""
    if cluster.kind == "launcher":
        return
    spec = cluster.spec
    yield from network_policies.warnings(cluster)
    yield from _made_by_kuberay(cluster)
    if cluster.kind == "RayJob" and not cluster.raw["spec"].get("activeDeadlineSeconds"):
        yield "activeDeadlineSeconds: not set, so a job that hangs keeps its GPUs. Set it to the job's maximum duration"
    for name, group in groups(spec):
        pod = group["template"]["spec"]
        yield from _privileges(name, pod)
        if _amount(pod, GPU_RESOURCES):
            yield from _gpu_pod(name, pod)
            yield from _ending(name, pod)


def _made_by_kuberay(cluster: ClusterFile) -> Iterator[str]:
    """Warns about the containers that belong to no node group: the autoscaler in the head's pod, and the submitter of a
    RayJob."""
    spec = cluster.spec
    if spec.get("enableInTreeAutoscaling"):
        own = (spec.get("autoscalerOptions") or {}).get("securityContext") or {}
        pod = {**spec["headGroupSpec"]["template"]["spec"], "containers": [{"name": "autoscaler", "securityContext": own}]}
        yield from _privileges("autoscaler", pod)
    if cluster.kind == "RayJob" and cluster.raw["spec"].get("submissionMode", "K8sJobMode") == "K8sJobMode":
        template = cluster.raw["spec"].get("submitterPodTemplate")
        if template is None:
            yield (
                "submitterPodTemplate: not set, so the pod that submits has no securityContext, and a restricted namespace "
                "rejects the pod. Add a template with a securityContext"
            )
        else:
            yield from _privileges("submitter", template["spec"])


def grace(cluster: ClusterFile, job: Job) -> Iterator[str]:
    """Warns about preStop hooks that give the workers of a deleted pod less time than the job's `checkpoint.grace` requires."""
    if cluster.kind == "launcher":
        return
    for name, group in groups(cluster.spec):
        pod = group["template"]["spec"]
        seconds = _hook_seconds(pod)
        if _amount(pod, GPU_RESOURCES) and seconds is not None and seconds < job.checkpoint.grace:
            yield (
                f"{name}: the preStop hook gives the workers {seconds:g} s, but the job's checkpoint.grace is "
                f"{job.checkpoint.grace:g}. Raise --seconds (and terminationGracePeriodSeconds), or lower "
                "checkpoint.grace"
            )


def _privileges(name: str, pod: Section) -> Iterator[str]:
    """Warns about violations of the restricted Pod Security Standard, except for rules that a Ray pod can't meet."""
    shared = pod.get("securityContext") or {}
    for container in pod["containers"]:
        own = {**shared, **(container.get("securityContext") or {})}
        missing = []
        if own.get("runAsNonRoot") is not True:
            missing.append("runAsNonRoot: true")
        if (own.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
            missing.append("seccompProfile: {type: RuntimeDefault}")
        if own.get("allowPrivilegeEscalation") is not False:
            missing.append("allowPrivilegeEscalation: false")
        if "ALL" not in ((own.get("capabilities") or {}).get("drop") or []):
            missing.append("capabilities: {drop: [ALL]}")
        if missing:
            yield f"{name}: container {container.get('name')}: securityContext lacks {', '.join(missing)}. Add these settings"
        network = [r for r in _resources(container) if RDMA.search(r)]
        if network and "IPC_LOCK" not in ((own.get("capabilities") or {}).get("add") or []):
            yield (
                f"{name}: container {container.get('name')}: {network[0]} locks memory, which the container "
                "isn't allowed to do. Add the capability IPC_LOCK"
            )


def _gpu_pod(name: str, pod: Section) -> Iterator[str]:
    if not pod.get("tolerations"):
        yield (
            f"{name}: no tolerations: nodes with GPUs usually have a taint (nvidia.com/gpu), so the pods would wait "
            "forever. Add a toleration"
        )
    if not pod.get("nodeSelector") and not pod.get("affinity"):
        yield (
            f"{name}: no nodeSelector, so the pods may run on nodes with another GPU. Add a nodeSelector with "
            "the GPU's product label"
        )


def _ending(name: str, pod: Section) -> Iterator[str]:
    """Warns if a pod that is deleted doesn't first drain its Ray node, or has too little time to do so."""
    seconds, allowed = _hook_seconds(pod), float(pod.get("terminationGracePeriodSeconds", 30))
    if seconds is None:
        yield (
            f"{name}: a deleted pod ends its workers at once, and loses the steps since the last checkpoint. Add "
            "the preStop hook `python -m heliostat.cluster.spot now`"
        )
    elif seconds + ENDING_S > allowed:
        yield (
            f"{name}: terminationGracePeriodSeconds: {allowed:g} is too short for a preStop hook of {seconds:g} "
            f"s. Set it to {seconds + ENDING_S:g} or more"
        )


def _hook_seconds(pod: Section) -> float | None:
    """Returns the seconds that the preStop hook gives the workers; None if the pod has no such hook."""
    for container in pod["containers"]:
        command = (((container.get("lifecycle") or {}).get("preStop") or {}).get("exec") or {}).get("command") or []
        if match := HOOK.search(" ".join(map(str, command))):
            return float(match[1]) if match[1] else HOOK_S
    return None


def _resources(container: Section) -> Section:
    resources = container.get("resources") or {}
    return {**(resources.get("requests") or {}), **(resources.get("limits") or {})}


def _amount(pod: Section, names: tuple[str, ...]) -> bool:
    return any(name in _resources(container) for container in pod["containers"] for name in names)
