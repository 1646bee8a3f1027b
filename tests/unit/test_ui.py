"""Tests that `heliostat run ui` ends its server with it, for any end of the command."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from heliostat.cluster import processes
from heliostat.cluster.processes import free_port
from heliostat.errors import ConfigError, HeliostatError
from heliostat.tracking import ui
from heliostat.tracking.ui import serve

from tests.waiting import until

KEY = "sk-a-key-of-the-tests"


def keys_in(folder: Path) -> Path:
    place = folder / "keys"
    place.write_text(f"{KEY}\n")
    place.chmod(0o600)
    return place


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_ui_that_is_told_to_end_leaves_no_server_behind(number, tmp_path):
    code = "import time; from pathlib import Path; from heliostat.tracking import ui; "
    code += "ui._answering = lambda *given: print('waiting', flush=True) or time.sleep(600); "
    code += f"ui.serve('sqlite:///{tmp_path}/mlflow.db', '127.0.0.1', 0, Path('{keys_in(tmp_path)}'), print)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout and process.stdout.readline() == b"waiting\n"
    there = processes.descendants(process.pid)
    assert any("mlflow" in word for word in there[0].cmdline())
    process.send_signal(number)
    assert process.wait(120) != 0
    assert [p for p in there if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_is_said_before_a_server_starts(host, tmp_path):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: {port} on {host} is in use"):
            serve(f"sqlite:///{tmp_path}/mlflow.db", host, port, keys_in(tmp_path), print)


def test_mlflows_page_is_served_and_opens_as_model_training_where_the_browser_has_not_chosen():
    from heliostat.tracking import ui_app
    from mlflow.server import app

    plain = (Path(str(app.static_folder)) / "index.html").read_text()

    assert ui_app.flask_app is app
    answer = app.test_client().get("/")
    assert answer.status_code == 200 and answer.mimetype == "text/html" and "<title>MLflow</title>" in answer.text
    assert answer.text.replace(ui_app.SCRIPT, "") == plain != answer.text
    assert answer.text.index(ui_app.SCRIPT) < answer.text.index("<script", answer.text.index(ui_app.SCRIPT) + 1)
    built = Path(str(app.static_folder)) / "static" / "js"
    scripts = "".join(file.read_text() for file in built.glob("main.*.js"))
    assert [name for name in ui_app.CHOICES if name.removesuffix("_v1") not in scripts] == []  # what each choice is kept under
    assert set(ui_app.CHOICES.values()) == {'"machine_learning"', "true"} and json.dumps(ui_app.CHOICES) in ui_app.SCRIPT


def test_an_app_without_a_file_of_keys_lets_nobody_in():
    from heliostat.tracking import ui_app

    assert ui_app.app.known == {}


LISTENING = """
import http.server, socket, sys, time
time.sleep({late})
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401)
        self.end_headers()
    def log_message(self, *given): pass
http.server.HTTPServer(("127.0.0.1", {port}), Answer).handle_request()
"""


def served(
    monkeypatch: pytest.MonkeyPatch, folder: Path, port: int, code: str, verbose: bool = False
) -> tuple[list[str], list[str]]:
    """Runs the command with this program as MLflow's server; returns its actions, in order, and the links."""
    done, links = list[str](), list[str]()

    def ready(url: str) -> None:
        done.append("link")
        links.append(url)

    monkeypatch.setattr(ui, "command", lambda host, port: [sys.executable, "-c", code])
    monkeypatch.setattr(ui.signal, "signal", lambda *given: None)
    answers = ui._answers
    monkeypatch.setattr(ui, "_answers", lambda *given: answers(*given) and not done.append("answered"))
    serve(f"sqlite:///{folder}/mlflow.db", "127.0.0.1", port, keys_in(folder), ready, lambda: done.append("keys"), verbose)
    return done, links


def test_the_link_is_printed_once_the_server_answers(monkeypatch, tmp_path):
    """It was printed before the server started, so a click found nothing."""
    port = free_port()
    done, links = served(monkeypatch, tmp_path, port, LISTENING.format(late=0.5, port=port))
    assert done == ["keys", "answered", "link"] and links == [f"http://127.0.0.1:{port}/"]


@pytest.mark.parametrize("verbose", [False, True])
def test_the_output_of_mlflows_server_is_in_a_file_unless_it_is_asked_for(monkeypatch, tmp_path, capfd, verbose):
    """The server's messages came between heliostat's lines. An error names the file."""
    code = "import sys; print('notice', flush=True); sys.exit('fault')"
    with pytest.raises(HeliostatError, match="Its output is above" if verbose else "Read its output in .*server.log") as e:
        served(monkeypatch, tmp_path, free_port(), code, verbose)
    said = "".join(capfd.readouterr()) if verbose else (tmp_path / "server.log").read_text()
    assert said == "notice\nfault\n" and "\n" not in str(e.value)
    assert verbose or capfd.readouterr() == ("", "")


def test_a_port_that_the_system_chooses_is_in_the_link(monkeypatch, tmp_path):
    _, (link,) = served(monkeypatch, tmp_path, 0, LISTENING.format(late=0, port=0))
    assert int(link.removeprefix("http://127.0.0.1:").removesuffix("/")) > 0


@pytest.mark.parametrize("code", [0, 1])
def test_of_two_starts_on_one_port_the_second_fails_and_names_the_port(monkeypatch, tmp_path, code):
    """Both found the port free. The second one's server ended with 0, and so did the command, while the first one's server
    answered."""
    port = free_port()
    first = (
        f"import http.server; http.server.HTTPServer(('127.0.0.1', {port}), http.server.BaseHTTPRequestHandler).serve_forever()"
    )
    other: list[subprocess.Popen[bytes]] = []

    def taken() -> None:
        other.append(subprocess.Popen([sys.executable, "-c", first]))
        until(lambda: ui._answers("127.0.0.1", port), "an answer of the first server")

    monkeypatch.setattr(ui, "command", lambda host, port: [sys.executable, "-c", f"import time; time.sleep(0.5); exit({code})"])
    monkeypatch.setattr(ui.signal, "signal", lambda *given: None)
    links: list[str] = []
    try:
        with pytest.raises(HeliostatError, match=rf"^--port: .* answered on 127\.0\.0\.1:{port} .*pass --port {port + 1}$") as e:
            serve(f"sqlite:///{tmp_path}/mlflow.db", "127.0.0.1", port, keys_in(tmp_path), links.append, taken)
        assert links == [] and e.value.exit_code == 1 and "\n" not in str(e.value)
    finally:
        for process in other:
            process.kill()
            process.wait()


def test_a_server_that_never_answers_is_ended_at_the_deadline(monkeypatch, tmp_path):
    monkeypatch.setattr(ui, "START_S", 0.5)
    with pytest.raises(HeliostatError, match="didn't answer on 127"):
        served(monkeypatch, tmp_path, free_port(), "import time; time.sleep(60)")
