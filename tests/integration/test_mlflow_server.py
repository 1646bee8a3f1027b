"""Tests docs/mlflow-server.md: MLflow on PostgreSQL, artifacts on S3, logins, and a run that is recorded there.

`make test-slow` runs it. Debian: postgresql; pip: heliostat[server].
"""

import configparser
import importlib.util
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import mlflow
import psutil
import pytest
from heliostat.chaos.servers import ServerProcess
from heliostat.cli.main import app
from heliostat.errors import TrackingError
from heliostat.training.run import train
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tests import stores
from tests.integration.conftest import curve

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]


def missing() -> str:
    """Returns the reason why the server can't start here; empty if it can."""
    if not POSTGRES:
        return "not on this machine: PostgreSQL's server (Debian: postgresql)"
    absent = [m for m in ("psycopg", "flask_wtf", "moto") if not importlib.util.find_spec(m)]
    return f"not installed: {', '.join(absent)} (pip install 'heliostat[server,s3-test]')" if absent else ""


WHY = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY), reason=WHY),
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(1800),  # minutes, on a machine that is not busy
]


@pytest.fixture(scope="module")
def password() -> str:
    return secrets.token_hex(12)


@pytest.fixture(scope="module")
def database(password: str) -> Iterator[dict[str, str]]:
    """Runs PostgreSQL on a Unix socket, with a password; returns the environment for its clients."""
    folder = Path(tempfile.mkdtemp(prefix="heliostat-pg-"))  # not pytest's folder, which PostgreSQL's user may not enter
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        os.chown(folder, user.pw_uid, user.pw_gid)
    secret = folder / "password"
    secret.write_text(password)
    secret.chmod(0o644)

    def run(program: str, *words: str) -> None:
        command = [str(POSTGRES[0] / program), *words]
        subprocess.run(
            command, user=user.pw_uid, group=user.pw_gid, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=120
        )

    run("initdb", "--pgdata", str(folder / "data"), "--auth=scram-sha-256", f"--pwfile={secret}", "--username=mlflow")
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "--pgdata", str(folder / "data"), "--log", str(folder / "log"), "--wait", "--options", options, "start")
    environment = {"PGHOST": str(folder), "PGUSER": "mlflow", "PGPASSWORD": password}
    try:
        createdb = [str(POSTGRES[0] / "createdb"), "mlflow"]
        subprocess.run(createdb, env={**os.environ, **environment}, check=True, timeout=60)
        yield environment
    finally:
        run("pg_ctl", "--pgdata", str(folder / "data"), "--mode=immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(
    database: dict[str, str], s3_server: str, password: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Runs `mlflow server` as the docs start it."""
    folder = tmp_path_factory.mktemp("server")
    stores.bucket(s3_server, "mlflow")
    config = configparser.ConfigParser()
    config["mlflow"] = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": "postgresql+psycopg:///mlflow",
        "admin_username": "admin",
        "auth_cache_ttl_seconds": "60",
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    with (folder / "auth.ini").open("w") as f:
        config.write(f)
    command = [shutil.which("mlflow") or str(Path(mlflow.__file__).parents[4] / "bin" / "mlflow"), "server", "--app-name",
               "basic-auth", "--backend-store-uri", "postgresql+psycopg:///mlflow", "--artifacts-destination", "s3://mlflow/artifacts",
               "--host", "127.0.0.1", "--port", "PORT", "--workers", "1"]  # fmt: skip
    environment = {
        **database,
        "MLFLOW_S3_ENDPOINT_URL": f"http://{s3_server}",
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with ServerProcess(command, "/health", folder / "server.log", environment) as running:
        yield running


@pytest.fixture
def login(server: ServerProcess, password: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the server's address. This process is the user `trainer`, with its own password."""
    from mlflow.server.auth.client import AuthServiceClient

    url, own = f"http://{server.endpoint}", secrets.token_hex(12)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    for name in ("trainer", "visitor"):
        AuthServiceClient(url).create_user(name, own)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "trainer")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", own)
    return url


def test_a_run_on_postgresql_and_s3_behind_a_login(login, password, job_file, s3_server, capsys, monkeypatch, tmp_path):
    """It is recorded completely, its model is in the bucket and can be served, and the passwords are nowhere in it."""
    secret = os.environ["MLFLOW_TRACKING_PASSWORD"]
    result = train(job_file("served"), [f"mlflow.uri={login}", "mlflow.register=served-lm", "mlflow.alias=candidate"])
    client = MlflowClient(tracking_uri=login)
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED" and len(curve(login, result["run_id"])) == 20
    stored = boto3.client("s3", endpoint_url=f"http://{s3_server}", region_name="us-east-1")
    keys = [o["Key"] for page in stored.get_paginator("list_objects_v2").paginate(Bucket="mlflow") for o in page["Contents"]]
    assert any(k.endswith("report.html") for k in keys) and any(k.endswith("model.safetensors") for k in keys)
    assert not any("shard-00000.safetensors" in k for k in keys)  # checkpoints are only named
    for key in keys:
        body = stored.get_object(Bucket="mlflow", Key=key)["Body"].read()
        assert secret.encode() not in body and password.encode() not in body, key
    assert not [v for v in {**run.data.params, **run.data.tags}.values() if secret in v or password in v]
    assert not [p for p in psutil.process_iter(["cmdline"]) if password in " ".join(p.info["cmdline"] or [])]
    mlflow.set_tracking_uri(login)
    model = mlflow.pyfunc.load_model("models:/served-lm@candidate")
    assert isinstance(model.predict(["def "], params={"max_tokens": 4})[0], str)
    app(["run", "lineage", "served-lm@candidate", "--mlflow", login], standalone_mode=False)
    assert result["run_id"] in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "visitor")
    with pytest.raises(MlflowException, match="Permission denied"):  # nobody shared the run with them
        MlflowClient(tracking_uri=login).get_run(result["run_id"])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(TrackingError, match=r"401|not authenticated"):
        app(["run", "list", "--mlflow", login], standalone_mode=False)
