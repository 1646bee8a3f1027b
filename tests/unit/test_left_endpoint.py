"""Tests that the next command ends an endpoint that a killed `serve` left on a cluster, but not an endpoint in use."""

from types import SimpleNamespace

import pytest
import ray
from heliostat.apps.serve import run
from heliostat.errors import ConfigError
from ray import serve
from ray.experimental import internal_kv

OURS = {"heliostat-front": ["Front"], "tiny-1": ["Model"]}


@pytest.fixture
def cluster(monkeypatch):
    """Simulates Ray Serve of a cluster: its applications, whether their command is running, and whether Serve was ended."""
    state = SimpleNamespace(applications={}, proxies={}, running=False, ended=False, ours=True)

    def status():
        found = {name: SimpleNamespace(deployments=dict.fromkeys(parts)) for name, parts in state.applications.items()}
        return SimpleNamespace(applications=found, proxies=state.proxies)

    def get_actor(name, namespace):
        if not state.running:
            raise ValueError("no actor of this name")

    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(serve, "shutdown", lambda: setattr(state, "ended", True))
    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda *_, **__: b"1" if state.ours else None)
    monkeypatch.setattr(internal_kv, "_internal_kv_del", lambda *_, **__: setattr(state, "ours", False))
    return state


def test_what_a_killed_command_has_left_is_ended_and_said(cluster, caplog):
    assert not run.end_left() and not cluster.ended
    cluster.applications = OURS
    assert run.end_left() and cluster.ended
    assert "whose command was killed: heliostat-front, tiny-1" in caplog.text


def test_an_endpoint_in_use_and_applications_of_others_stay(cluster):
    cluster.applications, cluster.running = OURS, True
    with pytest.raises(ConfigError, match="its command is still running"):
        run.end_left()
    cluster.applications, cluster.running = {**OURS, "app": ["Ingress", "Model"]}, False
    with pytest.raises(ConfigError, match="has other applications, and stopping this endpoint would stop these"):
        run.end_left()
    assert not cluster.ended


@pytest.mark.parametrize(
    "left", [{"heliostat-front": []}, {"heliostat-front": ["Front"], "tiny-1": []}, {"heliostat-front": [], "tiny-1": []}, {}]
)
def test_an_endpoint_that_was_killed_before_its_deployments_exist_is_ended(cluster, caplog, left):
    """It was taken for another command's, or wasn't noticed, and its proxy kept the port."""
    cluster.applications, cluster.proxies = left, {"node": "HEALTHY"}
    assert run.end_left() and cluster.ended
    assert ("heliostat-front" if left else "no application") in caplog.text


@pytest.mark.parametrize("left", [{"other": []}, {"heliostat-front": ["Front"], "other": ["Ingress"]}])
def test_an_application_of_others_without_deployments_stays(cluster, left):
    cluster.applications = left
    with pytest.raises(ConfigError, match="has other applications, and stopping this endpoint would stop these"):
        run.end_left()
    cluster.applications, cluster.proxies, cluster.running = {}, {"node": "HEALTHY"}, True
    with pytest.raises(ConfigError, match="its command is still running"):
        run.end_left()
    assert not cluster.ended


def test_a_serve_without_applications_that_others_have_started_stays(cluster):
    cluster.proxies, cluster.ours = {"node": "HEALTHY"}, False
    with pytest.raises(ConfigError, match="another program started Ray Serve on this cluster"):
        run.end_left()
    assert not cluster.ended


def test_stop_goes_with_a_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="--stop: needs --cluster"):
        run.stop()
