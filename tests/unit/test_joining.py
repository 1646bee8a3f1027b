"""Tests `--cluster` of `infer` and `serve`: the clusters that a command may use, and its errors for others."""

import os
from pathlib import Path

import pytest
from heliostat.cluster import cluster_file, endpoint
from heliostat.errors import ClusterError, ConfigError

LOCAL = Path(__file__).parents[2] / "clusters" / "local.yaml"


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_address_is_that_of_the_heads_start_command():
    assert endpoint.address(cluster_file.read(LOCAL)) == "127.0.0.2:6389", "and not the port of the dashboard or of Ray's client"


def test_nothing_is_joined_unless_asked():
    before = dict(os.environ)
    endpoint.join(None)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("target", "error", "said"),
    [("nope", ConfigError, "'nope' isn't a running local cluster"), (str(LOCAL), ClusterError, "this cluster isn't running"),
     ("http://127.0.0.1:9", ClusterError, "no Ray cluster answers here")],
)  # fmt: skip
def test_what_does_not_run_here_is_said_in_a_line(target, error, said):
    with pytest.raises(error, match=said):
        endpoint.join(target)
    assert "RAY_ADDRESS" not in os.environ


def test_two_clusters_are_not_asked_for_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS names a cluster too \(10.0.0.1:6379\)\. Unset RAY_ADDRESS"):
        endpoint.join("local")
