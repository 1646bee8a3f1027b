"""`heliostat ui` takes its server with it, however it ends."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from heliostat.errors import ConfigError
from heliostat.tracking.ui import serve

KEY = "sk-a-key-of-the-tests"


def keys_in(folder: Path) -> Path:
    place = folder / "keys"
    place.write_text(f"{KEY}\n")
    place.chmod(0o600)
    return place


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_ui_that_is_told_to_end_leaves_no_server_behind(number, tmp_path):
    code = "from pathlib import Path; from heliostat.tracking.ui import serve; "
    code += f"serve('sqlite:///{tmp_path}/mlflow.db', '127.0.0.1', 0, Path('{keys_in(tmp_path)}'), print)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline, there = time.monotonic() + 30, []
    while not there and time.monotonic() < deadline:
        there = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.05)
    time.sleep(1.0)
    there = psutil.Process(process.pid).children(recursive=True)
    assert any("mlflow" in word for word in there[0].cmdline())
    process.send_signal(number)
    assert process.wait(30) != 0
    assert [p for p in there if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_is_said_before_a_server_starts(host, tmp_path):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: {port} on {host} is taken"):
            serve(f"sqlite:///{tmp_path}/mlflow.db", host, port, keys_in(tmp_path), print)


def test_mlflows_page_is_served_and_opens_as_model_training_where_the_browser_has_not_chosen():
    from mlflow.server import app

    plain = app.test_client().get("/").text
    from heliostat.tracking import ui_app

    assert ui_app.flask_app is app
    answer = app.test_client().get("/")
    assert answer.status_code == 200 and answer.mimetype == "text/html" and "<title>MLflow</title>" in answer.text
    assert answer.text.replace(ui_app.SCRIPT, "") == plain != answer.text
    assert answer.text.index(ui_app.SCRIPT) < answer.text.index("<script", answer.text.index(ui_app.SCRIPT) + 1)
    built = Path(str(app.static_folder)) / "static" / "js"
    assert any("mlflow.workflowType" in file.read_text() for file in built.glob("main.*.js"))  # what the choice is kept under
    assert "mlflow.workflowType_v1" in ui_app.SCRIPT and '"machine_learning"' in ui_app.SCRIPT


def test_an_app_without_a_file_of_keys_lets_nobody_in():
    from heliostat.tracking import ui_app

    assert ui_app.app.known == {}
