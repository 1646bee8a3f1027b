"""Tests the checks before the start that a person can't do alone: machines, and servers with errors."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlflow
import pytest
from heliostat.cli.main import app as cli_app
from heliostat.cluster import endpoint as reach
from heliostat.cluster import local
from heliostat.config.fields import LARGEST, divisors
from heliostat.errors import AccessError, ConfigError, HeliostatError, StorageError, TrackingError
from heliostat.storage.retries import Backoff
from heliostat.tracking import mlflow_client
from heliostat.validation import check
from typer.testing import CliRunner

from tests.unit.build_job import job

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


@contextlib.contextmanager
def server(status: int, body: str) -> Iterator[str]:
    """Answers every request in the same way."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    running = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_a_job_of_gpus_is_not_right_where_there_are_none_and_no_cluster_is_named(monkeypatch):
    """If a cluster is named, its file decides; inside a cluster, Ray decides."""
    wanted = job(workers={"gpus": 1, "cpus": 8})
    with pytest.raises(ConfigError, match=r"^workers\.gpus: the workers need .* has no usable GPU"):
        check.check_devices(wanted, None)
    check.check_devices(wanted, ROOT / "clusters" / "aws-h100.yaml")
    with pytest.raises(ConfigError, match=r"^workers\.count: .* don't fit on .*aws-h100\.yaml"):
        check.check_devices(job(workers={"gpus": 9}), ROOT / "clusters" / "aws-h100.yaml")
    check.check_devices(job(), None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    check.check_devices(job(workers={"gpus": 1}), None)


def test_a_storage_that_cannot_be_made_is_told_by_its_key(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted")
    with pytest.raises(AccessError, match=r"^storage: .*/runs: can't write to the folder .*/runs\. Use another"):
        check.check_services(job(storage=str(tmp_path / "runs")))


def test_a_server_that_answers_with_an_error_is_not_said_to_be_silent():
    """The error has the status and its cause, because a full disk needs another fix than a stopped server."""
    full = "<html><p>No space left\n on device</p>"
    with server(503, full) as uri, pytest.raises(HeliostatError) as e:
        check._check_mlflow(uri)
    assert (
        str(e.value)
        == f"mlflow.uri: {uri} answers with an error: 503 Service Unavailable (No space left on device). Check the server"
    )


def test_a_run_that_resumes_trains_without_an_mlflow_that_is_away(tmp_path, caplog):
    """A restarted driver must not end because MLflow is down: its metrics are kept. A new run reports it at once."""
    wanted = job(**{"storage": str(tmp_path / "runs"), "mlflow.uri": "http://127.0.0.1:1"})
    with pytest.raises(TrackingError, match="doesn't answer"):
        check.check_services(wanted)
    check.check_services(wanted, resume=True)
    assert "doesn't answer" in caplog.text and "The run resumes without MLflow" in caplog.text
    with server(503, "busy") as uri:
        check.check_services(job(**{"storage": str(tmp_path / "runs"), "mlflow.uri": uri}), resume=True)
    with server(401, "who are you") as uri, pytest.raises(HeliostatError, match="401"):
        check.check_services(job(**{"storage": str(tmp_path / "runs"), "mlflow.uri": uri}), resume=True)


def test_a_run_that_resumes_waits_for_a_store_that_is_away(tmp_path, monkeypatch, caplog):
    answers = iter([StorageError("away"), StorageError("away"), None])
    monkeypatch.setattr(
        "heliostat.storage.locations.Location.probe", lambda self: (_ for _ in ()).throw(e) if (e := next(answers)) else None
    )
    monkeypatch.setattr("heliostat.storage.waiting.PATIENT", Backoff(0.01, 0.02))
    wanted = job(**{"storage": str(tmp_path / "runs"), "mlflow.uri": f"sqlite:///{tmp_path}/m.db"})
    check.check_services(wanted, resume=True)
    assert caplog.text.count("away. Waiting for the store, up to ") == 2
    answers = iter([AccessError("refused")])
    with pytest.raises(AccessError, match="refused"):  # no wait would help
        check.check_services(wanted, resume=True)


def test_a_file_that_is_no_database_is_found_before_the_run(tmp_path):
    """MLflow would find it only after the workers were placed. An empty file becomes a database."""
    place = tmp_path / "x.db"
    place.write_text("text")
    with pytest.raises(ConfigError, match=r"^mlflow\.uri: .*x\.db isn't an SQLite database"):
        check._check_mlflow(f"sqlite:///{place}")
    place.write_text("")
    check._check_mlflow(f"sqlite:///{place}")


@pytest.mark.parametrize("status", [500, 503])
def test_the_cause_of_an_error_of_mlflows_client_is_not_cut_off(monkeypatch, status):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    with server(status, "No space left on device") as uri, pytest.raises(TrackingError) as e, mlflow_client.asking(uri):
        mlflow.MlflowClient(tracking_uri=uri).get_run("0" * 32)
    assert str(e.value).startswith(f"MLflow at {uri}: the server answered {status}") and "\n" not in str(e.value)


@pytest.mark.parametrize("there", ["nothing listens", "it never answers"])
def test_commands_give_an_mlflow_that_is_away_one_budget_and_say_what_to_run_next(monkeypatch, there):
    """MLflow's client retried for over a minute."""
    for name in [*mlflow_client.CLIENT, "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mlflow_client, "BUDGET_S", 2.0)
    monkeypatch.setattr(mlflow_client, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if there == "nothing listens":
            silent.close()
        uri, begun = f"http://127.0.0.1:{port}", time.monotonic()
        result = CliRunner().invoke(cli_app, ["run", "list", "--mlflow", uri])
    error = result.exception
    assert isinstance(error, TrackingError) and time.monotonic() - begun < 45
    assert str(error).startswith(f"MLflow at {uri}: no answer within 2 s (") and "\n" not in str(error)
    assert str(error).endswith("). Start the server with `mlflow server`, or pass another store: --mlflow URI")


def test_mlflow_draws_no_bars_for_scripts_either_unless_they_ask_for_them(monkeypatch):
    """The command line hid the bars, but `heliostat.train` in a script drew one for every file."""
    shown = mlflow.environment_variables.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
    for chosen in (None, "true"):
        monkeypatch.setenv(shown.name, chosen or "true")
        if not chosen:
            monkeypatch.delenv(shown.name)
        mlflow_client.connect("http://127.0.0.1:9")
        assert shown.get() is bool(chosen)


def test_mlflows_own_client_is_bounded_by_the_commands_too(monkeypatch):
    """A proxy answered for a server that was down, and the client sent each request seven times."""
    for name in [*mlflow_client.CLIENT, "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"]:
        monkeypatch.delenv(name, raising=False)
    begun = time.monotonic()
    with (
        server(503, "bad gateway") as uri,
        pytest.raises(TrackingError, match="the server answered 503"),
        mlflow_client.asking(uri),
    ):
        mlflow.MlflowClient(tracking_uri=uri).get_run("0" * 32)
    with server(200, "OK") as uri, mlflow_client.asking(uri.replace("http://", "http://me:password@") + "/"):
        pass
    assert time.monotonic() - begun < 45


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("failed with error code 507 != 200. Response body: '<b>disk\nfull</b>'", "the server answered 507: disk full '"),
        ("failed with exception P(host='h'): Max retries exceeded with url: /x (Caused by Refused('no'))", "Refused('no')"),
    ],
)
def test_a_fault_of_a_server_is_told_by_its_body_or_its_cause(said, told):
    assert mlflow_client.fault(f"API request to endpoint /api/2.0 {said}") == told


def test_a_mistyped_name_of_a_cluster_is_no_address(monkeypatch):
    """The error lists the known clusters. An address has a port."""
    monkeypatch.setattr(local, "known", lambda: [local.ClusterState("local", "f", "http://127.0.0.1:1")])
    for name in ("locel", "my-cluster", "host.example.com", "a/b:80"):
        with pytest.raises(ConfigError, match=r"^--cluster: .* isn't a running local cluster"), reach.endpoint(name):
            pass
    with pytest.raises(ConfigError, match="Did you mean 'local'"), reach.endpoint("locel"):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": {"count": 10**9}},
        {"workers": {"count": [1, LARGEST]}},
        {"workers": {"count": [10**9, LARGEST]}},
        {"train.global_batch_size": LARGEST, "data.virtual_ranks": LARGEST - 1},
        {"train.global_batch_size": LARGEST - 5, "train.micro_batch_size": 1, "workers": {"count": [2, 5]}},  # a prime
        {"train.global_batch_size": LARGEST, "train.micro_batch_size": 3},
        {"model.hidden_size": LARGEST - 5},
        {"data.virtual_ranks": 10**30},
        {"train.global_batch_size": 10**30},
    ],
)
def test_large_numbers_are_checked_by_arithmetic(changes):
    """The CPU time of the check doesn't grow with the numbers. It is CPU time, so a busy machine doesn't matter."""
    before = time.process_time()
    with contextlib.suppress(ConfigError):
        check.check_job(job(**changes))
    assert time.process_time() - before < 5


def test_divisors_are_all_that_there_are():
    for number in [*range(1, 300), 3600, 65537]:
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("name", ["../../x", "..", "a/../b", "", "   ", "a\x1b[2J", "a\\b", "a//b", "x" * 300])
def test_an_experiments_name_cannot_lead_out_of_a_folder(name):
    with pytest.raises(ConfigError, match=r"mlflow\.experiment: .* isn't a valid experiment name"):
        job(**{"mlflow.experiment": name})
    for name in ("quickstart", "a b", "team/vision 2", "/Users/someone@example.com/runs", "Größe"):
        assert job(**{"mlflow.experiment": name}).mlflow.experiment == name


def test_a_suite_that_is_not_there_is_found_before_the_run(tmp_path):
    suite = tmp_path / "suite.yaml"
    changes = {"evaluate.benchmarks": {"suite": str(suite), "every": 10}}
    with pytest.raises(ConfigError, match=r"evaluate\.benchmarks\.suite: .*: no such file.*heliostat model make-suite"):
        check.check_job(job(**changes))
    suite.write_text("")
    check.check_job(job(**changes))
