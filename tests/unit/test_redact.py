"""Tests that secrets are found in any form, and that errors, logs, and commands show none."""

import logging
import pickle
import socket
import subprocess
import sys
import time

import pytest
from heliostat import errors, redact
from heliostat.cluster import endpoint as reach
from heliostat.config import spec
from heliostat.errors import ConfigError, TrackingError
from heliostat.storage.locations import Location
from heliostat.tracking import ui
from heliostat.tracking.mlflow_client import connect

from tests.unit.build_job import job, write
from tests.unit.forked import run

S = "hunter2/x+Y"  # with what ends an authority
CARRY = [
    f"http://me:{S}@host:5000",
    "https://hunter2@host",
    f"mysql://u:{S}@h/db",
    "mysql+pymysql://u:hunter#2?@h:3306/db",
    "postgresql://u:hunter@2/x@h/d",
    f"s3://KEY:{S}@bucket/x",
    "s3://hunter2@bucket/x",
    "s3://bucket/x?secret_key=hunter2&region=eu",
    "s3://bucket/x?region=eu&access_key=hunter2",
    "s3://bucket/x?session_token=hunter2",
    "s3://bucket/x?endpoint_override=u:hunter2@h:9000&scheme=http",
    "mysql://u@h/db?password=hunter2",
    "postgresql:///db?host=h&password=hunter2",
    "https://h/x?X-Amz-Signature=hunter2&X-Amz-Expires=9",
    "mssql+pyodbc:///?odbc_connect=PWD%3Dhunter2",
    "redis://:hunter2@h:6379",
]
PLAIN = [
    "http://127.0.0.1:5000/#/models/lm@champion", "http://[::1]:5000/a@b", "postgresql://user@h/db", "s3://bucket/a@b/c",
    "s3://bucket/x?endpoint_override=127.0.0.1:9000&scheme=http", "sqlite:////a/b@c.db", "file:///a:b/c@d", "/a:b@c",
    "mysql://u@h/db?read_default_file=/home/u/.my.cnf",
]  # fmt: skip


@pytest.mark.parametrize("uri", CARRY)
def test_no_error_and_no_log_line_shows_the_password_of_a_uri(uri):
    """For heliostat's own messages, the cause from another library, and a traceback."""
    assert redact.carries_secret(uri) and "hunter" not in redact.redact(f"opening '{uri}' failed: {uri}, and http://h:1/x")
    error = errors.StorageError(f"{uri}: does not answer")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert "hunter" not in f"{error} {error!r} {again} {again!r}" and "does not answer" in str(again)
    try:
        raise OSError(f"no route to {uri}")
    except OSError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed: %s", (uri,), sys.exc_info())
    said = redact.Formatter("%(message)s").format(record)
    assert "hunter" not in said and "no route to" in said and said.startswith("failed: ")


@pytest.mark.parametrize("uri", PLAIN)
def test_a_uri_without_a_secret_is_shown_as_it_is(uri):
    assert not redact.carries_secret(uri) and redact.redact(f"see {uri}.") == f"see {uri}."


@pytest.mark.parametrize("uri", CARRY)
def test_a_uri_with_a_secret_is_refused_wherever_it_is_given_and_not_repeated(uri, tmp_path):
    def refused(make) -> None:
        with pytest.raises(ConfigError, match="must not contain") as e:
            make()
        assert "hunter" not in str(e.value) and "\n" not in str(e.value)

    refused(lambda: job(**{"mlflow.uri": uri}))
    refused(lambda: Location(uri))
    refused(lambda: spec.load(write(tmp_path, **{"data.sources.0.path": uri})))
    if uri.startswith("http"):
        refused(lambda: reach.endpoint(uri).__enter__())


def test_a_password_with_a_blank_or_a_quote_in_it_is_refused_too():
    for uri in ("mysql://u:hunter 2@h/d", 's3://KEY:hun"ter2@bucket'):
        assert redact.carries_secret(uri)


def test_an_endpoint_of_the_environment_may_carry_no_credentials(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2@h:9000")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL: must not contain credentials") as e:
        Location("s3://bucket/x").probe()
    assert "hunter2" not in str(e.value)


def test_a_store_with_a_password_is_no_option_of_a_command_and_no_argument_of_the_servers(monkeypatch, tmp_path):
    """`ps` shows command lines to every user. The command rejects such an option, and passes the environment's value on as
    environment."""
    code, _, lines, _ = run("run", "ui", "--mlflow", "postgresql://u:hunter2@h/db")
    assert code == 2 and len(lines) == 1 and "Set MLFLOW_TRACKING_URI instead" in lines[0] and "hunter2" not in lines[0]
    started, popen = [], subprocess.Popen

    def start(command, env, **_):
        started.append((command, env))
        return popen([sys.executable, "-c", ""])

    monkeypatch.setattr(ui.subprocess, "Popen", start)
    monkeypatch.setattr(ui.signal, "signal", lambda *_: None)
    monkeypatch.setattr(ui, "_answering", lambda server, host, port, place: port)
    ui.serve("postgresql://u:hunter2@h/db", "127.0.0.1", 59871, tmp_path / "keys", lambda url: None)
    ((command, env),) = started
    assert "hunter2" not in " ".join(command) and env["MLFLOW_BACKEND_STORE_URI"] == "postgresql://u:hunter2@h/db"


@pytest.mark.parametrize(
    "uri", ["postgresql://u:hunter2@127.0.0.1:1/db", pytest.param("mysql://u:hunter/2@h/db", marks=pytest.mark.ci)]
)
def test_a_store_of_the_environment_that_fails_is_one_line_without_its_password(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    code, out, lines, _ = run("run", "list")
    assert code == 1 and not out and len(lines) == 1 and "hunter" not in lines[0]
    assert lines[0].startswith(f"error: MLflow at {uri.partition(':')[0]}://u:***@")


def test_a_database_that_takes_no_connection_is_told_at_once():
    """MLflow alone retries for 100 seconds."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(TrackingError, match=rf"127\.0\.0\.1:{port} accepts no connection \(.*refused"):
            connect(f"postgresql+psycopg://u:p@127.0.0.1:{port}/db")
        assert time.monotonic() - began < 60


def test_an_error_that_nobody_has_caught_shows_no_password_either():
    code = "import sys; from heliostat.redact import excepthook; sys.excepthook = excepthook; open('s3://K:hunter2/x@bucket')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
    assert "FileNotFoundError" in said and "Traceback" in said and said.count("hunter2") <= 1  # the source's own line
    assert "s3://***@bucket" in said


SETTINGS = """\
a: 1
password: hunter2 and, more
db_password: "x hunter2"
uri: mysql://u:hunter2@h/d
user: {name: a, password: hunter2, c: d}
hf_token: hunter2
private_key: |
  hunter2
    hunter2
more: >-
  text
passwords:
- hunter2
password:
  hunter2
env:
- name: DB_PASSWORD
  value: hunter2
- value: hunter2
  name: MY_TOKEN
command: run --password=hunter2 --x
"client-secret": 'hunter2'
export AWS_SECRET_ACCESS_KEY=hunter2
# password: hunter2
-----BEGIN RSA PRIVATE KEY-----
hunter2
-----END RSA PRIVATE KEY-----
"""
HARMLESS = """\
api_key: ${API_KEY}
password: $(cat /run/secret)
password: {{ password }}
password: <yours>
token: null
max_tokens: 5
tokens: 8192
eos_token: "</s>"
pad_token: hunter
tokenizer: {vocab_size: 512}
secretName: heliostat
secret:
  name: mounted
tokenizer_file: /x
/root/.ray/auth_token: ~/.ray/auth_token
name: local     # its state and token: in a file
valueFrom: {secretKeyRef: {name: s3, key: id}}
"""


def test_lines_with_secrets_are_found_in_settings_and_no_others():
    lines = SETTINGS.split("\n")
    assert {lines[i] for i in redact.secret_lines(lines, True)} >= {line for line in lines if "hunter2" in line}
    lines = HARMLESS.split("\n")
    assert [lines[i] for i in redact.secret_lines(lines, True)] == []


def test_in_code_a_literal_is_a_secret_and_a_call_is_none():
    found = redact.hide('login(password="hunter2", token=read()); x["api_key"] = \'hunter2\'', False)
    assert "hunter2" not in found and "token=read()" in found
    assert redact.hide("token = tokenizer.next()", False) == "token = tokenizer.next()"


def test_a_long_line_is_searched_in_a_time_that_grows_with_its_length_alone():
    for line in ("a" * 200_000, "password" * 20_000, "a://" * 50_000, "?token" * 20_000, "-" * 200_000):
        began = time.perf_counter()
        redact.hide(line, True)
        redact.hide(line, False)
        assert time.perf_counter() - began < 10  # 0.2 s; hours if each place were looked at from each
