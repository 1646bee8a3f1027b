"""Workers forked from a zygote: the launcher's command runs in a fork as it would run by itself, or by itself."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from heliostat import recipes
from heliostat.cluster import forked_command, node, preloads, zygote, zygote_server
from heliostat.cluster.private_ray import worker_environment

pytestmark = pytest.mark.skipif(not zygote.SUPPORTED, reason="forks are taken on Linux alone")

ENTRY = """
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "mine": os.environ.get("MINE"), "gone": os.environ.get("GONE"), "folder": os.getcwd(),
    "parent": os.getppid(), "loaded": "colorsys" in sys.modules, "leader": os.getpgid(0) == os.getpid()}), flush=True)
"""


@pytest.fixture
def made(tmp_path: Path) -> Iterator[zygote.Zygote]:
    (tmp_path / zygote.ENTRY).write_text(ENTRY)
    one = zygote.Zygote(tmp_path / "z", {**os.environ, "GONE": "1", "RAY_JOB_ID": "01000000"}, ["colorsys", "no.such.module"])
    deadline = time.monotonic() + 60
    while not (one.folder / "socket").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield one
    one.end()
    assert not one.folder.exists()


def ask(one: zygote.Zygote, folder: Path, **environment: str) -> dict[str, Any]:
    given = {"PATH": os.environ["PATH"], "MINE": "2", **environment}
    command = [str(one.launcher), str(folder / zygote.ENTRY), "--a", "b c"]
    done = subprocess.run(command, cwd=folder, env=given, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_a_fork_has_the_request_s_arguments_environment_and_folder_and_what_the_zygote_imported(made, tmp_path):
    told = ask(made, tmp_path)
    assert told == {
        "argv": ["--a", "b c"], "mine": "2", "gone": None, "folder": str(tmp_path), "parent": made.process.pid, "loaded": True,
        "leader": True,
    }  # fmt: skip


def test_a_worker_of_another_job_and_one_whose_zygote_has_died_are_started_by_themselves(made, tmp_path):
    assert ask(made, tmp_path, RAY_JOB_ID="02000000")["loaded"] is False
    assert ask(made, tmp_path, RAY_JOB_ID="01000000")["loaded"] is True
    made.process.send_signal(signal.SIGKILL)
    made.process.wait(10)
    assert ask(made, tmp_path)["loaded"] is False


def test_whatever_else_the_launcher_is_asked_runs_with_python_itself(made):
    done = subprocess.run([str(made.launcher), "-c", "print('mine')"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "mine\n"


def test_a_runtime_environment_of_variables_is_applied_and_one_that_asks_for_more_is_ray_s_own_business(made, tmp_path):
    """As Ray starts a worker with a runtime environment: through a script of its own, which gets both in its arguments."""
    (tmp_path / "setup_worker.py").write_text("print('{\"set_up\": true}')")

    def told(**context: Any) -> dict[str, Any]:
        given = zygote_server.CONTEXT + json.dumps({"env_vars": {"MINE": "3"}, "command_prefix": [], **context})
        command = [
            str(made.launcher),
            str(tmp_path / "setup_worker.py"),
            str(tmp_path / zygote.ENTRY),
            "--language=PYTHON",
            given,
        ]
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
        return json.loads(done.stdout)

    assert told(py_executable=sys.executable)["mine"] == "3" and told()["argv"] == []
    assert told(command_prefix=["cd", str(made.folder), "&&"])["folder"] == str(made.folder)
    assert told(command_prefix=["source env"]) == told(py_executable="/other/python") == {"set_up": True}


def test_half_a_request_is_refused_and_the_next_is_answered(made, tmp_path):
    with socket.socket(socket.AF_UNIX) as half:
        half.connect(str(made.folder / "socket"))
        half.sendall(b'{"arguments": [')
    assert ask(made, tmp_path)["loaded"] is True


def test_a_zygote_ends_with_whoever_has_started_it(made):
    assert made.process.stdin
    made.process.stdin.close()
    made.process.wait(30)
    assert not made.folder.exists()


STUBBORN = """
import os, signal, subprocess, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
helper = subprocess.Popen(["sleep", "600"])
print(os.getpid(), helper.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("killed", [True, False])
def test_a_worker_ends_with_its_zygote_whatever_it_does_and_leaves_no_process(made, tmp_path, killed):
    (tmp_path / zygote.ENTRY).write_text(STUBBORN)
    command = [str(made.launcher), str(tmp_path / zygote.ENTRY)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout and made.process.stdin
        worker, helper = (psutil.Process(int(pid)) for pid in asking.stdout.readline().split())
        if killed:
            made.process.send_signal(signal.SIGKILL)
            worker.wait(10)
            helper.kill()  # an orderly end leaves none
        else:
            made.process.stdin.close()
            assert not psutil.wait_procs([worker, helper], timeout=10)[1]


def test_code_of_heliostat_that_is_not_the_zygote_s_own_is_imported_by_a_process_of_its_own(made, tmp_path):
    """A job brings its own, by PYTHONPATH; a copy with the same files is the same."""
    package = Path(zygote.__file__).parents[1]
    same = shutil.copytree(package, tmp_path / "a" / "heliostat", ignore=shutil.ignore_patterns("__pycache__")).parent
    other = shutil.copytree(same, tmp_path / "b")
    with (other / "heliostat" / "text.py").open("a") as file:
        file.write("# another\n")
    assert ask(made, tmp_path, PYTHONPATH=f"{tmp_path}:{same}")["loaded"] is True
    assert ask(made, tmp_path, PYTHONPATH=f"{tmp_path}:{other}")["loaded"] is False


def test_a_node_s_workers_start_with_the_allocator_and_threads_of_workers_though_they_are_forks(tmp_path, monkeypatch):
    """glibc and OpenMP read them when a process starts, or a library is loaded: the runtime environment of a fork is too late."""
    (tmp_path / zygote.ENTRY).write_text("print(open('/proc/self/environ').read())")  # what its process was started with
    monkeypatch.setattr(preloads, "early", list)
    monkeypatch.setattr(preloads, "TRAINING", ("colorsys",))
    monkeypatch.setattr(node, "CUDA", tmp_path / "none")
    one = node.zygote(tmp_path / "z", head=False)
    try:
        until(lambda: (one.folder / "socket").exists())
        command = [str(one.launcher), str(tmp_path / zygote.ENTRY)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
        started_with = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)
        assert worker_environment(0).items() <= started_with.items() and "OMP_NUM_THREADS" in started_with
    finally:
        one.end()


class Hasty(zygote.Zygote):
    """A zygote that makes the next job's nursery soon."""

    def _launch(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        code = "from heliostat.cluster import zygote_server\nzygote_server.IDLE_S = 1.0\nzygote_server.main()"
        return super()._launch([command[0], "-c", code, *command[3:]], environment)


@pytest.fixture
def anybodys(tmp_path: Path) -> Iterator[zygote.Zygote]:
    """A zygote that is not of one job; colorsys is imported with what imports Ray."""
    (tmp_path / zygote.ENTRY).write_text(ENTRY)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    one = Hasty(tmp_path / "z", environment, ["colorsys"], ["heliostat.errors"])
    until(lambda: (one.folder / "socket").exists())
    yield one
    one.end()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_of_each_job_and_raylet_have_a_nursery_and_that_of_the_next_job_is_made_ahead(anybodys, tmp_path):
    raylet = subprocess.Popen(["sleep", "600"])
    children = psutil.Process(anybodys.process.pid).children
    environment = {"RAY_RAYLET_PID": str(raylet.pid)}
    second, again = (ask(anybodys, tmp_path, RAY_JOB_ID="02000000", **environment) for _ in range(2))
    assert second["loaded"] and second["parent"] == again["parent"] in [child.pid for child in children()]
    until(lambda: len(children()) == 2)
    (ahead,) = (child.pid for child in children() if child.pid != second["parent"])
    third, other = (ask(anybodys, tmp_path, RAY_JOB_ID="03000000", RAY_RAYLET_PID=str(pid)) for pid in (raylet.pid, os.getpid()))
    assert third["parent"] == ahead and other["loaded"] and other["parent"] not in (ahead, second["parent"])
    raylet.kill()
    raylet.wait(10)
    until(lambda: not {ahead, second["parent"]} & {child.pid for child in children()})
    assert other["parent"] in [child.pid for child in children()]


@pytest.mark.parametrize("drivers", ["", "heliostat.errors"])
def test_a_spare_nodes_zygote_begins_by_itself_and_a_heads_only_when_it_is_asked(drivers, tmp_path):
    (tmp_path / "begun.py").write_text("from pathlib import Path\nPath(__file__).with_suffix('.txt').write_text('')\n")
    code = "from heliostat.cluster import zygote_server\nzygote_server.LATEST_S = 0.2\nzygote_server.main()"
    (tmp_path / "z").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "z" / "socket"), "begun", "", drivers]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdin=subprocess.PIPE) as process:
        until(lambda: (tmp_path / "z" / "socket").exists())
        if drivers:
            time.sleep(1.0)
            assert not (tmp_path / "begun.txt").exists()
        else:
            until(lambda: (tmp_path / "begun.txt").exists())
        assert process.stdin
        process.stdin.close()
        assert process.wait(60) == 0


def test_the_nurseries_of_a_zygote_end_with_it(anybodys, tmp_path):
    nursery = psutil.Process(ask(anybodys, tmp_path, RAY_JOB_ID="01000000")["parent"])
    anybodys.process.send_signal(signal.SIGKILL)
    nursery.wait(30)


def test_all_modules_that_are_imported_ahead_are_there():
    """One that has moved would be imported by each worker again."""
    archs = {"CausalLM": "llama", "Embedder": "bert", "ImageEmbedder": "clip"}
    jobs: list[tuple[str, dict[str, Any]]] = [(name, {"arch": archs.get(name)}) for name in recipes.__all__]
    names = {
        *preloads.early(),
        *preloads.DRIVERS,
        *(name for recipe, model in jobs for name in preloads.modules(f"heliostat.recipes:{recipe}", model)),
    }
    assert [name for name in sorted(names) if importlib.util.find_spec(name) is None] == []


def test_only_recipes_of_the_package_are_imported_ahead():
    assert set(preloads.OF) == set(recipes.__all__)
    assert "transformers.models.qwen3.modeling_qwen3" in preloads.modules("heliostat.recipes:CausalLM", {"arch": "qwen3"})
    assert preloads.modules("jobs.causal_lm:CausalLM", {}) != preloads.modules("jobs.mine:Recipe", {}) == [*preloads.TRAINING]


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zygote.Zygote]:
    """A zygote with forks for commands of heliostat's."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    one = zygote.Zygote(tmp_path_factory.mktemp("drivers") / "z", environment, [], [], ["heliostat.cli.main"])
    until(lambda: (one.folder / "socket").exists())
    yield one
    one.end()


def begin(one: zygote.Zygote, folder: Path, *words: str) -> tuple[forked_command.ForkedCommand, Any]:
    """Begins a command in a folder; returns it, and its output."""
    source, sink = os.pipe()
    with contextlib.chdir(folder):
        child = forked_command.begin(one.folder, ["-m", "heliostat", *words], sink)
    os.close(sink)
    assert child
    return child, os.fdopen(source)


def waiting(one: zygote.Zygote, folder: Path) -> forked_command.ForkedCommand:
    """Begins a command that waits for its input, and is known to have begun."""
    os.mkfifo(folder / "job.yaml")
    child, _ = begin(one, folder, "check", "job.yaml")
    assert one.process.pid in [parent.pid for parent in psutil.Process(child.pid).parents()] and child.poll() is None
    return child


def test_a_driver_is_a_fork_that_runs_the_command_in_the_folder_and_tells_its_exit_code(drivers, tmp_path):
    (tmp_path / "job.yaml").write_text("name: x")
    child, output = begin(drivers, tmp_path, "check", "job.yaml", "--json")
    until(lambda: child.poll() is not None)
    said, code = output.read(), child.returncode
    alone = subprocess.run([sys.executable, "-m", "heliostat", "check", "job.yaml", "--json"], cwd=tmp_path, capture_output=True,
                           text=True, timeout=60, check=False)  # fmt: skip
    assert (said, code) == (alone.stdout + alone.stderr, alone.returncode) and code and "job.yaml" in said


def test_a_driver_that_is_killed_is_known_to_be(drivers, tmp_path):
    child = waiting(drivers, tmp_path)
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: child.poll() is not None)
    assert child.returncode == -signal.SIGKILL


def test_a_driver_ends_with_whoever_has_started_it(drivers, tmp_path):
    child = waiting(drivers, tmp_path)
    process = psutil.Process(child.pid)
    child._connection.close()
    process.wait(30)


def test_a_command_that_is_no_longer_waited_for_does_not_run(drivers, tmp_path, monkeypatch):
    """Who gives up runs it as a process of its own: it must not run twice."""
    os.mkfifo(tmp_path / "job.yaml")
    monkeypatch.setattr(forked_command, "START_S", 0.001)
    with contextlib.chdir(tmp_path):
        assert forked_command.begin(drivers.folder, ["-m", "heliostat", "check", "job.yaml"], 1) is None
    zygote = psutil.Process(drivers.process.pid)
    time.sleep(2)  # for the fork that was asked for
    until(lambda: {p.ppid() for p in zygote.children(recursive=True)} == {zygote.pid})  # its nurseries alone


def test_without_a_zygote_a_command_is_for_python_to_run(tmp_path):
    assert forked_command.begin(tmp_path, ["-m", "heliostat", "--help"], 1) is None
