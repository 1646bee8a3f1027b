"""Tests that an unused local cluster ends by itself. A cluster that is in use, or doesn't answer, continues."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from heliostat.cluster import cluster_file, idle, local

from tests.unit.build_job import ROOT
from tests.waiting import until


@contextmanager
def api(jobs: list[dict], status: int = 200) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            right = self.path == "/api/jobs/" and self.headers["Authorization"] == "Bearer secret"
            data = json.dumps(jobs).encode()
            self.send_response(status if right else 403)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("states", "found"), [([], False), (["SUCCEEDED", "FAILED"], False), (["STOPPED", "RUNNING"], True), (["PENDING"], True)]
)
def test_a_cluster_is_busy_while_a_job_waits_or_runs(states, found):
    with api([{"status": s} for s in states]) as url:
        assert idle.busy(url, "secret") is found and idle.busy(url, "wrong") is None
    with api([], 500) as url:
        assert idle.busy(url, "secret") is None


def test_the_time_without_a_job_is_counted_from_the_last_one_and_no_answer_counts_as_one(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(idle.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(idle.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    answers = iter([*[False] * 5, True, *[False] * 5, None, *[False] * 50])
    assert idle.wait(lambda: next(answers), idle_s=60.0, gone_s=600.0, poll_s=10.0)
    assert clock[0] == 110.0 + 60.0  # since the answer that did not come
    clock[0] = 0.0
    assert not idle.wait(lambda: None, idle_s=60.0, gone_s=600.0, poll_s=10.0) and clock[0] == 610.0


def _lives(process: psutil.Process) -> bool:
    """Waits some seconds for a killed process to end."""
    return bool(psutil.wait_procs([process], timeout=120)[1])


def test_up_starts_what_watches_replaces_it_and_down_ends_it(tmp_path: Path, monkeypatch):
    """There is one watcher, only if the file asks for it, with the file's minutes. With another number, the first watcher kept
    running."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with.yaml").write_text((ROOT / "clusters" / "local.yaml").read_text())
    cluster = cluster_file.read(tmp_path / "with.yaml")
    assert cluster.raw["idle_timeout_minutes"] == 240
    state = local.ClusterState(cluster.name, str(cluster.path), "http://127.0.0.1:1")
    (state.folder / "logs").mkdir(parents=True)
    state.token_file.write_text("secret")
    state.write()
    watched = local._watched(cluster, state).watcher
    read = local.read(cluster.name)
    assert watched and read and read.watcher == watched and local._watched(cluster, read).watcher == watched
    process = local._watcher(read)
    assert process and process.cmdline()[-2:] == [cluster.name, "240"]
    cluster.raw["idle_timeout_minutes"] = 60
    again = local._watched(cluster, read)
    shorter = local._watcher(again)
    assert shorter and shorter.cmdline()[-2:] == [cluster.name, "60"] and not _lives(process)
    stored = local.read(cluster.name)
    assert stored and stored.watcher == again.watcher
    del cluster.raw["idle_timeout_minutes"]
    assert local._watched(cluster, stored).watcher is None and not _lives(shorter)
    cluster.raw["idle_timeout_minutes"] = 240
    read = local._watched(cluster, stored)
    local.down(cluster.name)
    until(lambda: not local._watcher(read), "end of the watcher")
    assert not state.folder.exists()
    del cluster.raw["idle_timeout_minutes"]
    assert local._watched(cluster, local.ClusterState("other", "", "")).watcher is None
