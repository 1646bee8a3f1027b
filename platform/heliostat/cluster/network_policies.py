"""Finds what the NetworkPolicy objects in a KubeRay file leave open, and what they close that the cluster needs.

Kubernetes adds up all policies that select a pod. A pod that no policy selects is open to every other pod. KubeRay's own key
`networkPolicy` isn't used: the operator rejects a cluster that has it unless a feature gate is on, which it isn't by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from heliostat.cluster.cluster_file import ClusterFile, groups

METRICS, DASHBOARD, DNS = 8080, 8265, 53
KUBERNETES_API = (443, 6443)
IDENTITY = {80: "EKS and EC2", 988: "GKE"}  # ports of the services that give pods their credentials
GATES = {"networkPolicy": "RayClusterNetworkPolicy", "tlsOptions": "RayClusterMTLS"}  # of KubeRay 1.7, both off by default

Rule = dict[str, Any]  # of Kubernetes: from or to, and ports


@dataclass(frozen=True)
class Rules:
    """Lists the rules that apply to one kind of pod; None where no policy closes the direction."""

    ingress: list[Rule] | None
    egress: list[Rule] | None


@dataclass(frozen=True)
class PodKind:
    """Describes the pods of one group of the cluster, or a RayJob's submitter."""

    name: str
    template: dict[str, Any]
    made: dict[str, str] = field(default_factory=dict)  # labels that KubeRay adds

    @property
    def labels(self) -> dict[str, str]:
        return {**self.made, **((self.template.get("metadata") or {}).get("labels") or {})}


def warnings(cluster: ClusterFile) -> Iterator[str]:
    """Yields a warning for each pod that is open to other pods, and for each connection that a policy forgets."""
    gated = [key for key in GATES if cluster.spec.get(key) is not None]
    for key in gated:
        yield (
            f"{key}: KubeRay rejects the cluster unless its operator has the feature gate {GATES[key]}, which is off by default; "
            + ("use a NetworkPolicy object, as clusters/kuberay-h100.yaml does" if key == "networkPolicy" else "turn it on first")
        )
    if "networkPolicy" in gated:
        return  # the operator makes the policies
    kinds = _kinds(cluster)
    rules = {kind.name: _rules(cluster, kind) for kind in kinds}
    if exposed := [name for name, own in rules.items() if own.ingress is None]:
        yield (
            f"NetworkPolicy: every pod of Kubernetes reaches Ray's ports of {', '.join(exposed)}; add a policy for Ingress that "
            "selects them, as clusters/kuberay-h100.yaml does"
        )
    for kind in kinds:
        yield from _unreachable(cluster, kind, rules[kind.name], kinds)


def _kinds(cluster: ClusterFile) -> list[PodKind]:
    named = {} if cluster.kind == "RayJob" else {"ray.io/cluster": cluster.name}  # KubeRay names a RayJob's cluster
    head, *workers = groups(cluster.spec)
    kinds = [PodKind("head", head[1]["template"], {**named, "ray.io/node-type": "head", "ray.io/group": "headgroup"})]
    for name, group in workers:
        kinds.append(PodKind(name, group["template"], {**named, "ray.io/node-type": "worker", "ray.io/group": name}))
    submitter = cluster.raw["spec"].get("submitterPodTemplate") if cluster.kind == "RayJob" else None
    return [*kinds, PodKind("submitter", submitter)] if submitter else kinds


def _policies(cluster: ClusterFile) -> Iterator[dict[str, Any]]:
    for document in cluster.others:
        namespace = (document.get("metadata") or {}).get("namespace", "default")
        if document.get("kind") == "NetworkPolicy" and namespace == cluster.namespace:
            yield document.get("spec") or {}


def _rules(cluster: ClusterFile, kind: PodKind) -> Rules:
    given: dict[str, list[Rule] | None] = {"Ingress": None, "Egress": None}
    for policy in _policies(cluster):
        if not _selects(policy.get("podSelector"), kind.labels):
            continue
        for direction in policy.get("policyTypes") or (["Ingress", "Egress"] if "egress" in policy else ["Ingress"]):
            given[direction] = [*(given[direction] or []), *(policy.get(direction.lower()) or [])]
    return Rules(given["Ingress"], given["Egress"])


def _selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    """Checks a label selector; the empty one selects every pod, and `matchExpressions` are taken as not matching."""
    selector = selector or {}
    return not selector.get("matchExpressions") and (selector.get("matchLabels") or {}).items() <= labels.items()


def _unreachable(cluster: ClusterFile, kind: PodKind, own: Rules, kinds: list[PodKind]) -> Iterator[str]:
    """Yields what the pods need and no rule lets through."""
    for direction, rules in (("ingress", own.ingress), ("egress", own.egress)):
        if rules is not None and not all(_lets_pods_through(rules, other) for other in kinds):
            yield f"NetworkPolicy: {kind.name}: {direction}: not all of the cluster's own pods; allow them on every port"
    if own.egress is not None:
        if not _open(own.egress, DNS):
            yield f"NetworkPolicy: {kind.name}: egress: no name can be looked up, the head's neither; allow port {DNS}"
        autoscales = kind.name == "head" and cluster.spec.get("enableInTreeAutoscaling")
        if autoscales and not any(_open(own.egress, port) for port in KUBERNETES_API):
            yield "NetworkPolicy: head: egress: the autoscaler cannot reach Kubernetes; allow port 443 or 6443 of its API"
        account = (kind.template.get("spec") or {}).get("serviceAccountName")
        if account and not any(_open(own.egress, port) for port in IDENTITY):
            where = ", ".join(f"{port} for {cloud}" for port, cloud in IDENTITY.items())
            yield f"NetworkPolicy: {kind.name}: egress: pods cannot fetch the credentials of their service account; allow {where}"
    if own.ingress is not None and kind.name != "submitter":
        if kind.name == "head" and cluster.kind == "RayJob" and not _open(own.ingress, DASHBOARD):
            yield f"NetworkPolicy: head: ingress: the operator cannot ask for the job's state; allow port {DASHBOARD} from it"
        if not _open(own.ingress, METRICS):
            yield f"NetworkPolicy: {kind.name}: ingress: Prometheus cannot read Ray's metrics; allow port {METRICS}"


def _lets_pods_through(rules: list[Rule], kind: PodKind) -> bool:
    """Checks whether a rule without ports names the pods by their labels, or names no peer at all."""
    for rule in rules:
        peers = rule.get("from") or rule.get("to")
        if not rule.get("ports") and (
            not peers
            or any("podSelector" in p and "namespaceSelector" not in p and _selects(p["podSelector"], kind.labels) for p in peers)
        ):
            return True
    return False


def _open(rules: list[Rule], port: int) -> bool:
    """Checks whether a rule lets the port through beyond the pods of the cluster's own namespace; one without ports lets all."""
    for rule in rules:
        peers = rule.get("from") or rule.get("to")
        if peers and all("namespaceSelector" not in p and "ipBlock" not in p for p in peers):
            continue
        ports = rule.get("ports") or [{"port": port}]
        for entry in ports:
            first = entry.get("port")
            if first == port or (isinstance(first, int) and first <= port <= entry.get("endPort", first)):
                return True
    return False
