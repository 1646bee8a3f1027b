"""Tests local clusters without starting one: names that could be paths, tokens that only their own server gets, and the options
of `ray up`."""

import contextlib
import errno
import json
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from heliostat.cluster import cluster_file as files
from heliostat.cluster import launch, local, private, processes
from heliostat.cluster.endpoint import endpoint
from heliostat.errors import ClusterError, ConfigError
from heliostat.submit.submission import SubmissionRecord

from tests.unit.build_job import ROOT

BAD = ("../../x", "/tmp/x", "..", ".hidden", "a/b", "-rf", "", "a b", 7)


def cluster_file(folder: Path, name: object = "local", port: int = 8275) -> Path:
    text = (ROOT / "clusters" / "local.yaml").read_text()
    path = folder / "cluster.yaml"
    path.write_text(text.replace("cluster_name: local", f"cluster_name: {json.dumps(name)}").replace("8275", str(port)))
    return path


@pytest.mark.parametrize("name", BAD)
def test_a_clusters_name_leads_to_no_other_folder(name, tmp_path, monkeypatch):
    """`cluster up` and `down` create and delete a folder of this name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"cluster_name: .* isn't a valid name"):
        files.read(cluster_file(tmp_path, name))
    with pytest.raises(ConfigError, match=r"metadata.name: .* isn't a valid name"):
        text = f"apiVersion: ray.io/v1\nkind: RayCluster\nmetadata: {{name: {json.dumps(name)}}}\nspec: {{}}\n"
        (tmp_path / "kube.yaml").write_text(text)
        files.read(tmp_path / "kube.yaml")


def test_down_and_the_commands_for_jobs_take_no_path_for_a_name(tmp_path, monkeypatch):
    work, other = tmp_path / "work", tmp_path / "other"
    work.mkdir()
    other.mkdir()
    monkeypatch.chdir(work)
    (other / "state.json").write_text(json.dumps({"name": "other", "file": "x", "url": "http://127.0.0.1:1", "nodes": []}))
    for name in ("../../../other", str(other)):
        with pytest.raises(ConfigError, match="isn't a valid name"):
            launch.down(name)
        with pytest.raises(ConfigError, match="isn't a valid name"):
            SubmissionRecord.read(name)
    assert (other / "state.json").exists()


def test_down_deletes_no_folder_that_a_copied_state_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine"
    (mine / "0").mkdir(parents=True)
    node = {"role": "head", "address": "127.0.0.2", "folder": str(mine / "0"), "pid": 1 << 22, "created": 0.0}
    (local.home() / "local").mkdir(parents=True)
    state = {"name": "local", "file": "x", "url": "http://127.0.0.1:1", "nodes": [node]}
    (local.home() / "local" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="names folders of another cluster"):
        launch.down("local")
    assert (mine / "0").is_dir()


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print(self.headers.get("Authorization"), flush=True)
        self.send_response(200 if self.headers.get("Authorization") else 401)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *a): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def server(user: str | None) -> Iterator[tuple[int, subprocess.Popen]]:
    """Runs a server that requires a token and prints the tokens that it receives; as another user, if one is named."""
    who = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    python = "/usr/bin/python3" if user else sys.executable
    process = subprocess.Popen([python, "-Ic", SERVER], stdout=subprocess.PIPE, text=True, cwd="/", **who)
    assert process.stdout
    try:
        yield int(process.stdout.readline()), process
    finally:
        process.kill()
        process.wait()


def given(process: subprocess.Popen) -> set[str]:
    process.kill()
    return set(process.stdout.read().split("\n")) - {"", "None"} if process.stdout else set()


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user takes root")
def test_the_token_is_not_sent_to_a_server_of_another_user(tmp_path, monkeypatch):
    """Otherwise the first process that listens on the file's port gets the user's own token from `cluster up`, `list`, and the
    others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with server("nobody") as (port, process):
        cluster = files.read(cluster_file(tmp_path, port=port))
        with pytest.raises(ConfigError, match=r"another user's process answers .*, so heliostat sent no token"):
            launch.up(cluster)
        state = local.ClusterState("local", str(cluster.path), local.url_of(cluster))  # joined when it was another
        state.folder.mkdir(parents=True, exist_ok=True)
        private.write_token(state.token_file, "secret")
        state.write()
        for target in ("local", state.url, str(cluster.path)):
            with pytest.raises(ClusterError, match="another user's process"), endpoint(target):
                pass
        assert given(process) == set()


def test_a_server_of_this_user_gets_the_token_and_a_free_port_belongs_to_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with server(None) as (port, process):
        assert launch.up(files.read(cluster_file(tmp_path, port=port)))["note"] == f"joined http://127.0.0.1:{port}"
        assert given(process) == {"Bearer secret"}
    assert (local.home() / "local" / "token").stat().st_mode & 0o077 == 0
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        assert not private.ours(f"http://127.0.0.1:{s.getsockname()[1]}")


def test_a_port_that_a_connection_uses_is_named_before_any_node_starts(tmp_path, monkeypatch):
    """In this case Ray starts without its dashboard, and `up` waited a minute and a half for it."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--dashboard-port: the port is in use \({port}\)\. Stop"):
            launch.up(files.read(cluster_file(tmp_path, port=port)))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "unknown host (head.example). Use 127.0.0.1"),
        (OSError(errno.EADDRNOTAVAIL, "Cannot assign"), "isn't an address of this machine (head.example). Use 127.0.0.1"),
    ],
    ids=["unknown", "elsewhere"],
)
def test_a_host_that_the_head_cannot_listen_at_is_not_reported_as_a_port_in_use(monkeypatch, error, words):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(processes.socket.socket, "bind", fail)
    assert processes.listening_fault("http://head.example:8265") == f"--dashboard-host: {words}" + (
        ", or an address of this machine" if "unknown" in words else ""
    )


EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not EPHEMERAL.exists(), reason="Linux has it")
def test_a_free_port_is_none_that_the_system_gives_to_connections():
    start, end = map(int, EPHEMERAL.read_text().split())
    if start < processes.PORTS.stop:
        pytest.skip("this system gives lower ports to connections than others do")
    ports = {processes.free_port() for _ in range(50)}
    assert len(ports) > 10 and not any(start <= port <= end for port in ports)


def test_what_answers_but_is_no_ray_is_not_joined(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = SERVER.replace("200 if", "404 if").replace("else 401", "else 404")
    process = subprocess.Popen([sys.executable, "-Ic", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        port = int(process.stdout.readline())
        with pytest.raises(ConfigError, match="something other than a Ray cluster answers"):
            launch.up(files.read(cluster_file(tmp_path, port=port)))
    finally:
        process.kill()
        process.wait()


def test_an_address_that_a_person_names_is_taken_at_their_word(tmp_path, monkeypatch):
    """With or without http://, and for any server there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with server("nobody" if os.geteuid() == 0 else None) as (port, _):
        for target in (f"127.0.0.1:{port}", f"http://127.0.0.1:{port}/"):
            with endpoint(target) as there:
                assert (there.url, there.token, there.here) == (f"http://127.0.0.1:{port}", "secret", True)


@pytest.mark.parametrize("name", ["ssh", "aws-h100", "gcp-h100"])
def test_up_leaves_ray_alone_where_it_runs_unless_told_to_restart_it(name):
    """`ray up` without `--no-restart` stops Ray on the head, and every job with it."""
    from ray.scripts.scripts import up

    known = {option for p in up.params for option in p.opts}
    cluster = files.read(ROOT / "clusters" / f"{name}.yaml")
    assert "--no-restart" in launch.launcher(cluster, restart=False) and "--no-restart" in known
    assert "--no-restart" not in launch.launcher(cluster, restart=True)


@pytest.mark.parametrize("log", ["The current node timed out during startup", "no such option: --blok"])
def test_a_worker_that_ray_gave_up_on_a_busy_machine_is_started_once_more(tmp_path, monkeypatch, log):
    """Ray waits 30 s for a node's own entry, and then ends the node. A worker that ends for another reason isn't started
    again."""
    monkeypatch.chdir(tmp_path)
    cluster = files.read(cluster_file(tmp_path))
    asked: list[object] = []
    state = local.ClusterState(
        "local", "cluster.yaml", "http://127.0.0.1:1", [local.Node("head", cluster.addresses[0], "0", 1, 0.0)]
    )

    def start(cluster: object, state: local.ClusterState, role: str, addresses: list[str]) -> None:
        asked.append(addresses)
        state.nodes += [local.Node(role, address, address, 2 + len(asked), 0.0) for address in addresses]
        if len(asked) == 1:
            (state.folder / "logs").mkdir(parents=True)
            (state.folder / "logs" / f"worker-{addresses[-1]}.log").write_text(log)
            raise ClusterError("local: the worker didn't start")

    monkeypatch.setattr(local, "_start", start)
    monkeypatch.setattr(local, "_until_ready", lambda state, addresses, before: asked.append("all ready"))
    monkeypatch.setattr(local.processes, "living", lambda nodes: nodes[:-1])
    monkeypatch.setattr(local.processes, "end", lambda nodes: None)
    addresses = cluster.addresses[1:]
    if "timed out" in log:
        local._start_workers(cluster, state)
        assert asked == [addresses, addresses[-1:], "all ready"]
        assert [node.address for node in state.nodes] == cluster.addresses
    else:
        with pytest.raises(ClusterError, match="the worker didn't start"):
            local._start_workers(cluster, state)
        assert asked == [addresses]
