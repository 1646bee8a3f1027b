"""Checks the NetworkPolicy objects of a KubeRay file. Warns about pods that the objects leave open, and about connections that
the objects wrongly block.

Kubernetes combines all policies that select a pod. A pod that no policy selects is open to every other pod.

heliostat doesn't use KubeRay's own key `networkPolicy`. The operator rejects a cluster with this key unless a feature gate is
on. The gate is off by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from heliostat.cluster.cluster_file import ClusterFile, Section, groups

METRICS, DASHBOARD, DNS = 8080, 8265, 53
NAMES = {METRICS: ("metrics",), DASHBOARD: ("dashboard",), DNS: ("dns",)}  # names that policies may use for the ports
KUBERNETES_API = (443, 6443)
IDENTITY = {80: "EKS and EC2", 988: "GKE"}  # ports of the services that give pods their credentials
GATES = {"networkPolicy": "RayClusterNetworkPolicy", "tlsOptions": "RayClusterMTLS"}  # of KubeRay 1.7, both off by default

MADE = {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}
SUBMITTER = "submitter"  # the pod that submits a RayJob; it listens on no port

Rule = Section  # a Kubernetes rule: `from` or `to`, and `ports`


@dataclass(frozen=True)
class PodRules:
    """Lists the rules that apply to one kind of pod. The rules of a direction are None if no policy restricts this direction."""

    ingress: list[Rule] | None
    egress: list[Rule] | None


@dataclass(frozen=True)
class PodKind:
    """Describes the pods of one node group, or a RayJob's submitter."""

    name: str
    template: Section
    added_labels: dict[str, str] = field(default_factory=dict)  # labels that KubeRay adds

    @property
    def labels(self) -> dict[str, str]:
        return {**self.added_labels, **((self.template.get("metadata") or {}).get("labels") or {})}


def warnings(cluster: ClusterFile) -> Iterator[str]:
    """Yields a warning for each pod that is open to other pods, and for each necessary connection that the policies block."""
    gated = [key for key in GATES if cluster.spec.get(key) is not None]
    for key in gated:
        yield (
            (
                f"{key}: KubeRay rejects the cluster unless its operator has the feature gate {GATES[key]}, which is "
                "off by default. "
            )
            + (
                "Use a NetworkPolicy object, like clusters/kuberay-h100.yaml"
                if key == "networkPolicy"
                else "Turn on the feature gate first"
            )
        )
    if "networkPolicy" in gated:
        return  # the operator makes the policies
    kinds = _kinds(cluster)
    rules = {kind.name: _rules(cluster, kind) for kind in kinds}
    if exposed := [name for name, own in rules.items() if own.ingress is None and name != SUBMITTER]:
        yield (
            f"NetworkPolicy: every pod of Kubernetes can reach Ray's ports of {', '.join(exposed)}. Add an "
            "Ingress policy that selects these pods, like clusters/kuberay-h100.yaml"
        )
    for kind in kinds:
        yield from _unreachable(cluster, kind, rules[kind.name], kinds)


def _kinds(cluster: ClusterFile) -> list[PodKind]:
    named = {} if cluster.kind == "RayJob" else {"ray.io/cluster": cluster.name}  # KubeRay names a RayJob's cluster
    head, *workers = groups(cluster.spec)
    kinds = [PodKind("head", head[1]["template"], {**MADE, **named, "ray.io/node-type": "head", "ray.io/group": "headgroup"})]
    for name, group in workers:
        labels = {**MADE, **named, "ray.io/node-type": "worker", "ray.io/group": name}
        kinds.append(PodKind(name, group["template"], labels))
    job: Section = cluster.raw["spec"] if cluster.kind == "RayJob" else {"submissionMode": ""}
    if job.get("submissionMode", "K8sJobMode") == "K8sJobMode":
        kinds.append(PodKind(SUBMITTER, job.get("submitterPodTemplate") or {}))
    return kinds


def _policies(cluster: ClusterFile) -> Iterator[Section]:
    for document in cluster.others:
        namespace = (document.get("metadata") or {}).get("namespace", "default")
        if document.get("kind") == "NetworkPolicy" and namespace == cluster.namespace:
            yield document.get("spec") or {}


def _rules(cluster: ClusterFile, kind: PodKind) -> PodRules:
    rules: dict[str, list[Rule] | None] = {"Ingress": None, "Egress": None}
    for policy in _policies(cluster):
        if not _selects(policy.get("podSelector"), kind.labels):
            continue
        for direction in policy.get("policyTypes") or (["Ingress", "Egress"] if "egress" in policy else ["Ingress"]):
            rules[direction] = [*(rules[direction] or []), *(policy.get(direction.lower()) or [])]
    return PodRules(rules["Ingress"], rules["Egress"])


def _selects(selector: Section | None, labels: dict[str, str]) -> bool:
    """Checks whether a Kubernetes label selector matches these labels. An empty selector selects every pod."""
    selector = selector or {}
    if not (selector.get("matchLabels") or {}).items() <= labels.items():
        return False
    for one in selector.get("matchExpressions") or []:
        key, values, operator = one.get("key"), one.get("values") or [], one.get("operator")
        results = {"In": labels.get(key) in values, "NotIn": labels.get(key) not in values,
                 "Exists": key in labels, "DoesNotExist": key not in labels}  # fmt: skip
        if not results.get(operator, False):
            return False
    return True


def _unreachable(cluster: ClusterFile, kind: PodKind, own: PodRules, kinds: list[PodKind]) -> Iterator[str]:
    """Yields a warning for each connection that the pods need but no rule allows."""
    of_ray = [other for other in kinds if other.name != SUBMITTER]
    for direction, rules in (("ingress", own.ingress), ("egress", own.egress)):
        if kind.name == SUBMITTER or rules is None:
            continue
        if not all(_lets_pods_through(rules, other) for other in of_ray):
            yield (
                f"NetworkPolicy: {kind.name}: {direction}: doesn't allow all of the cluster's own pods. Allow "
                "the cluster's own pods on every port"
            )
    yield from _unsubmitted(kind, own, kinds)
    if own.egress is not None:
        if not _open(own.egress, DNS, kinds, "UDP"):
            yield f"NetworkPolicy: {kind.name}: egress: pods can't look up names, not even the name of the head. Allow port {DNS}"
        autoscales = kind.name == "head" and cluster.spec.get("enableInTreeAutoscaling")
        if autoscales and not any(_open(own.egress, port, kinds) for port in KUBERNETES_API):
            yield (
                "NetworkPolicy: head: egress: the autoscaler can't reach Kubernetes. Allow port 443 or 6443 of the Kubernetes API"
            )
        account = (kind.template.get("spec") or {}).get("serviceAccountName")
        if account and not any(_open(own.egress, port, kinds) for port in IDENTITY):
            where = ", ".join(f"{port} for {cloud}" for port, cloud in IDENTITY.items())
            yield (
                f"NetworkPolicy: {kind.name}: egress: pods can't fetch the credentials of their service account. Allow {where}"
            )
    if own.ingress is not None and kind.name != SUBMITTER:
        if kind.name == "head" and cluster.kind == "RayJob" and not _open(own.ingress, DASHBOARD, kinds):
            yield (
                f"NetworkPolicy: head: ingress: the operator can't ask for the job's state. Allow port {DASHBOARD} from the "
                "operator"
            )
        if not _open(own.ingress, METRICS, kinds):
            yield f"NetworkPolicy: {kind.name}: ingress: Prometheus can't read Ray's metrics. Allow port {METRICS}"


def _unsubmitted(kind: PodKind, own: PodRules, kinds: list[PodKind]) -> Iterator[str]:
    """Yields warnings if the rules block the connection from a RayJob's submitter to the head's dashboard."""
    named = {other.name: other for other in kinds}
    if SUBMITTER not in named:
        return
    if kind.name == "head" and own.ingress is not None and not _lets_pods_through(own.ingress, named[SUBMITTER], DASHBOARD):
        yield (
            f"NetworkPolicy: head: ingress: the pod that submits the job can't reach the head. Allow port {DASHBOARD} from this "
            "pod, selected by a label of submitterPodTemplate"
        )
    if kind.name == SUBMITTER and own.egress is not None and not _lets_pods_through(own.egress, named["head"], DASHBOARD):
        yield f"NetworkPolicy: {SUBMITTER}: egress: the pod can't reach the head. Allow port {DASHBOARD} to the head"


def _lets_pods_through(rules: list[Rule], kind: PodKind, port: int | None = None) -> bool:
    """Checks whether a rule allows these pods: because the rule names their labels, or because the rule has no peers.

    The rule must cover every port. If `port` is given, a rule for that port is enough.
    """
    for rule in rules:
        peers = rule.get("from") or rule.get("to")
        ports = rule.get("ports")
        if ports and not any(_every(entry) or (port and _holds(entry, port, "TCP")) for entry in ports):
            continue
        if not peers or any(
            "podSelector" in p and "namespaceSelector" not in p and _selects(p["podSelector"], kind.labels) for p in peers
        ):
            return True
    return False


def _open(rules: list[Rule], port: int, kinds: list[PodKind], protocol: str = "TCP") -> bool:
    """Checks whether a rule opens the port to peers that aren't the cluster's own pods. A rule without ports opens all ports."""
    for rule in rules:
        peers = rule.get("from") or rule.get("to")
        if peers and all(_own(peer, kinds) for peer in peers):
            continue
        ports = rule.get("ports")
        if not ports or any(_holds(entry, port, protocol) for entry in ports):
            return True
    return False


def _own(peer: Section, kinds: list[PodKind]) -> bool:
    """Checks whether a rule's peer selects only the cluster's own pods."""
    selector = peer.get("podSelector")
    if "namespaceSelector" in peer or "ipBlock" in peer or not selector:  # an empty selector selects the whole namespace
        return False
    return any(_selects(selector, kind.labels) for kind in kinds)


def _holds(entry: Section, port: int, protocol: str) -> bool:
    """Checks whether an entry of a rule's ports covers a port. An entry without a port covers all ports of its protocol.

    The default protocol is TCP.
    """
    first = entry.get("port")
    if entry.get("protocol", "TCP") != protocol:
        return False
    if isinstance(first, int):
        return first <= port <= entry.get("endPort", first)
    return first is None or first.startswith(NAMES.get(port, ()))


def _every(entry: Section) -> bool:
    """Checks whether an entry of a rule's ports covers every TCP port. Ray's pods use only TCP."""
    first = entry.get("port")
    of_all = first is None or (first == 1 and entry.get("endPort", 0) == 65535)
    return entry.get("protocol", "TCP") == "TCP" and of_all
