"""Tests clusters on Kubernetes from `cluster up` to a ready head, with a replacement for kubectl."""

import json
import os

import pytest
import yaml
from heliostat.cluster import cluster_file, endpoint, kuberay, launch
from heliostat.errors import ClusterError

from tests.unit.build_job import ROOT

pytestmark = pytest.mark.usefixtures("in_repository")


def read(name: str) -> cluster_file.ClusterFile:
    return cluster_file.read(ROOT / "clusters" / f"{name}.yaml")


KUBECTL = """#!/bin/sh
case "$*" in
  *"get rayjob gpt-1b"*) printf '%s' "$RAY_CLUSTER" ;;
  *"get secret gpt-1b-x7k2p"*) printf 'czNjcmV0' ;;
  *) echo "unexpected: $*" >&2; exit 1 ;;
esac
"""


def test_a_rayjobs_head_and_token_are_found_by_the_name_that_kuberay_gave_its_cluster(tmp_path, monkeypatch):
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RAY_CLUSTER", "gpt-1b-x7k2p")
    cluster = read("kuberay-job")
    name = endpoint.kube_name(cluster)
    assert endpoint.kube_service(cluster, name) == "gpt-1b-x7k2p-head-svc"
    assert endpoint.kube_token(cluster, name) == "s3cret"
    monkeypatch.setenv("RAY_CLUSTER", "")
    with pytest.raises(ClusterError, match="has no cluster yet"):
        endpoint.kube_name(cluster)
    assert endpoint.kube_service(read("kuberay-h100"), "heliostat-h100") == "heliostat-h100-head-svc"


KUBERAY = """#!/usr/bin/env python3
import json, os, pathlib, sys
folder = pathlib.Path(os.environ["KUBE"])
calls, words = folder / "calls", " ".join(sys.argv[1:])
with calls.open("a") as f:
    f.write(words + "\\n")
made = " create " in f" {calls.read_text()} " or "apply" in calls.read_text()
scene = json.loads((folder / "scene.json").read_text())
if scene.get("fails") in words.split() and (scene["fails"] == "events" or calls.read_text().count(" raycluster ") < 4):
    sys.exit("Error from server (Forbidden)")
if "get events" in words:
    polls = calls.read_text().count("get events")
    print(json.dumps({"items": scene["old"] + [e for e in scene["events"] if made and polls > 1]}))
elif " get " in f" {words} ":
    print(json.dumps({"status": scene["status"] if calls.read_text().count("-o json") > 3 else {}}))
elif words.split()[0] in ("apply", "create"):
    if "-" in sys.argv:
        (folder / f"{words.split()[0]}.yaml").write_text(sys.stdin.read())
else:
    sys.exit(f"unexpected: {words}")
"""


def event(name: str, reason: str, message: str, uid: str = "1", warning: bool = True, count: int = 1) -> dict:
    about = {"kind": "RayCluster", "name": name}
    kind = "Warning" if warning else "Normal"
    return {"metadata": {"uid": uid}, "count": count, "type": kind, "reason": reason, "message": message, "involvedObject": about}


@pytest.fixture
def kubernetes(tmp_path, monkeypatch):
    """Returns a `kubectl` whose cluster is in the state that `scene` describes, from the second query on."""
    (tmp_path / "kubectl").write_text(KUBERAY)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("KUBE", str(tmp_path))
    monkeypatch.setattr(kuberay, "POLL_S", 0.01)

    def scene(status: dict, events=(), old=(), fails: str = ""):
        told = {"status": status, "events": list(events), "old": list(old), "fails": fails}
        (tmp_path / "scene.json").write_text(json.dumps(told))
        (tmp_path / "calls").unlink(missing_ok=True)
        return tmp_path

    return scene


READY = {"state": "ready", "conditions": [{"type": "HeadPodReady", "status": "True"}]}


def test_up_on_kubernetes_ends_when_the_head_is_ready_and_shows_the_operators_events(kubernetes, caplog):
    old = event("heliostat-h100", "InvalidRayClusterSpec", "of an earlier file", uid="0")
    kubernetes(READY, [event("heliostat-h100-head-x", "FailedScheduling", "no node has 4 CPUs", uid="2")], [old])
    assert "the head is ready" in launch.up(read("kuberay-h100"))["note"]
    assert "FailedScheduling: no node has 4 CPUs" in caplog.text and "earlier" not in caplog.text


def test_up_on_kubernetes_fails_with_the_operators_reason_when_it_rejects_the_file(kubernetes):
    cluster = read("kuberay-h100")
    why = "spec.networkPolicy requires the RayClusterNetworkPolicy feature gate to be enabled"
    kubernetes({}, [event("heliostat-h100", "InvalidRayClusterSpec", why)])
    with pytest.raises(ClusterError, match=rf"kuberay-h100\.yaml: KubeRay rejects the file .*{why}"):
        launch.up(cluster)


def test_up_on_kubernetes_fails_with_the_earlier_reason_when_the_same_file_is_applied_again(kubernetes, monkeypatch):
    """The operator writes no second event and no status for a file that hasn't changed."""
    monkeypatch.setattr(kuberay, "TAKEN_UP_S", 0.1)
    cluster = read("kuberay-h100")
    kubernetes({}, old=[event("heliostat-h100", "InvalidRayClusterSpec", "why")])
    with pytest.raises(ClusterError, match=r"KubeRay rejects the file \(InvalidRayClusterSpec\): why"):
        kuberay.start(cluster, seconds=20)


def test_up_on_kubernetes_ends_after_a_deadline_with_the_last_warning(kubernetes):
    cluster = read("kuberay-h100")
    kubernetes({}, [event("heliostat-h100-head-x", "FailedScheduling", "no node has 4 CPUs")])
    with pytest.raises(ClusterError, match=r"not ready after 1 s \(last warning: .*no node has 4 CPUs"):
        kuberay.start(cluster, seconds=1)


@pytest.mark.parametrize("fails", ["events", "raycluster"])
def test_up_on_kubernetes_waits_on_where_events_may_not_be_read_or_a_call_fails_now_and_then(fails, kubernetes):
    kubernetes(READY, fails=fails)
    assert "the head is ready" in launch.up(read("kuberay-h100"))["note"]


def test_up_on_kubernetes_is_not_ended_by_the_rejection_of_another_cluster(kubernetes):
    kubernetes(READY, [event("heliostat-h100-large", "InvalidRayClusterSpec", "of another")])
    assert "the head is ready" in launch.up(read("kuberay-h100"))["note"]


@pytest.mark.parametrize(
    ("status", "note"), [({"jobDeploymentStatus": "Suspended"}, "queued"), ({"jobDeploymentStatus": "Running"}, "is running")]
)
def test_a_rayjob_is_created_after_its_network_policy_is_applied_and_may_be_queued(status, note, kubernetes):
    folder = kubernetes(status)
    assert note in launch.up(read("kuberay-job"))["note"]
    assert yaml.safe_load((folder / "apply.yaml").read_text())["kind"] == "NetworkPolicy"
    assert yaml.safe_load((folder / "create.yaml").read_text())["kind"] == "RayJob"


def test_a_rayjob_that_fails_at_its_start_is_an_error(kubernetes):
    kubernetes({"jobDeploymentStatus": "ValidationFailed", "message": "backoffLimit must be positive"})
    with pytest.raises(ClusterError, match=r"the job is ValidationFailed: backoffLimit must be positive"):
        launch.up(read("kuberay-job"))
