"""Tests the server of `heliostat run ui` as a process: its answers with and without a key, for programs and for browsers."""

from pathlib import Path

import mlflow
import pytest
import requests
from heliostat.chaos.servers import ServerProcess
from heliostat.tracking import ui

from tests.unit.test_ui import KEY, keys_in

BEARER = {"Authorization": f"Bearer {KEY}"}
BROWSER = {"Accept": "text/html,*/*", "Sec-Fetch-Site": "none"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Runs the server process of `heliostat run ui`, with a registered model in its own store."""
    folder = tmp_path_factory.mktemp("ui")
    store = f"sqlite:///{folder}/mlflow.db"
    own = {**ui.environment(store, "127.0.0.1", keys_in(folder)), "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts")}
    with ServerProcess(ui.command("127.0.0.1", "PORT"), "/health", folder / "log", own) as it:
        yield f"http://{it.endpoint}"


ASKED = [
    ("GET", "/"), ("GET", "/static-files/static/js/x.js"), ("GET", "/version"), ("GET", "/get-artifact?path=x&run_uuid=y"),
    ("GET", "/model-versions/get-artifact?path=x&name=y&version=1"), ("POST", "/graphql"),
    ("POST", "/api/2.0/mlflow/experiments/delete"), ("POST", "/ajax-api/2.0/mlflow/experiments/search"),
    ("POST", "/api/2.0/mlflow/registered-models/alias"), ("PUT", "/api/2.0/mlflow-artifacts/artifacts/x"),
    ("GET", "/api/3.0/mlflow/server-info"), ("POST", "/v1/traces"), ("GET", "/health/../version"), ("HEAD", "/"),
    ("OPTIONS", "/"), ("POST", "/health"), ("GET", "//health"), ("GET", "/health/"),
]  # fmt: skip


@pytest.mark.parametrize("sent", [{}, {"Authorization": "Bearer sk-another-key-of-somebody"}, {"Cookie": "x=y"}, BROWSER])
def test_the_server_of_the_ui_does_nothing_for_those_who_have_no_key(server, sent):
    for method, path in ASKED:
        answer = requests.request(method, f"{server}{path}", headers=sent, data=b"{}", timeout=30)
        assert answer.status_code == 401, (method, path)
        page = method == "GET" and sent is BROWSER
        assert ("This page needs a key" in answer.text) == page and (method == "HEAD" or page or "error" in answer.json())


def test_mlflows_own_client_does_all_with_the_key(server, tmp_path, monkeypatch):
    """Experiments, runs, artifacts, models, and aliases work with the key, and none of them without it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = mlflow.MlflowClient(tracking_uri=server, registry_uri=server)
    with pytest.raises(mlflow.exceptions.MlflowException, match=r"no API key.*MLFLOW_TRACKING_TOKEN"):
        client.create_experiment("refused")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", KEY)
    run = client.create_run(client.create_experiment("taken"))
    client.log_metric(run.info.run_id, "loss", 1.0)
    (tmp_path / "a.txt").write_text("artifact")
    client.log_artifact(run.info.run_id, str(tmp_path / "a.txt"))
    assert Path(client.download_artifacts(run.info.run_id, "a.txt", str(tmp_path / "there"))).read_text() == "artifact"
    client.create_registered_model("model")
    client.create_model_version("model", f"runs:/{run.info.run_id}/x", run.info.run_id)
    client.set_registered_model_alias("model", "champion", "1")
    assert client.get_model_version_by_alias("model", "champion").version in ("1", 1)
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    with pytest.raises(mlflow.exceptions.MlflowException, match=r"no API key.*MLFLOW_TRACKING_TOKEN"):
        client.delete_registered_model_alias("model", "champion")


def enter(server: str, key: str = KEY, **headers: str) -> requests.Response:
    return requests.post(f"{server}/heliostat-key", data=key, headers={"Origin": server, **headers}, timeout=30)


def test_a_browser_that_has_shown_the_key_gets_in_by_its_cookie_from_the_same_origin_alone(server):
    assert enter(server, "sk-another-key-of-somebody").status_code == 401
    assert enter(server, Origin="http://evil.example").status_code == 403
    given = enter(server)
    told = given.headers["Set-Cookie"].lower()
    assert given.status_code == 204 and "samesite=strict" in told and "httponly" in told and KEY not in told
    cookie = {"Cookie": given.headers["Set-Cookie"].partition(";")[0]}

    def status(method: str, path: str, **headers: str) -> int:
        return requests.request(method, f"{server}{path}", headers={**cookie, **headers}, json={}, timeout=30).status_code

    assert status("GET", "/", **BROWSER) == 200
    assert status("GET", "/ajax-api/2.0/mlflow/experiments/search?max_results=1", **{"Sec-Fetch-Site": "same-origin"}) == 200
    for other in ({"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://127.0.0.1:1"}):
        assert status("POST", "/ajax-api/2.0/mlflow/experiments/create", **other) == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:5000", "127.0.0.1.evil.example", "", "127.0.0.1/health?"])
def test_a_name_of_another_site_that_leads_to_the_ui_is_refused(server, host):
    assert requests.get(f"{server}/version", headers={**BEARER, "Host": host}, timeout=30).status_code in (400, 403)
    assert requests.get(f"{server}/version", headers={**BEARER, "Host": "localhost:1"}, timeout=30).status_code == 200
