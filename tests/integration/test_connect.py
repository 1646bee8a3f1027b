"""Tests that a private Ray ends with the process that started it, and that only its user has access."""

import atexit
import contextlib
import os
import pwd
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from heliostat.cluster import private, private_ray, processes
from heliostat.cluster.connect import connect
from heliostat.errors import ConfigError
from heliostat.training.run import train

from tests.integration import commands
from tests.integration.paced import SET_PLAIN
from tests.integration.test_cluster_local import _call


def held(_: list[str]) -> int:
    """In a separate process: connects, and leaves an actor that takes ten minutes to end; prints its process."""

    @ray.remote(num_cpus=0)
    class Actor:
        def pid(self) -> int:
            atexit.register(time.sleep, 600)
            return os.getpid()

    connect(cpus=2)
    actor = Actor.remote()
    pid = ray.get(actor.pid.remote())
    del actor
    time.sleep(2)
    sys.stdout.write(f"{pid}\n")
    return 0


def test_a_process_that_does_not_end_by_itself_is_ended(tmp_path):
    """For example, an actor's process that sometimes hangs in its own exit, when Ray considers it dead."""
    done = commands.call(f"{__name__}:held", log=tmp_path / "log")
    assert done.wait(120) == 0, done.err
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.out)).wait(60)  # until it has been reaped


def late(_: list[str]) -> int:
    private_ray.ahead(0, ["torch"])  # an import of a second and more
    connect(cpus=2)
    sys.stdout.write("connected\n")
    return 0


def test_workers_that_are_late_do_not_hold_the_driver(tmp_path):
    """For example, on a machine so busy that their imports take longer than Ray waits for them."""
    done = commands.call(f"{__name__}:late", log=tmp_path / "log", RAY_worker_register_timeout_seconds="0")
    assert (done.wait(120), done.out) == (0, "connected\n"), done.err


def plain(_: list[str]) -> int:
    @ray.remote(num_cpus=0)
    class Worker:
        def parent(self) -> str:
            return psutil.Process(os.getppid()).name()

    connect(cpus=2)
    sys.stdout.write(f"{ray.get(Worker.remote().parent.remote())}\n")
    return 0


def test_without_the_fork_server_ray_starts_the_workers_itself(tmp_path):
    done = commands.call(f"{__name__}:plain", log=tmp_path / "log", HELIOSTAT_FORK_SERVER="0")
    assert (done.wait(120), done.out) == (0, "raylet\n"), done.err


RPC = ("NodeInfoGcsService/GetAllNodeInfo", "NodeManagerService/GetNodeStats", "CoreWorkerService/GetCoreWorkerStats")


def family(session_folder: str) -> list[psutil.Process]:
    """Returns this process and those of its Ray. The state server's parent soon differs from this process."""
    servers = (p for p in psutil.process_iter(["name", "cmdline"]) if p.info["name"] == "gcs_server")
    return [*processes.family(os.getpid()), *(p for p in servers if session_folder in " ".join(p.info["cmdline"] or ()))]


def listening(family: Iterable[psutil.Process]) -> dict[tuple[str, int], str]:
    """Returns the addresses on which the processes listen, with their names."""
    found = {}
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            for c in process.net_connections("inet"):
                if c.status == psutil.CONN_LISTEN:
                    found[c.laddr.ip.removeprefix("::ffff:"), c.laddr.port] = process.name()
    return found


def as_nobody(code: str, *arguments: str) -> str:
    """Returns the output of Python code that runs as another user, without heliostat's modules."""
    if os.geteuid() != 0:
        pytest.skip("to be another user takes root")
    command = ["/usr/bin/env", "-i", "python3", "-Ic", code, *arguments]
    group = pwd.getpwnam("nobody").pw_gid
    done = subprocess.run(
        command, user="nobody", group=group, extra_groups=[], cwd="/", capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def session() -> Any:
    return ray._private.worker._global_node


def test_a_private_ray_listens_on_loopback_alone_and_refuses_whoever_has_no_token(ray_session):
    ports = listening(family(session().get_session_dir_path()))
    assert set(ports.values()) >= {"gcs_server", "raylet"}
    assert {host for host, _ in ports} == {"127.0.0.1"}, ports
    token = private_ray.token_file().read_text()
    refusing = 0
    for (host, port), name in ports.items():
        for method in RPC:
            if (said := _call(host, port, method, None)) not in ("UNIMPLEMENTED", "UNAVAILABLE"):
                refusing += 1
                assert said == "UNAUTHENTICATED", (name, method)
                assert _call(host, port, method, token) != "UNAUTHENTICATED", (name, method)
    assert refusing >= 3


def test_a_private_ray_runs_no_agent_of_a_dashboard(ray_session):
    """Ray's start would wait for the agent's imports, and next to another Ray three seconds more for a port in use."""
    raylet = psutil.Process(session().all_processes["raylet"][0].process.pid)
    assert not [p for p in raylet.children() if p.name().startswith("ray::Dashboard")]
    assert (session().dashboard_agent_listen_port, session().metrics_agent_port) == (-1, -1)


LOOK = """
import os, socket, sys
for path in sys.argv[1:]:
    try:
        if path.endswith((".sock", "plasma_store", "raylet")):
            socket.socket(socket.AF_UNIX).connect(path)
        else:
            open(path).read()
    except PermissionError:
        print("refused")
    else:
        print("opened", path)
"""


def test_another_user_cannot_open_the_files_and_sockets_of_a_private_ray(ray_session):
    """Its token, its logs, the socket of its object store, and everything else in its folder."""
    folder, inside = private_ray.sessions(), Path(session().get_session_dir_path())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder in inside.parents
    token = private_ray.token_file()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64
    paths = [token, inside / "logs" / "raylet.out", inside / "sockets" / "plasma_store", inside / "sockets" / "raylet"]
    assert all(p.exists() for p in paths)
    assert as_nobody(LOOK, "/etc/passwd", *map(str, paths)).splitlines() == ["opened /etc/passwd", *["refused"] * len(paths)]


@pytest.mark.ci
def test_the_workers_of_a_private_ray_meet_where_nobody_else_can_write(ray_session, job_file):
    """torch's own meeting point is a TCP port on every address that accepts any process's writes. It isn't opened."""
    seen: dict[tuple[str, int], str] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
                workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::TrainWorke")]
                seen.update(listening(workers))
            time.sleep(0.2)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert train(job_file("alone"), [*SET_PLAIN, "train.steps=20", "checkpoint.every=20", "evaluate.every=20"])["steps"] == 20
    finally:
        done.set()
        thread.join()
    assert len(seen) >= 4  # of two workers, each with its own of Ray's, and gloo's
    assert {host for host, _ in seen} == {"127.0.0.1"}, seen


def test_a_folder_that_somebody_else_has_made_is_not_used(tmp_path):
    with pytest.raises(ConfigError, match="isn't a folder of this user"):
        (tmp_path / "link").symlink_to(tmp_path)
        private.folder(tmp_path / "link")
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", pwd.getpwnam("nobody").pw_uid, -1)
        with pytest.raises(ConfigError, match="isn't a folder of this user"):
            private.folder(tmp_path / "theirs")


STAY = "import os, time; from heliostat.cluster.connect import connect; connect(cpus=1); print(os.environ.get('RAY_AUTH_MODE'))"


def test_a_token_that_others_could_read_is_tightened_and_what_others_say_runs_here_is_not_joined(tmp_path):
    """For Ray's own file of an earlier version, and for the note of a cluster in Ray's folder, where every user may write."""
    home, notes = tmp_path / "home", tmp_path / "tmp"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0" * 64)
    (home / ".ray" / "auth_token").chmod(0o644)
    (notes / "ray").mkdir(parents=True)
    (notes / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    env = {**os.environ, "HOME": str(home), "TMPDIR": str(notes), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", STAY], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "disabled\n"), done.stderr
    assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600
    assert "other users of this machine could read" in done.stderr


def test_the_workers_of_a_private_ray_are_forks_of_one_process_and_name_nothing_alike(ray_session):
    @ray.remote(num_cpus=0)
    class Fork:
        def told(self) -> tuple[int, str]:
            return os.getppid(), ray.ObjectID.from_random().hex()

    forks = [Fork.remote() for _ in range(3)]
    told = ray.get([fork.told.remote() for fork in forks], timeout=60)
    server = private_ray.fork_server()
    assert server and {parent for parent, _ in told} == {server.process.pid}
    assert len({name for _, name in told}) == 3
